"""The picture on a method's page: some images of a real run, made from its artifacts.

    python -m benchmarks.pictures runs/my/3-synthetic/*   # writes docs/methods/images/NAME.png, then run tables.py

The picture carries its caption, so that nothing about it is typed by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from distillery import artifact, methods
from distillery.config import plain
from distillery.data import synthetic

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods" / "images"
ROWS, COLUMNS, SIDE, GAP = 2, 10, 64, 4  # images of a class below each other, classes, pixels
CAPTION = "Description"


def write(folder: Path) -> Path:
    """Draw the first images of the first classes of a synthetic set.

    Args:
        folder: a `synthetic` artifact.

    Returns:
        The picture: classes side by side, `ROWS` images of each.
    """
    manifest, found = artifact.read(folder, "synthetic"), synthetic.load(folder)
    method, ipc = manifest.config["method"], manifest.config["ipc"]
    classes, rows = found.labels.unique().tolist()[:COLUMNS], min(ROWS, ipc)
    step = SIDE + GAP
    grid = Image.new("RGBA", (len(classes) * step - GAP, rows * step - GAP))
    for column, cls in enumerate(classes):
        for row, index in enumerate((found.labels == cls).nonzero().flatten().tolist()[:rows]):
            grid.paste(_picture(found.images_u8[index]), (column * step, row * step))
    info = PngImagePlugin.PngInfo()
    info.add_text(CAPTION, caption(method, manifest))
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{method}.png"
    grid.quantize(128).save(path, pnginfo=info, optimize=True)
    return path


def caption(method: str, manifest: artifact.Manifest) -> str:
    """What the images are: classes, IPC, seed, and the options in which they differ from the data set's recipe."""
    dataset = _data_set(manifest.meta["classes"])
    usual = plain(methods.config_of(method, {}, dataset, manifest.config["ipc"]))
    changed = {k: v for k, v in manifest.config["options"].items() if usual.get(k) != v}
    told = "".join(f", {key} {value}" for key, value in changed.items())
    names = ", ".join(manifest.meta["classes"][:COLUMNS])
    made = f"IPC {manifest.config['ipc']}, seed {manifest.config['seed']}{told}"
    return f"{dataset}: {made}; classes from left to right: {names}"


def shown(method: str) -> str:
    """The picture as a page shows it."""
    path = FOLDER / f"{method}.png"
    if not path.exists():
        return "No picture yet."
    with Image.open(path) as picture:
        said = picture.info[CAPTION]
    return f"![Synthetic images of {method}](images/{path.name})\n\nFrom a run on {said}."


def _picture(image_u8: torch.Tensor) -> Image.Image:
    picture = Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy())
    enlarged = picture.width <= SIDE
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _data_set(classes: list[str]) -> str:
    from distillery.data import DATASETS

    known = (name for name, info in DATASETS.items() if list(info.classes) == classes)
    return next(known, "a folder of pictures")


if __name__ == "__main__":
    for place in sys.argv[1:]:
        print(write(Path(place)))
