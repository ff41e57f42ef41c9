"""The recover loops of SRe2L, DWA and DELT as their official scripts do the mathematics: `recover.py` compares with it.

PyTorch eager, one batch (group) at a time, images contiguous NCHW in the dtype they come in. Kept from the scripts,
since that is what a user of them pays for: forward hooks that copy every BatchNorm input, autograd through the
statistics, a view made of separate operations, SRe2L's image priors at weight zero, Adam and the clip over images that
are not optimised yet (DELT), weight gradients after DWA's ascent, the loss read at every step for a "best" copy that
nobody uses.

Left out: loading the teacher again for each image of a class, the verifier, wandb, DataParallel, files. One slip too:
DWA's scripts add the K gradients of the ascent to the images' first gradient; here that starts from zero, as in the
paper.

Shapes: B images of a batch, S their side, K steps of ascent, M iterations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class View:
    """One random view, the same for a whole batch.

    Attributes:
        box: top, left, height, width of the crop that is resized to the whole image.
        flip: mirrored left to right, after the crop.
        roll: circular shift down and to the right, last.
    """

    box: tuple[int, int, int, int]
    flip: bool
    roll: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is optimised, and how long.

    Attributes:
        iterations: M; the learning rate falls from `lr` as a cosine of this length.
        lr: of Adam.
        r_bn: weight of the BatchNorm statistics against the cross-entropy.
        lambda_var: weight of the variances against the means.
        first_bn: factor of the first BatchNorm layer.
        priors: compute SRe2L's image priors (total variation, L2), which have weight zero in all of its settings.
        ascent: K of DWA, 0 for none.
        rho: length of DWA's ascent.
        frozen: stop computing weight gradients after the ascent, which the scripts do not.
        rounds: of DELT's EarlyLate, in which ever more images of each class move; 1 for none.
        ipc: images of each class in a batch of DELT, which lie class after class.
    """

    iterations: int
    lr: float = 0.25
    r_bn: float = 0.01
    lambda_var: float = 1.0
    first_bn: float = 10.0
    priors: bool = False
    ascent: int = 0
    rho: float = 0.015
    frozen: bool = False
    rounds: int = 1
    ipc: int = 1


class Statistics:
    """Forward hook of one BatchNorm layer: the distance of its input's statistics from the running ones."""

    def __init__(self, layer: nn.BatchNorm2d, lambda_var: float) -> None:
        self.lambda_var, self.distance = lambda_var, torch.zeros(())
        self.handle = layer.register_forward_hook(self._measure)

    def _measure(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        x = inputs[0]
        mean = x.mean(dim=(0, 2, 3))
        by_channel = x.permute(1, 0, 2, 3).contiguous().reshape(x.shape[1], -1)
        var = by_channel.var(dim=1, unbiased=False)
        off_mean = torch.linalg.vector_norm(mean - layer.running_mean)
        self.distance = off_mean + self.lambda_var * torch.linalg.vector_norm(var - layer.running_var)


def recover(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    views: Sequence[View],
    plan: Plan,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Optimise one batch for `plan.iterations` steps.

    Args:
        net: the teacher in eval mode, on the images' device; left as it is (DWA moves a copy).
        images: [B, 3, S, S] initial images, normalised.
        labels: [B] classes.
        views: one per iteration.
        plan: the settings.
        mean, std: the images' normalisation, for the clip to valid pixels.

    Returns:
        [B, 3, S, S] images, normalised.
    """
    if plan.ascent:
        net = copy.deepcopy(net).requires_grad_(True)
    hooks = [Statistics(m, plan.lambda_var) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [plan.first_bn] + [1.0] * (len(hooks) - 1)
    images = images.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=plan.lr, betas=(0.5, 0.9), eps=1e-8)
    lowest, best = math.inf, images.detach()
    for step in range(plan.iterations):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * 0.5 * (1.0 + math.cos(math.pi * step / plan.iterations))
        rows = active(plan, len(images), step)
        x, y = (images, labels) if rows is None else (images[rows], labels[rows])
        x = look(x, views[step])
        optimizer.zero_grad()
        if plan.ascent and step == 0:
            ascend(net, x, y, plan)
            optimizer.zero_grad()
            net.requires_grad_(not plan.frozen)
        loss = functional.cross_entropy(net(x), y)
        loss = loss + plan.r_bn * sum(w * hook.distance for w, hook in zip(weights, hooks, strict=True))
        if plan.priors:
            loss = loss + 0.0 * total_variation(x) + 0.0 * x.flatten(1).norm(dim=1).mean()
        loss.backward()
        optimizer.step()
        clip(images.data, mean, std)
        if loss.item() < lowest:
            lowest, best = loss.item(), images.detach().clone()
    del best
    for hook in hooks:
        hook.handle.remove()
    return images.detach()


def look(images: Tensor, view: View) -> Tensor:
    """Images [B, 3, S, S] through one view: crop, resize, flip, roll."""
    size = images.shape[-1]
    top, left, height, width = view.box
    images = images[:, :, top : top + height, left : left + width]
    if (height, width) != (size, size):
        images = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    if view.flip:
        images = images.flip(3)
    return torch.roll(images, view.roll, dims=(2, 3))


def ascend(net: nn.Module, x: Tensor, labels: Tensor, plan: Plan) -> None:
    """DWA: move all parameters K times along the gradient of the cross-entropy of one view, `rho` / K at a time."""
    for _ in range(plan.ascent):
        functional.cross_entropy(net(x), labels).backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        length = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad * (plan.rho / plan.ascent / (length + 1e-12)))
                    parameter.grad = None


def active(plan: Plan, count: int, step: int) -> list[int] | None:
    """DELT: which of `count` images are optimised at a step, class after class; None for all without rounds."""
    if plan.rounds == 1:
        return None
    now = min(step // (plan.iterations // plan.rounds), plan.rounds - 1)
    sizes = [plan.ipc // plan.rounds + (r < plan.ipc % plan.rounds) for r in range(plan.rounds)]
    begun = sum(sizes[: now + 1])
    return [i for i in range(count) if i % plan.ipc < begun]


def total_variation(images: Tensor) -> Tensor:
    """L2 norms of the differences between neighbours: across, down and along both diagonals."""
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).norm()
    down = (images[:, :, 1:] - images[:, :, :-1]).norm()
    falling = (images[:, :, 1:, 1:] - images[:, :, :-1, :-1]).norm()
    rising = (images[:, :, 1:, :-1] - images[:, :, :-1, 1:]).norm()
    return across + down + falling + rising


def clip(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Keep every channel of normalised images [B, 3, S, S] where pixels are in 0..1, in place."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        images[:, channel] = torch.clamp(images[:, channel], -m / s, (1.0 - m) / s)
