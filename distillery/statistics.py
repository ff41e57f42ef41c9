"""What the training images look like inside a teacher: statistics that methods match besides BatchNorm's buffers.

    class_bn  mean and variance of the input of every BatchNorm2d, per class

Legend: B batch, N images, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distillery.data import augment
from distillery.data.real import Real
from distillery.errors import UserError, choices

if TYPE_CHECKING:
    from distillery.teacher import Frozen
    from distillery.track import Track

KINDS = ("class_bn", "conv")
BATCH = 256


def collect(
    members: Sequence[Frozen], real: Real, kinds: Collection[str], *, seed: int, track: Track
) -> list[dict[str, Tensor]]:
    """Statistics of the training images inside each teacher.

    Args:
        members: the teachers.
        real: the data set.
        kinds: which of `KINDS`.
        seed: of random views; "class_bn" uses none.
        track: progress.

    Returns:
        For each teacher, float32 tensors on the CPU: "class_bn/mean", "class_bn/var" [classes, channels of all
        BatchNorm2d in module order].

    Raises:
        UserError: a kind that is not there.
    """
    if set(kinds) - {"class_bn"}:
        raise UserError(f"statistics {choices(kinds)}: only class_bn can be collected; choose another method")
    images_u8, labels = real.pixels("train")
    sums: list[dict[tuple[int, int], Tensor]] = [{} for _ in members]
    for start in range(0, len(labels), BATCH):
        for member, own in zip(members, sums, strict=True):
            part = images_u8[start : start + BATCH].to(member.compute.device)
            _add(own, member, part, labels[start : start + BATCH])
        track.log(min(start + BATCH, len(labels)), len(labels))
    return [_result(own, len(real.classes)) for own in sums]


def _add(sums: dict[tuple[int, int], Tensor], member: Frozen, part_u8: Tensor, labels: Tensor) -> None:
    """Add count, sum and sum of squares of each channel: (class, layer) -> [3, C] float64."""
    seen: list[Tensor] = []
    layers = [module for module in member.net.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double())) for layer in layers]
    member.logits(augment.evaluation_view(part_u8, member.size, member.mean, member.std))
    for handle in handles:
        handle.remove()
    for layer, x in enumerate(seen):
        for cls in labels.unique().tolist():
            own = x[(labels == cls).to(x.device)].transpose(0, 1).flatten(1)
            found = torch.stack([torch.full_like(own[:, 0], own.shape[1]), own.sum(1), own.square().sum(1)]).cpu()
            sums[cls, layer] = sums.get((cls, layer), torch.zeros_like(found)) + found


def _result(sums: dict[tuple[int, int], Tensor], classes: int) -> dict[str, Tensor]:
    layers = 1 + max(layer for _, layer in sums)
    whole = torch.stack([torch.cat([sums[cls, layer] for layer in range(layers)], 1) for cls in range(classes)])
    count, first, second = whole.unbind(1)
    mean = first / count
    return {"class_bn/mean": mean.float(), "class_bn/var": (second / count - mean.square()).clamp(min=0).float()}
