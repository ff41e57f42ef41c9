"""Batched views: the random parameters of a batch are drawn first, then applied to all its images at once.

`draw` needs only a policy and a generator, so a view can be drawn again from its seed; `apply` is a pure function
of images and parameters. Nothing loops over images and nothing waits for the device.

Order: RandAugment, patch shuffle, crop, flip, normalise, DSA, mix (RDED and DELT: reference recipes; DSA works on
normalised tensors).

Shapes: B images, S side of the view, R side of the source (R = S except for photos kept a little larger).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.config import ViewPolicy
from distillery.data import dsa, randaugment
from distillery.data.resample import crop_resize

Box = tuple[int, int, int, int]
TRIES = 10  # torchvision's RandomResizedCrop: attempts before the central fallback


@dataclass(frozen=True)
class Views:
    """The drawn parameters of one batch (CPU tensors; an empty tensor where the policy does not use a field).

    Attributes:
        size: side S of the result.
        source: side R of the images the views were drawn for.
        shift: [B, 2] int64, top-left corner of a plain crop in the padded source.
        boxes: [B, 4] int64 (top, left, height, width) of a resized crop; empty when every box is the whole image.
        flip: [B] bool.
        strips: [B, 2, f] int64, permutations of the column strips and of the row strips.
        partner: [B] int64, the image each one is mixed with.
        ops: [operations, B] int64, RandAugment codes.
        dsa_u: [B, 3] uniform numbers of the DSA group.
        dsa_group: the DSA group of the batch.
        mix_box: (top, left, bottom, right) of CutMix, one for the batch.
        own: weight of the own image: its share of the area under CutMix, lambda under MixUp.
    """

    size: int
    source: int
    shift: Tensor
    boxes: Tensor
    flip: Tensor
    strips: Tensor
    partner: Tensor
    ops: Tensor
    dsa_u: Tensor
    dsa_group: str = ""
    mix_box: Box = (0, 0, 0, 0)
    own: float = 1.0


def draw(policy: ViewPolicy, n: int, size: int, generator: torch.Generator, source: int = 0) -> Views:
    """Draw the view parameters of one batch.

    Args:
        policy: which transforms, and their ranges.
        n: images in the batch.
        size: side S of the views.
        generator: CPU generator; the same state gives the same views.
        source: side R of the (square) source images, 0 for S.
    """
    source = source or size
    none = torch.empty(0, dtype=torch.int64)
    parts = policy.shuffle_patches
    partner, mix_box, own = _draw_mix(policy, n, size, generator)
    group, uniform = dsa.draw(policy.dsa, n, generator) if policy.dsa else ("", none)
    return Views(
        size=size,
        source=source,
        shift=_draw_shift(policy, n, source - size, generator) if policy.crop == "pad" else none,
        boxes=_draw_boxes(policy, n, size, source, generator) if policy.crop == "rrc" else none,
        flip=torch.rand(n, generator=generator) < policy.flip if policy.flip > 0 else none,
        strips=torch.rand(n, 2, parts, generator=generator).argsort(dim=2) if parts > 1 else none,
        partner=partner,
        ops=randaugment.draw(policy.randaugment_n, n, generator),
        dsa_u=uniform,
        dsa_group=group,
        mix_box=mix_box,
        own=own,
    )


def apply(
    policy: ViewPolicy, images_u8: Tensor, views: Views, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Apply drawn views to a batch.

    Args:
        policy: the policy the views were drawn with.
        images_u8: [B, 3, R, R] uint8 on any device.
        views: parameters of these B images.
        mean, std: the normalisation of each channel, for pixels in 0..1.

    Returns:
        x_norm [B, 3, S, S] float32, channels last, on the images' device.
    """
    side = tuple(images_u8.shape[2:])
    assert side == (views.source, views.source), f"views drawn for side {views.source}, images are {side}"
    x = images_u8
    if views.ops.numel():
        x = randaugment.apply(x, views.ops, policy.randaugment_m)
    if views.strips.numel():
        x = shuffle_strips(x, views.strips.to(x.device))
    x = _crop(policy, x, views)
    if views.flip.numel():
        x = torch.where(views.flip.to(x.device)[:, None, None, None], x.flip(3), x)
    x_norm = normalise(x, mean, std)
    if views.dsa_group:
        x_norm = dsa.apply(x_norm, views.dsa_group, views.dsa_u)
    return _mix(policy, x_norm, views).contiguous(memory_format=torch.channels_last)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels 0..255 (uint8 or float, [B, 3, S, S]) to x_norm float32, channels last."""
    x = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    centre = torch.tensor(mean, device=x.device).view(1, -1, 1, 1)
    spread = torch.tensor(std, device=x.device).view(1, -1, 1, 1)
    return x.div_(255.0).sub_(centre).div_(spread)


def evaluation_view(images_u8: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The fixed view that accuracy is measured on: the central S x S pixels, normalised.

    Args:
        images_u8: [B, 3, R, R] uint8; small images come with R = S, photos with R = S // 7 * 8.

    Returns:
        x_norm [B, 3, S, S].
    """
    return normalise(centre_crop(images_u8, size), mean, std)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The central S x S pixels of [B, 3, H, W] (torchvision's rounding)."""
    top, left = round((images.shape[2] - size) / 2), round((images.shape[3] - size) / 2)
    return images[:, :, top : top + size, left : left + size]


def _draw_shift(policy: ViewPolicy, n: int, slack: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, slack + 2 * policy.crop_pad + 1, (n, 2), generator=generator)


def _draw_boxes(policy: ViewPolicy, n: int, size: int, source: int, generator: torch.Generator) -> Tensor:
    boxes = random_boxes(n, source, policy.crop_scale, policy.crop_ratio, generator)
    whole = torch.tensor([0, 0, source, source])
    return boxes[:0] if source == size and bool((boxes == whole).all()) else boxes


def random_boxes(
    n: int, side: int, scale: tuple[float | Tensor, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Boxes [n, 4] (top, left, height, width) in a square image by torchvision's RandomResizedCrop law.

    Area is uniform in `scale` of the image, the logarithm of width / height uniform in `ratio`; the first of ten
    tries that fits is taken, else the largest central box within `ratio`. The lower bound of the area may be one number
    for each box, [n, 1].
    """
    area = side * side * _uniform((n, TRIES), scale[0], scale[1], generator)
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = _uniform((n, TRIES), low, high, generator).exp()
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.int().argmax(dim=1, keepdim=True)
    width, height = width.gather(1, first).squeeze(1), height.gather(1, first).squeeze(1)
    none = ~fits.any(dim=1)
    width[none] = min(side, round(side * ratio[1]))
    height[none] = min(side, round(side / ratio[0]))
    place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    top, left = (place[:, 0] * (side - height + 1)).long(), (place[:, 1] * (side - width + 1)).long()
    top[none], left[none] = (side - height[none]) // 2, (side - width[none]) // 2
    return torch.stack([top, left, height, width], dim=1)


def _uniform(shape: tuple[int, ...], low: float | Tensor, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _draw_mix(policy: ViewPolicy, n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box, float]:
    if policy.mix == "none":
        return torch.empty(0, dtype=torch.int64), (0, 0, 0, 0), 1.0
    partner = torch.randperm(n, generator=generator)
    pair = torch._standard_gamma(torch.full((2,), policy.mix_alpha, dtype=torch.float64), generator=generator)
    lam = float(pair[0] / pair.sum())  # two equal gammas give Beta(alpha, alpha)
    if policy.mix == "mixup":
        return partner, (0, 0, 0, 0), lam
    half = int(size * (1.0 - lam) ** 0.5) // 2
    y, x = torch.randint(0, size, (2,), generator=generator).tolist()
    box = (max(y - half, 0), max(x - half, 0), min(y + half, size), min(x + half, size))
    return partner, box, 1.0 - (box[2] - box[0]) * (box[3] - box[1]) / size**2


def shuffle_strips(images: Tensor, strips: Tensor) -> Tensor:
    """Permute f column strips, then f row strips, of each image (RDED's ShufflePatches).

    Args:
        images: [B, 3, H, W].
        strips: [B, 2, f]: the strip that comes to each place; columns first.
    """
    parts = strips.shape[2]
    columns = _strip_index(strips[:, 0], images.shape[3], parts)
    rows = _strip_index(strips[:, 1], images.shape[2], parts)
    return _gather(images, rows, columns)


def _strip_index(order: Tensor, extent: int, parts: int) -> Tensor:
    """[B, extent]: source pixel of each target pixel when strips come in `order` ([B, f])."""
    bounds = torch.tensor([i * extent // parts for i in range(1, parts)], device=order.device)
    strip = torch.bucketize(torch.arange(extent, device=order.device), bounds, right=True)
    return order.argsort(dim=1)[:, strip].argsort(dim=1, stable=True)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pick pixel rows [B, h] and columns [B, w] of each image: [B, 3, h, w]."""
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _crop(policy: ViewPolicy, images: Tensor, views: Views) -> Tensor:
    if views.boxes.numel():
        return crop_resize(images, views.boxes, views.size)
    if not views.shift.numel():
        return centre_crop(images, views.size)
    padded = F.pad(images, [policy.crop_pad] * 4)  # black pixels, as a crop before normalisation gives
    reach = torch.arange(views.size, device=images.device)
    shift = views.shift.to(images.device)
    return _gather(padded, shift[:, :1] + reach, shift[:, 1:] + reach)


def _mix(policy: ViewPolicy, x_norm: Tensor, views: Views) -> Tensor:
    if not views.partner.numel():
        return x_norm
    partner = views.partner.to(x_norm.device)
    if policy.mix == "mixup":
        return x_norm * views.own + x_norm[partner] * (1.0 - views.own)
    top, left, bottom, right = views.mix_box
    x_norm[:, :, top:bottom, left:right] = x_norm[partner, :, top:bottom, left:right]
    return x_norm
