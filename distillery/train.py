"""What every training loop shares: optimisers, schedules, weight averages, evaluation, and the state of a checkpoint.

Legend: B batch, N images, C classes, S side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distillery.config import Recipe
from distillery.data.images import Images
from distillery.device import Compute

View = Callable[[torch.Tensor], torch.Tensor]


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser at its base learning rate.

    `decay_filter: matrices` decays only parameters whose name holds "weight" and that have more than one
    dimension, as RDED's official student loop does.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        plain = recipe.decay_filter == "matrices" and not ("weight" in name and parameter.ndim > 1)
        (free if plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return build_optimizer(
        [g for g in groups if g["params"]],
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        betas=recipe.betas,
    )


def build_optimizer(
    groups: Any,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float] = (0.9, 0.999),
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """SGD or AdamW over parameters or parameter groups, in torch's multi-tensor form."""
    if name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov and momentum > 0,
            foreach=True,
        )
    assert name == "adamw", name
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)


def lr_factor(recipe: Recipe, epoch: int) -> float:
    """The factor on the base learning rate during an epoch (0-based).

    cosine: 0.5 (1 + cos(pi e / (zeta E))) after a linear warm-up from 1/100 (reference recipes: zeta 1 ends at 0,
    zeta 2 at one half); step: `step_gamma` for each passed share of the run; constant: 1.
    """
    total = recipe.epochs
    if epoch < recipe.warmup_epochs:
        return 0.01 + 0.99 * epoch / recipe.warmup_epochs
    if recipe.schedule == "cosine":
        done = (epoch - recipe.warmup_epochs) / max(1, total - recipe.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * done / recipe.zeta))
    if recipe.schedule == "step":
        return float(recipe.step_gamma ** sum(epoch >= share * total for share in recipe.step_at))
    return 1.0


def onecycle(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then linear fall to zero."""
    peak = warmup * total
    return (step + 1) / max(1.0, peak) if step + 1 < peak else max(0.0, (total - step) / max(1.0, total - peak))


def cosine(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then a half cosine to zero."""
    peak = warmup * total
    if step + 1 < peak:
        return (step + 1) / max(1.0, peak)
    return 0.5 * (1 + math.cos(math.pi * (step - peak) / max(1.0, total - peak)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of a net's weights; buffers follow the live net."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).eval()
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """One step towards the live weights."""
        mine = [p.detach() for p in self.net.parameters()]
        live = [p.detach() for p in net.parameters()]
        torch._foreach_lerp_(mine, live, 1 - self.decay)
        for kept, fresh in zip(self.net.buffers(), net.buffers(), strict=True):
            kept.copy_(fresh)


def batches(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` over n items."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


@torch.no_grad()
def predictions(
    net: nn.Module, images_u8: Images, view: View, compute: Compute, batch: int = 500, every: int = 1
) -> torch.Tensor:
    """The class a net gives each image in eval mode: [N / every, rounded up] int64 on the CPU; see `accuracy`."""
    was_training = net.training
    net.eval()
    found = []
    for part in batches(-(-len(images_u8) // every), batch):
        x_norm = view(compute.images(images_u8[part.start * every : part.stop * every : every]))
        with compute.autocast():
            logits = net(x_norm)
        found.append(logits.float().argmax(1).cpu())
    net.train(was_training)
    return torch.cat(found)


def accuracy(
    net: nn.Module,
    images_u8: Images,
    labels: torch.Tensor,
    view: View,
    compute: Compute,
    batch: int = 500,
    every: int = 1,
) -> tuple[float, list[float]]:
    """Top-1 accuracy in eval mode.

    Args:
        net: any classifier.
        images_u8: [N, 3, S, S] on any device, or decoded when they are looked at.
        labels: [N] class indices.
        view: uint8 batch -> normalised batch.
        compute: where and how precisely.
        batch: images per forward.
        every: look at every so-manyth image only.

    Returns:
        The fraction that is right, and the same per class in class order (NaN-free: an absent class counts 0).
    """
    return grade(predictions(net, images_u8, view, compute, batch, every), labels[::every].cpu())


def grade(predicted: torch.Tensor, owners: torch.Tensor) -> tuple[float, list[float]]:
    """Accuracy and accuracy per class, as `accuracy`, of predicted and true classes [N]."""
    hit = (predicted == owners).double()
    counts = torch.bincount(owners)
    per_class = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owners, hit) / counts.clamp(min=1)
    return float(hit.mean()), per_class.tolist()


def pack(net: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a training state under flat names, for `Track.save`."""
    state = {f"net/{k}": v for k, v in net.state_dict().items()}
    if ema is not None:
        state |= {f"ema/{k}": v for k, v in ema.net.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if value is not None:
                state[f"opt/{index}/{name}"] = torch.as_tensor(value)
    return state


def unpack(
    state: dict[str, torch.Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None
) -> None:
    """Put a `pack`ed state back."""
    _refill(net, {k[4:]: v for k, v in state.items() if k.startswith("net/")})
    if ema is not None:
        _refill(ema.net, {k[4:]: v for k, v in state.items() if k.startswith("ema/")})
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith("opt/"):
            _, index, name = key.split("/", 2)
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _refill(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy in place: some torchvision nets refuse `load_state_dict` of a plain dict."""
    for name, value in net.state_dict().items():
        value.copy_(state[name])
