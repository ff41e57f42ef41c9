"""RandAugment (arXiv 1909.13719) on uint8 batches: torchvision's operations, applied to groups of images.

Each image draws its own operations; images that drew the same operation and sign are transformed together, by
torchvision's own batched functions. Only `equalize`, which torchvision does image by image, is written here.

Magnitudes are torchvision's 31 bins (m in 0..30; 9 is its default). DELT uses timm's variant, which differs:
timm's m in 0..10 is 3 m here, each of its operations runs with probability 1/2, its magnitudes carry Gaussian noise,
and its list has Invert and SolarizeAdd instead of Identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

BINS = 30.0  # the largest magnitude
Op = Callable[[Tensor, float, int], Tensor]  # images [G, 3, H, W], strength in 0..1, sign +-1


def _tf() -> ModuleType:
    import torchvision.transforms.functional  # here, because the import takes seconds

    return torchvision.transforms.functional


def _affine(images: Tensor, translate: list[int], shear: list[float], center: list[int] | None) -> Tensor:
    return _tf().affine(images, angle=0.0, translate=translate, scale=1.0, shear=shear, center=center)


def _shear(images: Tensor, slope: float, axis: int) -> Tensor:
    shear = [0.0, 0.0]
    shear[axis] = math.degrees(math.atan(slope))
    return _affine(images, [0, 0], shear, [0, 0])


def _translate(images: Tensor, share: float, axis: int) -> Tensor:
    shift = [0, 0]
    shift[axis] = int(150.0 / 331.0 * images.shape[3 - axis] * share)
    return _affine(images, shift, [0.0, 0.0], None)


def _posterize(images: Tensor, strength: float, _: int) -> Tensor:
    return _tf().posterize(images, 8 - round(4.0 * strength))


def equalize(images_u8: Tensor) -> Tensor:
    """Flatten each channel's histogram, for all images at once (integer-exact with torchvision's)."""
    flat = images_u8.flatten(2).long()
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = histogram.gather(2, flat.amax(dim=2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    table = (histogram.cumsum(2) - histogram + step // 2) // step.clamp(min=1)
    mapped = table.clamp(0, 255).gather(2, flat).to(torch.uint8).view_as(images_u8)
    return torch.where((step == 0)[..., None], images_u8, mapped)


OPS: dict[str, Op] = {
    "identity": lambda x, s, sign: x,
    "shear_x": lambda x, s, sign: _shear(x, 0.3 * s * sign, 0),
    "shear_y": lambda x, s, sign: _shear(x, 0.3 * s * sign, 1),
    "translate_x": lambda x, s, sign: _translate(x, s * sign, 0),
    "translate_y": lambda x, s, sign: _translate(x, s * sign, 1),
    "rotate": lambda x, s, sign: _tf().rotate(x, 30.0 * s * sign),
    "brightness": lambda x, s, sign: _tf().adjust_brightness(x, 1.0 + 0.9 * s * sign),
    "color": lambda x, s, sign: _tf().adjust_saturation(x, 1.0 + 0.9 * s * sign),
    "contrast": lambda x, s, sign: _tf().adjust_contrast(x, 1.0 + 0.9 * s * sign),
    "sharpness": lambda x, s, sign: _tf().adjust_sharpness(x, 1.0 + 0.9 * s * sign),
    "posterize": _posterize,
    "solarize": lambda x, s, sign: _tf().solarize(x, 255.0 * (1.0 - s)),
    "autocontrast": lambda x, s, sign: _tf().autocontrast(x),
    "equalize": lambda x, s, sign: equalize(x),
}


def draw(operations: int, n: int, generator: torch.Generator) -> Tensor:
    """Codes [operations, n]: twice the operation's index, plus one for a negative sign."""
    return torch.randint(0, 2 * len(OPS), (operations, n), generator=generator)


def apply(images_u8: Tensor, codes: Tensor, magnitude: float) -> Tensor:
    """Apply drawn operations one after another.

    Args:
        images_u8: [B, 3, H, W] uint8 on any device.
        codes: [operations, B] int64 on the CPU, from `draw`.
        magnitude: m in 0..30.
    """
    functions = list(OPS.values())
    for row in codes:
        result = images_u8.clone()
        for code in row.unique().tolist():
            group = (row == code).nonzero().squeeze(1).to(images_u8.device)
            sign = -1 if code % 2 else 1
            result[group] = functions[code // 2](images_u8[group], magnitude / BINS, sign)
        images_u8 = result
    return images_u8
