"""Random square crops of real images of any size: which box, and its pixels.

Legend: P images, m crops of each, s side of a crop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distillery.data.resample import crop_resize


def boxes_of(area: Tensor, place: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Boxes by torchvision's RandomResizedCrop law at ratio 1:1.

    The first attempt that fits the image is taken, else the largest central square.

    Args:
        area: [P, m, tries] areas relative to the image's.
        place: [P, m, 2] in [0, 1), where a crop lies (vertically, horizontally).
        heights, widths: [P] int64, sides of the images.

    Returns:
        [P, m, 4] int64 (top, left, height, width).
    """
    high, wide = heights[:, None], widths[:, None]
    sides = (area * (high * wide)[:, :, None]).sqrt().round().long()
    shorter = torch.minimum(high, wide)
    fits = (sides > 0) & (sides <= shorter[:, :, None])
    found = fits.any(dim=2)
    side = sides.gather(2, fits.int().argmax(dim=2, keepdim=True)).squeeze(2)
    side = torch.where(found, side, shorter)
    top = torch.where(found, (place[:, :, 0] * (high - side + 1)).long(), (high - side) // 2)
    left = torch.where(found, (place[:, :, 1] * (wide - side + 1)).long(), (wide - side) // 2)
    return torch.stack([top, left, side, side], dim=2)


def crops(images: Tensor | list[Tensor], boxes: Tensor, side: int, device: torch.device) -> Tensor:
    """Cut boxes out and resize them, antialiased bilinear, as RandomResizedCrop does on float tensors.

    Images of one size go through one batched resampling. Photos go through torchvision box by box: it skips the pixels
    outside a box and the zeros of the filter, which on large images is several times faster than dense products.

    Args:
        images: [P, 3, H, W] uint8, or a list of P photos [3, h, w] uint8.
        boxes: [P, m, 4].
        side: s.
        device: where the crops are wanted.

    Returns:
        [P * m, 3, s, s] float32 in 0..255.
    """
    if isinstance(images, Tensor):
        source = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
        return crop_resize(images.to(device), boxes.flatten(0, 1), side, source)
    from torchvision.transforms.v2 import functional  # here, because the import takes seconds

    cut = []
    for image, own in zip(images, boxes.tolist(), strict=True):
        on_device = image.to(device)
        cut += [
            functional.resize(functional.crop(on_device, *box).float(), [side, side], antialias=True) for box in own
        ]
    return torch.stack(cut)
