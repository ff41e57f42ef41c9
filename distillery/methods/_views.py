"""The views of the recover methods: one random crop, flip and roll a step for all images of a group.

A view is linear in the pixels and separable, so it is two small matrices: view = rows @ image @ columns^T. Its adjoint,
which brings the gradient of the view back to the image, is rows^T @ gradient @ columns. Views are drawn for all
iterations of a group at once.

Legend: M iterations, G groups, n images of a group, S side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distillery.data.augment import random_boxes
from distillery.data.resample import axis_weights

RATIO = (3 / 4, 4 / 3)
SMALLEST_AREA = 0.08  # of torchvision's RandomResizedCrop


@dataclass(frozen=True)
class ViewLaw:
    """How views are drawn.

    Attributes:
        crop: none; rrc: resized crop (area as torchvision's, its lower bound per iteration); pad: zero-padded crop.
        smallest: [M] lower bound of a resized crop's area at each iteration.
        flip: probability of a horizontal flip.
        jitter: largest circular shift in pixels along each axis; never negative, as in the official code.
        pad: zeros on each side before a padded crop.
    """

    crop: Literal["none", "rrc", "pad"]
    smallest: Tensor
    flip: float
    jitter: int
    pad: int = 0


@dataclass(frozen=True)
class Views:
    """Drawn views of one group: boxes [M, 4] (top, left, height, width), flip [M] bool, roll [M, 2] (down, right)."""

    boxes: Tensor
    flip: Tensor
    roll: Tensor


def draw(law: ViewLaw, iterations: int, size: int, stream: torch.Generator) -> Views:
    """Draw the views of all iterations."""
    if law.crop == "rrc":
        boxes = random_boxes(iterations, size, (law.smallest[:iterations, None], 1.0), RATIO, stream)
    elif law.crop == "pad":
        place = torch.randint(-law.pad, law.pad + 1, (iterations, 2), generator=stream)
        boxes = torch.cat([place, torch.full_like(place, size)], dim=1)
    else:
        boxes = torch.tensor([0, 0, size, size]).expand(iterations, 4)
    flip = torch.rand(iterations, generator=stream) < law.flip
    return Views(boxes, flip, torch.randint(0, law.jitter + 1, (iterations, 2), generator=stream))


def matrices(views: list[Views], step: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The views of one step as matrices.

    Args:
        views: of G groups.
        step: which iteration.
        size: S.
        device: where they are wanted.

    Returns:
        rows and columns, each [G, S, S] float32: view = rows @ image @ columns^T.
    """
    boxes = torch.stack([v.boxes[step] for v in views]).to(device, non_blocking=True)
    flip = torch.stack([v.flip[step] for v in views]).to(device, non_blocking=True)
    roll = torch.stack([v.roll[step] for v in views]).to(device, non_blocking=True)
    rows = axis_weights(boxes[:, 0], boxes[:, 2], size, size)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], size, size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _rolled(rows, roll[:, 0]), _rolled(columns, roll[:, 1])


def see(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Views of images [G, n, 3, S, S], contiguous."""
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    return rows[:, None, None] @ images @ columns.mT[:, None, None]


def back(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The adjoint of `see`: the gradient of the views -> the gradient of the images."""
    rows, columns = rows.to(gradient.dtype), columns.to(gradient.dtype)
    return rows.mT[:, None, None] @ gradient @ columns[:, None, None]


def curriculum(iterations: int, mode: str, milestone: float = 1.0) -> Tensor:
    """Lower bound of the crop area at each iteration: CDA's curricula fall from 1 to 0.08.

    Args:
        iterations: M.
        mode: constant (0.08 throughout, SRe2L), cosine, linear, or step (1 up to the milestone).
        milestone: share a of the iterations after which the bound stays at 0.08.

    Returns:
        [M] float64.
    """
    done = torch.arange(iterations, dtype=torch.float64) / (milestone * iterations)
    height = {
        "constant": torch.zeros_like(done),
        "cosine": (1 + torch.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "step": torch.ones_like(done),
    }[mode]
    return SMALLEST_AREA + (1 - SMALLEST_AREA) * torch.where(done < 1, height, 0.0)


def _rolled(weights: Tensor, by: Tensor) -> Tensor:
    """Output pixel i takes what pixel i - by had, circularly: [G, S, S] and [G]."""
    size = weights.shape[1]
    source = (torch.arange(size, device=weights.device) - by[:, None]) % size
    return weights.gather(1, source[:, :, None].expand_as(weights))
