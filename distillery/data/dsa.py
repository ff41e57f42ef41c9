"""Differentiable Siamese Augmentation (arXiv 2102.08259) as an evaluation view of normalised batches.

One group of the strategy is drawn per batch and its parameters per image, which is what the official code does when
a student is trained. Constants are its defaults; geometric groups use `align_corners=True`, the default of the torch
version those results were made with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.errors import UserError, choices, nearest

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP = 0.125  # of the side
CUTOUT = 0.5  # of the side
SCALE = 1.2
ROTATE = 15.0  # degrees
DEFAULT = "color_crop_cutout_flip_scale_rotate"


def groups(strategy: str) -> list[str]:
    """The names in a strategy such as `color_crop_flip`.

    Raises:
        UserError: an unknown name.
    """
    names = strategy.split("_")
    for name in names:
        if name not in GROUPS:
            raise UserError(f"dsa: {name!r} in {strategy!r} is not one of {choices(GROUPS)}{nearest(name, GROUPS)}")
    return names


def draw(strategy: str, n: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """One group for the batch, and uniform numbers [n, 3] for its images."""
    names = groups(strategy)
    group = names[int(torch.randint(0, len(names), (1,), generator=generator))]
    return group, torch.rand(n, 3, generator=generator)


def apply(x_norm: Tensor, group: str, uniform: Tensor) -> Tensor:
    """Apply one group to x_norm [B, 3, S, S] with the drawn numbers [B, 3]."""
    return GROUPS[group](x_norm, uniform.to(x_norm.device))


def _color(x: Tensor, u: Tensor) -> Tensor:
    bright, saturated, contrasted = u.view(-1, 3, 1, 1, 1).unbind(1)
    x = x + (bright - 0.5) * BRIGHTNESS
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (saturated * SATURATION) + grey
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - level) * (contrasted + CONTRAST) + level


def _crop(x: Tensor, u: Tensor) -> Tensor:
    reach = int(x.shape[2] * CROP + 0.5)
    shift = (u[:, :2] * (2 * reach + 1)).long() - reach
    index = torch.arange(x.shape[2], device=x.device)
    rows, columns = index + shift[:, :1], index + shift[:, 1:]
    inside = _within(rows, x.shape[2])[:, :, None] & _within(columns, x.shape[3])[:, None, :]
    which = torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = rows.clamp(0, x.shape[2] - 1), columns.clamp(0, x.shape[3] - 1)
    moved = x.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)


def _within(index: Tensor, extent: int) -> Tensor:
    return (index >= 0) & (index < extent)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    side = x.shape[2]
    hole = int(side * CUTOUT + 0.5)
    start = (u[:, :2] * (side + 1 - hole % 2)).long() - hole // 2  # the centre may lie on the border
    index = torch.arange(side, device=x.device)
    rows, columns = _within(index - start[:, :1], hole), _within(index - start[:, 1:], hole)
    return x * ~(rows[:, :, None] & columns[:, None, :])[:, None]


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    factors = u[:, :2] * (SCALE - 1.0 / SCALE) + 1.0 / SCALE
    zero = torch.zeros_like(factors[:, 0])
    return _warp(x, [factors[:, 0], zero, zero, zero, factors[:, 1], zero])


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (u[:, 0] - 0.5) * 2.0 * ROTATE * math.pi / 180.0
    zero = torch.zeros_like(angle)
    return _warp(x, [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero])


def _warp(x: Tensor, matrix: list[Tensor]) -> Tensor:
    theta = torch.stack(matrix, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


GROUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
