"""The real training images that the pictured synthetic ones are closest to: `neighbours.png`, laid out as the preview.

Closeness is the squared difference of pixels, summed in whole numbers, so that every machine finds the same ones. It
shows at once which images are copies: methods that select hand on real images, and whoever shares a set should know.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from distillery.data.real import Real
from distillery.data.synthetic import Synthetic
from distillery.preview import picture, shown, shown_side, write_preview

PHOTOS = 200  # of a class are looked at, evenly spaced: each one has to be decoded


def write(synthetic: Synthetic, real: Real, folder: Path) -> list[dict[str, Any]]:
    """Find and draw the neighbours of the images in the preview.

    Args:
        synthetic: images_u8 [N, 3, S, S] and labels [N].
        real: its training images of the same class are searched; of photos an even sample.
        folder: gets neighbours.png.

    Returns:
        For each pictured image: `image`, its place in the set; `real`, its neighbour's place in the class; `rms`, the
        root of the mean squared difference in grey levels, 0 for a copy.
    """
    found: list[dict[str, Any]] = []
    near: list[Tensor] = []
    rows = [row for row in shown(synthetic.labels) if row]
    for row in rows:
        cls = int(synthetic.labels[row[0]])
        places = _places(real, cls)
        candidates = torch.stack([_small(image, real) for image in real.read("train", cls, places)])
        wanted = torch.stack([_small(synthetic.images_u8[index], real) for index in row])
        squares = _squares(wanted, candidates)
        for index, own, best in zip(row, squares, squares.argmin(1).tolist(), strict=True):
            rms = math.sqrt(float(own[best]) / wanted[0].numel())
            found.append({"image": index, "real": places[best], "rms": round(rms, 2)})
            near.append(candidates[best])
    labels = synthetic.labels[[index for row in rows for index in row]]
    write_preview(torch.stack(near), labels, folder / "neighbours.png")
    return found


def _places(real: Real, cls: int) -> list[int]:
    count = real.counts("train")[cls]
    step = max(1, -(-count // PHOTOS)) if real.kind == "photos" else 1
    return list(range(0, count, step))


def _small(image_u8: Tensor, real: Real) -> Tensor:
    """[3, s, s] as compared: pixels as they are, photos as the preview shows their central square."""
    if real.kind != "photos":
        return image_u8.cpu()
    square = functional.center_crop(image_u8, [min(image_u8.shape[1:])] * 2)
    reduced = picture(square, shown_side(real.size)).convert("RGB")
    return torch.from_numpy(np.asarray(reduced).copy()).permute(2, 0, 1)


def _squares(one: Tensor, other: Tensor) -> Tensor:
    """[A, B] sums of squared differences; whole numbers below 2^53 are exact in float64, in any order."""
    a, b = one.flatten(1).double(), other.flatten(1).double()
    return a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]
