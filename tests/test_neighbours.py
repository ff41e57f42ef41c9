"""The real neighbours of synthetic images: the nearest of the class, copies at distance 0, the preview's layout."""

from pathlib import Path

import pytest
import torch
from _toys import toy_photos, toy_pixels
from PIL import Image

from distillery import neighbours
from distillery.data.synthetic import Synthetic
from distillery.preview import write_preview


def test_nearest_image_of_the_same_class_is_found(tmp_path: Path) -> None:
    real = toy_pixels(classes=3)
    pixels, labels = real.pixels("train")
    starts = [int((labels == cls).nonzero()[0]) for cls in range(3)]
    wanted = [[2, 5], [0, 7], [11, 3]]
    index = [starts[cls] + place for cls in range(3) for place in wanted[cls]]
    images = pixels[index].clone()
    images[1, 0, 0, 0] ^= 4  # one pixel of 192 differs by 4
    images[2] = pixels[starts[2]]  # of another class: not its neighbour
    synthetic = Synthetic(images, torch.arange(3).repeat_interleave(2))
    found = neighbours.write(synthetic, real, tmp_path)
    assert [near["image"] for near in found] == list(range(6))
    assert [near["real"] for near in found if near["image"] != 2] == [2, 5, 7, 11, 3]
    assert [near["rms"] for near in found if near["image"] != 2] == [0.0, round((16 / 192) ** 0.5, 2), 0.0, 0.0, 0.0]
    squares = (pixels[labels == 1].int() - images[2].int()).square().sum((1, 2, 3))
    assert found[2]["real"] == int(squares.argmin())
    assert found[2]["rms"] == pytest.approx((float(squares.min()) / 192) ** 0.5, abs=0.005)
    write_preview(synthetic.images_u8, synthetic.labels, tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as one, Image.open(tmp_path / "neighbours.png") as other:
        assert one.size == other.size
        assert one.crop((0, 0, 32, 32)).tobytes() == other.crop((0, 0, 32, 32)).tobytes(), "a copy looks the same"


def test_photos_are_compared_as_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toy_photos(per_class=5)
    squares = [neighbours._small(photo, real) for photo in real.read("train", 0, range(5))]  # type: ignore[arg-type]
    synthetic = Synthetic(torch.stack(squares[3:]), torch.zeros(2, dtype=torch.int64))
    found = neighbours.write(synthetic, real, tmp_path)
    assert [(near["real"], near["rms"]) for near in found] == [(3, 0.0), (4, 0.0)]
    monkeypatch.setattr(neighbours, "PHOTOS", 2)  # of five photos every third is looked at
    assert {near["real"] for near in neighbours.write(synthetic, real, tmp_path)} <= {0, 3}


def test_only_what_the_preview_shows_is_looked_up(tmp_path: Path) -> None:
    real = toy_pixels(classes=12, per_class=3)
    synthetic = Synthetic(real.pixels("train")[0][:12].repeat(12, 1, 1, 1), torch.arange(12).repeat_interleave(12))
    found = neighbours.write(synthetic, real, tmp_path)
    assert len(found) == 100
    assert found[-1]["image"] == 9 * 12 + 9
