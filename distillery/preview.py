"""A picture of a synthetic set: one row per class."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

SMALLEST, LARGEST = 32, 96  # pixels on a side of one image in the picture


def write_preview(
    images_u8: torch.Tensor, labels: torch.Tensor, path: Path, max_classes: int = 10, per_class: int = 10
) -> None:
    """Write the first images of the first classes as a PNG grid; the same input gives the same bytes.

    Rows are classes in label order, columns are images in the given order; gaps are transparent. Images under 32 px
    are enlarged by a whole factor, images over 96 px are reduced, so that the file stays small.

    Args:
        images_u8: uint8 [N, 3, S, S], 0..255.
        labels: int64 [N].
        path: the PNG to write.
        max_classes: rows at most.
        per_class: columns at most.
    """
    assert images_u8.dtype == torch.uint8 and images_u8.ndim == 4, f"{images_u8.dtype} {tuple(images_u8.shape)}"
    assert len(images_u8) == len(labels) > 0, f"{len(images_u8)} images, {len(labels)} labels"
    rows = shown(labels, max_classes, per_class)
    side = shown_side(images_u8.shape[-1])
    step = side + max(2, side // 16)
    gap = step - side
    grid = Image.new("RGBA", (max(map(len, rows)) * step - gap, len(rows) * step - gap))
    for y, indices in enumerate(rows):
        for x, index in enumerate(indices):
            grid.paste(picture(images_u8[index], side), (x * step, y * step))
    grid.save(path, format="PNG", optimize=True)


def shown_side(side: int) -> int:
    """Pixels on a side in the picture of an image with `side` pixels."""
    return min(side * max(1, SMALLEST // side), LARGEST)


def shown(labels: torch.Tensor, max_classes: int = 10, per_class: int = 10) -> list[list[int]]:
    """Which images the picture shows: the places of each row's."""
    return [(labels == c).nonzero().flatten().tolist()[:per_class] for c in labels.unique().tolist()[:max_classes]]


def picture(image_u8: torch.Tensor, side: int) -> Image.Image:
    """One image [3, S, S] as it stands in the picture."""
    whole = Image.fromarray(image_u8.permute(1, 2, 0).contiguous().cpu().numpy())
    enlarged = side >= whole.width  # by a whole factor: keep the pixels sharp
    return whole.resize((side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
