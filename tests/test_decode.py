"""Image files become upright 8-bit RGB: every kind of file against values that are known beforehand."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _pictures import encoded, noise, pixels
from PIL import Image
from torchvision import transforms

from distillery.data._decode import EXTENSIONS, Unreadable, check, fit, picture, tensor

WHITE = [255, 255, 255]


def of(values: list[int], mode: str = "L") -> Image.Image:
    """A picture one pixel high."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def palette() -> Image.Image:
    """Pixels 0, 1, 2 of a palette red, green, blue."""
    image = of([0, 1, 2], "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_grey_repeats_its_channel() -> None:
    assert pixels(picture(encoded(of([0, 7, 200]), "PNG"))) == [[0, 7, 200]] * 3


def test_bilevel_is_black_and_white() -> None:
    assert pixels(picture(encoded(of([0, 1, 1], "1"), "PNG"))) == [[0, 255, 255]] * 3


def test_palette_gives_its_colours() -> None:
    assert pixels(picture(encoded(palette(), "PNG"))) == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_transparent_palette_entry_is_white() -> None:
    assert pixels(picture(encoded(palette(), "PNG", transparency=1))) == [[255, 255, 0], [0, 255, 0], [0, 255, 255]]


def test_palette_with_alpha_per_entry_is_blended_with_white() -> None:
    found = pixels(picture(encoded(palette(), "PNG", transparency=bytes([255, 0, 51]))))
    assert found == [[255, 255, 204], [0, 255, 204], [0, 255, 255]]  # alpha 51 of 255 is a fifth


@pytest.mark.parametrize(("mode", "values"), [("LA", [(0, 255), (0, 0), (0, 51)]), ("RGBA", None)])
def test_alpha_is_blended_with_white(mode: str, values: list[tuple[int, ...]] | None) -> None:
    image = Image.new(mode, (3, 1))
    image.putdata(values or [(0, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)])
    assert pixels(picture(encoded(image, "PNG"))) == [[0, 255, 204]] * 3


def test_transparent_colour_is_white() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (9, 9, 9)])
    assert pixels(picture(encoded(image, "PNG", transparency=(1, 2, 3)))) == [[255, 9], [255, 9], [255, 9]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    deep = Image.fromarray(np.array([[0, 255, 257, 32896, 65535]], dtype=np.uint16))
    assert pixels(picture(encoded(deep, kind))) == [[0, 1, 1, 128, 255]] * 3


def test_16_bit_grey_big_endian_and_portable_graymap() -> None:
    pgm = b"P5 3 1 65535\n" + np.array([0, 32896, 65535], dtype=">u2").tobytes()
    assert pixels(picture(pgm)) == [[0, 128, 255]] * 3
    scaled = b"P5 2 1 1023\n" + np.array([0, 1023], dtype=">u2").tobytes()
    assert pixels(picture(scaled)) == [[0, 255]] * 3


def test_16_bit_grey_with_a_transparent_value() -> None:
    deep = Image.fromarray(np.array([[0, 514, 65535]], dtype=np.uint16))
    assert pixels(picture(encoded(deep, "PNG", transparency=514))) == [[0, 255, 255]] * 3


def test_cmyk_as_stored() -> None:
    image = Image.new("CMYK", (4, 1))
    image.putdata([(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)])
    assert pixels(picture(encoded(image, "TIFF"))) == [[0, 255, 255, 0], [255, 0, 255, 0], [255, 255, 0, 0]]


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert pixels(picture(data))[0][0] <= 2
    assert min(pixels(picture(data))[1] + pixels(picture(data))[2]) >= 253


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 250  # bright top left quarter
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    tags = Image.Exif()
    tags[0x0112] = orientation
    found = np.asarray(picture(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=tags))).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() < 40
    assert check(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=tags)) == EXTENSIONS[kind]


def test_animation_gives_its_first_frame() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert pixels(picture(data)) == [[255] * 16, [0] * 16, [0] * 16]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image of a known format"),
        (b"<html>not found</html>", "no image of a known format"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F has no fixed range"),
        (encoded(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), "TIFF"), "values 70000..70000"),
        (encoded(Image.new("L", (900, 2)), "PNG"), "one side is more than 100 times the other"),
        (encoded(noise(0), "PNG")[:300], "truncated"),
        (encoded(noise(0, 64, 64), "JPEG")[:-600], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ],
)
@pytest.mark.parametrize("read", [picture, check])
def test_what_cannot_be_read_says_why(data: bytes, reason: str, read: Callable[[bytes], object]) -> None:
    with pytest.raises(Unreadable, match=reason):
        read(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks about broken tags
def test_damaged_bytes_raise_nothing_else(kind: str) -> None:
    sound, rng = encoded(noise(3, 24, 24), kind), np.random.default_rng(7)
    for _ in range(60):
        data = bytearray(sound)
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(0, 256)
        try:
            assert picture(bytes(data)).mode == "RGB"
            check(bytes(data))
        except Unreadable as error:
            assert str(error)


def test_check_tells_what_a_file_really_is() -> None:
    assert check(encoded(noise(0), "PNG")) == "png"
    assert check(encoded(noise(0), "JPEG")) == "jpg"
    assert check(encoded(noise(0), "MPO", save_all=True, append_images=[noise(1)])) == "jpg"


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (40, 40), (7, 90), (200, 130)])
@pytest.mark.parametrize("side", [16, 33, 64])
def test_fit_is_resize_and_centre_crop(size: tuple[int, int], side: int) -> None:
    image = noise(5, *size)
    wanted = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    assert torch.equal(tensor(fit(image, side)), wanted(image))


def test_tensor_is_channels_rows_columns() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (10, 20, 30))
    assert tensor(image)[:, 1, 2].tolist() == [10, 20, 30]
    assert tensor(image).shape == (3, 2, 3)
    assert tensor(Image.open(io.BytesIO(encoded(image, "PNG")))).is_contiguous()
