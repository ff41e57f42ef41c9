"""The recover loop as the official code writes it: autograd through hooks, torch.optim.Adam, one group, no packing."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from _toys import CPU, MEAN, STD, ToyTeacher
from torch import Tensor, nn
from torch.nn import functional

from distillery.methods import Group, _recover
from distillery.methods._recover import Recovery
from distillery.methods._views import Views, matrices
from distillery.rng import generator

SIZE = 8
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]

Losses = dict[str, float]


def deep_net(classes: int = 4, name: str = "deep", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Three BatchNorms of different widths with random weights and statistics; frozen, in eval mode."""
    layers: list[nn.Module] = []
    for inner, outer, stride in ((3, 6, 1), (6, 8, 2), (8, 5, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes)).double()
    stream = generator("plain", name, classes)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream, dtype=torch.float64) / 2
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features, generator=stream, dtype=torch.float64)
            layer.running_var = torch.rand(layer.num_features, generator=stream, dtype=torch.float64) + 0.5
    return net.to(dtype).eval().requires_grad_(False)


class DeepTeacher(ToyTeacher):
    """A teacher that also takes float32 images where its net is float64."""

    def logits(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C]."""
        return super().logits(x.to(next(self.net.parameters()).dtype))


def deep_teacher(classes: int = 4, name: str = "deep", dtype: torch.dtype = torch.float64) -> ToyTeacher:
    """A teacher with `deep_net`."""
    return DeepTeacher(deep_net(classes, name, dtype), SIZE)


@dataclass(frozen=True)
class Several:
    """Teachers that take turns."""

    members: tuple[ToyTeacher, ...]
    size: int = SIZE
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    compute = CPU


View = Callable[[Tensor, int], Tensor]


def through(views: Views, exactly: bool = False) -> View:
    """Views of [n, 3, S, S] at each step: by the engine's matrices, or (no crop) by torch's own flip and roll."""

    def view(x: Tensor, step: int) -> Tensor:
        if exactly:
            x = x.flip(3) if views.flip[step] else x
            return x.roll(views.roll[step].tolist(), (2, 3))
        rows, columns = (m[0].to(x.dtype) for m in matrices([views], step, x.shape[3], x.device))
        return rows @ x @ columns.mT

    return view


@contextlib.contextmanager
def norm_losses(net: nn.Module, first_bn: float, r_var: float) -> Iterator[list[Tensor]]:
    """The official feature hooks: one weighted loss for each BatchNorm2d, in module order."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        (x,) = inputs
        mean = x.mean([0, 2, 3])
        var = x.transpose(0, 1).flatten(1).var(1, correction=0)
        far = r_var * torch.norm(module.running_var - var, 2) + torch.norm(module.running_mean - mean, 2)
        found.append(far * (1.0 if found else first_bn))

    handles = [m.register_forward_hook(hook) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def plain(
    nets: Sequence[nn.Module],
    first: Tensor,
    labels: Tensor,
    view: View,
    *,
    iterations: int,
    lr: float,
    r_bn: float,
    first_bn: float = 10.0,
    r_var: float = 1.0,
    active: Callable[[int], list[int]] | None = None,
) -> Iterator[tuple[Losses, Tensor]]:
    """Losses before, and images after, each iteration of one group.

    Args:
        nets: they take turns.
        first: [n, 3, S, S] normalised.
        labels: [n].
        view: what the nets see.
        iterations, lr, r_bn, first_bn, r_var: see `Recovery`.
        active: which images take part at an iteration; the others have zero gradients (DELT's code).
    """
    x = first.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9), eps=1e-8)
    low, high = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (LOW, HIGH))
    for step in range(iterations):
        adam.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / iterations)) * lr
        adam.zero_grad()
        own = active(step) if active else list(range(len(x)))
        net = nets[step % len(nets)]
        with norm_losses(net, first_bn, r_var) as terms:
            logits = net(view(x[own], step))
        task = functional.cross_entropy(logits, labels[own])
        statistics = r_bn * torch.stack(terms).sum()
        (task + statistics).backward()
        adam.step()
        x.data = torch.minimum(torch.maximum(x.data, low), high)
        yield {"cross-entropy": task.item(), "statistics loss": statistics.item()}, x.detach().clone()


def labels_of(group: Group) -> Tensor:
    """The class of each image of a group, in order."""
    return torch.tensor([cls for cls, _ in group.images])


def steps(
    recovery: Recovery, teacher: ToyTeacher | Several, groups: list[Group], seed: int = 0
) -> Iterator[tuple[list[Losses], list[Tensor]]]:
    """Losses before, and active images [n, 3, S, S] after, each iteration of the engine, for each group of a pack."""
    pack = _recover._Pack(recovery, teacher, groups, seed)  # type: ignore[arg-type]
    with pack.ready():
        for _ in range(recovery.iterations):
            pack.advance()
            _, names, values = pack.records[-1]
            losses = [dict(zip(names, own, strict=True)) for own in values.T.tolist()]
            yield losses, list(pack.x.flatten(1, 2).clone())


def to_u8(x_norm: Tensor) -> Tensor:
    """Normalised images as they are kept."""
    mean, std = (torch.tensor(v, dtype=x_norm.dtype).view(3, 1, 1) for v in (MEAN, STD))
    return ((x_norm * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
