"""ConvNet-d, the small network of dataset condensation (arXiv 2006.05929; with batch norm in RDED, 2312.03526).

d x [conv 3x3 pad 1 -> norm -> ReLU -> average pool 2x2], flatten, linear. State-dict names are the field's
(`features.<i>`, `classifier`), so that published weights load.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import model_validator
from torch import nn

from distillery import config
from distillery.errors import UserError

Norm = Literal["batch", "instance", "group", "layer", "none"]
GROUPS = 4  # of norm "group", as in the dataset-condensation code


class Options(config.Options):
    """Options of a ConvNet."""

    width: config.Count = 128  # channels of every convolution
    norm: Norm = "batch"

    @model_validator(mode="after")
    def _groups_fit(self) -> Options:
        if self.norm == "group" and self.width % GROUPS:
            raise ValueError(f"width {self.width} is not a multiple of the {GROUPS} groups of norm 'group'")
        return self


class ConvNet(nn.Module):
    """See the file's head. Input [B, 3, S, S], output logits [B, C]."""

    def __init__(self, depth: int, classes: int, size: int, options: Options) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            side = size >> block
            layers.append(nn.Conv2d(options.width if block else 3, options.width, 3, padding=1))
            layers.extend(_norm(options, side))
            layers += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(options.width * (size >> depth) ** 2, classes)

    def forward(self, x_norm: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        logits: torch.Tensor = self.classifier(self.features(x_norm).flatten(1))
        return logits


def depth_of(name: str) -> int:
    """The d of `convnet<d>`, 0 for any other name."""
    found = re.fullmatch(r"convnet([1-9][0-9]{0,3})", name)
    return int(found[1]) if found else 0


def build(name: str, classes: int, size: int, options: Options) -> nn.Module:
    """A ConvNet for images of `size` pixels a side.

    Raises:
        UserError: more halvings than the images have; names the deepest net that fits.
    """
    depth = depth_of(name)
    deepest = size.bit_length() - 1
    if deepest < 1:
        raise UserError(f"net {name}: images of {size} px are too small for any ConvNet; the smallest is 2 px")
    if depth > deepest:
        raise UserError(
            f"net {name}: {depth} halvings leave nothing of {size} px images; the deepest that fits is convnet{deepest}"
        )
    return ConvNet(depth, classes, size, options)


def _norm(options: Options, side: int) -> list[nn.Module]:
    """The norm of one block on maps [B, width, side, side]; none is no module at all."""
    width = options.width
    if options.norm == "batch":
        return [nn.BatchNorm2d(width)]
    if options.norm == "instance":
        return [nn.InstanceNorm2d(width, affine=True)]  # GroupNorm(width, width) gives the same, 3x slower on CPUs
    if options.norm == "group":
        return [nn.GroupNorm(GROUPS, width)]
    if options.norm == "layer":
        return [nn.LayerNorm([width, side, side])]
    return []
