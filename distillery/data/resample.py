"""Batched crop and resize: one antialiased bilinear resampling for many boxes at once.

Every box of a batch has its own scale, so each one gets its own pair of triangle-filter weight matrices and the
whole batch is resampled by two matrix products. The result equals torchvision's
`resized_crop(image, top, left, height, width, [size, size], antialias=True)` of each image to about 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_FLOATS = 32 * 1024 * 1024  # floats of images, weights and results handled at a time: about 128 MiB


def axis_weights(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """Filter weights along one axis.

    Args:
        start: [B] first pixel of each box.
        length: [B] box length in pixels.
        extent: length of the image along this axis.
        size: number of output pixels.

    Returns:
        [B, size, extent] float32; each row sums to 1 and is zero outside its box. A row that looks
        at pixels outside the image is zero throughout (a padded crop).
    """
    start64, length64 = start.double()[:, None, None], length.double()[:, None, None]
    scale = length64 / size
    # An enlargement interpolates between neighbours (support 1); a reduction averages over `scale` pixels.
    support = scale.clamp(min=1.0)
    pixels = torch.arange(extent, device=start.device, dtype=torch.float64)[None, None, :]
    centres = scale * (torch.arange(size, device=start.device, dtype=torch.float64)[None, :, None] + 0.5)
    weights = (1.0 - ((pixels - start64 + 0.5 - centres) / support).abs()).clamp(min=0.0)
    inside = (pixels >= start64) & (pixels < start64 + length64)
    weights = weights * inside
    total = weights.sum(dim=2, keepdim=True)
    return (weights / total.where(total > 0, 1.0)).float()


def _per_box(channels: int, height: int, width: int, size: int) -> int:
    return channels * (height * width + size * width + size * size) + 4 * size * (height + width)


def crop_resize(images: Tensor, boxes: Tensor, size: int, source: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and resize it to a square, antialiased.

    Args:
        images: [M, channels, H, W], float in any value space or uint8 (0..255).
        boxes: [B, 4] int64 (top, left, height, width), inside the image, at least one pixel.
        size: side of the result.
        source: [B] int64, the image of each box; None when box b belongs to image b (then M = B).

    Returns:
        [B, channels, size, size] float32 in the images' value space, on the images' device.
    """
    boxes = boxes.to(images.device)
    channels, height, width = images.shape[1:]
    result = torch.empty(len(boxes), channels, size, size, device=images.device)
    step = max(1, CHUNK_FLOATS // _per_box(channels, height, width, size))
    with torch.autocast(images.device.type, enabled=False):  # autocast would round the weights to bf16
        for first in range(0, len(boxes), step):
            part = slice(first, first + step)
            top, left, tall, wide = boxes[part].unbind(1)
            picked = images[part] if source is None else images[source[part].to(images.device)]
            rows = axis_weights(top, tall, height, size)[:, None] @ picked.float()
            result[part] = rows @ axis_weights(left, wide, width, size).mT[:, None]
    return result
