"""Bytes of an image file -> upright 8-bit RGB, whatever the file holds.

What is decided here, once for the whole product:

- EXIF orientation is applied.
- Transparency (alpha channel, transparent palette entry or colour) is put on white.
- 16-bit grey is scaled (65535 -> 255), not clipped.
- CMYK is converted without colour profile; a CMYK JPEG is taken as inverted, as Adobe writes it and browsers read it.
- Of an animation the first frame counts.
- Formats without a fixed range of values (float TIFF, 32-bit integers, LAB) are refused by name.
"""

from __future__ import annotations

import functools
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Only formats that store pixels: EPS and its like would run an interpreter on foreign bytes.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "WEBP": "webp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}
_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif"
SUFFIXES = frozenset(_SUFFIXES.split())
MAX_RATIO = 100  # a side ratio beyond this is no photo, and resizing its short side would need gigabytes
MAX_PIXELS = 100_000_000  # 300 MB decoded; a few bytes can claim more than any memory holds
WHITE = (255, 255, 255, 255)


class Unreadable(Exception):
    """An image that cannot be decoded; the text says why."""


def picture(data: bytes) -> Image.Image:
    """Decode to an upright RGB picture.

    Raises:
        Unreadable: not an image, truncated, or values without a fixed range.
    """
    return _decode(data, quick=False)[0]


def check(data: bytes) -> str:
    """Read the whole file without keeping the pixels; the file extension of what it really is.

    A JPEG is decoded at an eighth of its size: every byte is read, at a third of the time.

    Raises:
        Unreadable: as `picture`.
    """
    return _decode(data, quick=True)[1]


def _decode(data: bytes, quick: bool) -> tuple[Image.Image, str]:
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            kind = str(image.format)
            _check_shape(image)
            if quick and kind == "JPEG":
                image.draft(None, (1, 1))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image), EXTENSIONS[kind]
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(sorted(set(EXTENSIONS.values())))
        raise Unreadable(f"no image of a known format ({known}), {len(data)} bytes") from error
    except Exception as error:  # decoders raise anything on foreign bytes; all of it means the same
        raise Unreadable(f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in EXTENSIONS if name in Image.OPEN]  # an older Pillow has no AVIF; MPO comes with JPEG


def _check_shape(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} px: more than {MAX_PIXELS} pixels")
    short, long = sorted(image.size)
    if long > MAX_RATIO * short:
        raise Unreadable(f"{image.width} x {image.height} px: one side is more than {MAX_RATIO} times the other")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode in ("F", "LAB"):
        raise Unreadable(f"mode {image.mode} has no fixed range of values; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, WHITE), coloured).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unreadable(f"mode {image.mode} with values {low}..{high}; save it with 8 or 16 bits per channel")
    grey = (values * 255 + 32767) // 65535
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def fit(image: Image.Image, side: int) -> Image.Image:
    """torchvision's Resize(side) and CenterCrop(side): the shorter side to `side`, antialiased bilinear."""
    from torchvision.transforms.v2 import functional  # here, because the import takes seconds

    resized = functional.resize(image, [side], interpolation=functional.InterpolationMode.BILINEAR, antialias=True)
    return functional.center_crop(resized, [side, side])


def tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
