"""Small image files, folders of them, and the data step on them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distillery.config import DatasetConfig
from distillery.data.prepare import prepare
from distillery.data.real import Real, load
from distillery.track import Track


def noise(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A reproducible RGB picture that does not compress."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file of a kind such as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder(root: Path, classes: dict[str, int], val: int = 1, side: tuple[int, int] = (20, 16)) -> Path:
    """`train/CLASS/i.png` as many as given per class, and `val/CLASS/i.png`; every image is another one."""
    for place, (name, count) in enumerate(sorted(classes.items())):
        for split, images in (("train", count), ("val", val)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(images):
                picture = noise(1000 * place + 10 * i + (split == "val"), *side)
                picture.save(root / split / name / f"{i}.png")
    return root


def pixels(image: Image.Image) -> list[list[int]]:
    """[channel][pixel] of a small picture, row by row."""
    return np.asarray(image.convert("RGB")).reshape(-1, 3).T.tolist()


def config(name: str, root: str | Path = "", **options: Any) -> DatasetConfig:
    """A data set as an experiment states it."""
    return DatasetConfig(name=name, root=str(root), **options)


def made(out: Path, cfg: DatasetConfig, track: Track | None = None) -> Real:
    """Prepared and opened again."""
    prepare(cfg, out, track or Track.quiet())
    return load(out)


def contents(out: Path) -> dict[str, bytes]:
    """File name -> bytes of an artifact."""
    return {path.name: path.read_bytes() for path in out.iterdir()}
