"""How the images of an exported set lie on the disk: one small class per format, each writes and reads back.

Every format keeps pixels as they are (uint8 arrays or PNG) and the order of the images; class names become folder names
only where they are harmless, see `folder_names`.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distillery.errors import UserError, choices, nearest
from distillery.export import views
from distillery.files import disk, write_atomic

SHARD = 10_000  # samples in a tar of the webdataset format
SPLIT = "train"
Soft = np.ndarray[Any, Any] | None  # [N, C] logits


@dataclass(frozen=True)
class Format:
    """A layout of images.

    Attributes:
        what: one line for people.
        write: (folder, images_u8 [N, 3, S, S], labels [N], soft logits, class names) -> files in the folder.
        read: (folder, labels [N], class names) -> images_u8 [N, 3, S, S].
        load: the three lines that load it without Distillery, as Python source.
    """

    what: str
    write: Callable[[Path, Tensor, Tensor, Soft, Sequence[str]], None]
    read: Callable[[Path, Tensor, Sequence[str]], Tensor]
    load: str


def find(name: str) -> Format:
    """A format by its name.

    Raises:
        UserError: no such format.
    """
    if name not in FORMATS:
        raise UserError(f"format {name!r} is unknown{nearest(name, FORMATS)}; known: {choices(FORMATS)}")
    return FORMATS[name]


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder for each class, whose alphabetical order is the order of the classes.

    Class names themselves where they are plain file names in that order; else numbered, with everything unusual
    replaced: a class called `../x` stays inside the export.
    """
    plain = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_ .+-]{0,99}", name) for name in classes)
    if plain and sorted(classes) == list(classes) and len({name.lower() for name in classes}) == len(classes):
        return list(classes)
    wide = len(str(len(classes) - 1))
    return [f"{i:0{wide}d}_{re.sub('[^A-Za-z0-9_-]+', '-', name)[:60]}" for i, name in enumerate(classes)]


def _arrays(folder: Path, images: Tensor, labels: Tensor, soft: Soft, classes: Sequence[str]) -> None:
    views.write(folder / "images.npy", images.numpy())


def _read_arrays(folder: Path, labels: Tensor, classes: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.load(folder / "images.npy"))


def _npz(folder: Path, images: Tensor, labels: Tensor, soft: Soft, classes: Sequence[str]) -> None:
    data = io.BytesIO()
    named = {"images": images.numpy(), "labels": labels.numpy(), "classes": np.array(list(classes))}
    np.savez_compressed(data, **named, **({} if soft is None else {"soft": soft}))  # type: ignore[arg-type]
    write_atomic(folder / "set.npz", data.getvalue())


def _read_npz(folder: Path, labels: Tensor, classes: Sequence[str]) -> Tensor:
    with np.load(folder / "set.npz") as found:
        return torch.from_numpy(found["images"])


def _imagefolder(folder: Path, images: Tensor, labels: Tensor, soft: Soft, classes: Sequence[str]) -> None:
    for path, image in zip(_class_paths(folder, labels, classes), images, strict=True):
        _write_new(path, png(image))


def _read_imagefolder(folder: Path, labels: Tensor, classes: Sequence[str]) -> Tensor:
    return torch.stack([_pixels(path.read_bytes()) for path in _class_paths(folder, labels, classes)])


def _class_paths(folder: Path, labels: Tensor, classes: Sequence[str]) -> Iterator[Path]:
    names = folder_names(classes)
    for place, label in enumerate(labels.tolist()):
        yield folder / SPLIT / names[label] / f"{place:06d}.png"


def _huggingface(folder: Path, images: Tensor, labels: Tensor, soft: Soft, classes: Sequence[str]) -> None:
    rows = []
    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        _write_new(folder / SPLIT / f"{place:06d}.png", png(image))
        row = {"file_name": f"{place:06d}.png", "label": label, "class": classes[label]}
        rows.append(json.dumps(row | ({} if soft is None else {"soft_label": soft[place].astype(float).tolist()})))
    _write_new(folder / SPLIT / "metadata.jsonl", ("\n".join(rows) + "\n").encode())


def _read_huggingface(folder: Path, labels: Tensor, classes: Sequence[str]) -> Tensor:
    paths = [folder / SPLIT / f"{place:06d}.png" for place in range(len(labels))]
    return torch.stack([_pixels(path.read_bytes()) for path in paths])


def _webdataset(folder: Path, images: Tensor, labels: Tensor, soft: Soft, classes: Sequence[str]) -> None:
    for shard, path in enumerate(_shards(folder, len(labels))):
        with disk(path), tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(shard * SHARD, min(len(labels), (shard + 1) * SHARD)):
                _add(tar, f"{place:06d}.png", png(images[place]))
                _add(tar, f"{place:06d}.cls", str(int(labels[place])).encode())
                if soft is not None:
                    data = io.BytesIO()
                    np.save(data, soft[place])
                    _add(tar, f"{place:06d}.soft.npy", data.getvalue())


def _read_webdataset(folder: Path, labels: Tensor, classes: Sequence[str]) -> Tensor:
    found = []
    for path in _shards(folder, len(labels)):
        with tarfile.open(path) as tar:
            found += [_pixels(_member(tar, item)) for item in tar if item.name.endswith(".png")]
    return torch.stack(found)


def _shards(folder: Path, images: int) -> list[Path]:
    return [folder / f"{SPLIT}-{shard:06d}.tar" for shard in range(-(-images // SHARD))]


def _member(tar: tarfile.TarFile, item: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(item)
    return file.read() if file is not None else b""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    item = tarfile.TarInfo(name)  # time and owner 0: equal content, equal bytes
    item.size = len(data)
    tar.addfile(item, io.BytesIO(data))


def _write_new(path: Path, data: bytes) -> None:
    """A file of an export that nobody sees before it is whole."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def png(image: Tensor) -> bytes:
    """[3, S, S] uint8 as a PNG, which loses nothing."""
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(data, format="PNG")
    return data.getvalue()


def _pixels(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


FORMATS = {
    "folder": Format(
        "one .npy file each; what docs/train_on_it.py reads",
        _arrays,
        _read_arrays,
        "import torch\n"
        'images = torch.from_file("{at}/images.npy", size=128 + {bytes}, dtype=torch.uint8)[128:].view({shape})\n'
        'labels = torch.from_file("{at}/labels.npy", size=16 + {n}, dtype=torch.int64)[16:]',
    ),
    "imagefolder": Format(
        "PNG files in a folder per class, for torchvision",
        _imagefolder,
        _read_imagefolder,
        'from torchvision.datasets import ImageFolder\ndataset = ImageFolder("{at}/train")\nimage, label = dataset[0]',
    ),
    "webdataset": Format(
        "tar shards of PNG, class and soft label",
        _webdataset,
        _read_webdataset,
        "import webdataset\n"
        'dataset = webdataset.WebDataset("{at}/{shards}", shardshuffle=False).decode("torchrgb8")\n'
        "samples = [(sample['png'], sample['cls']{soft_field}) for sample in dataset]",
    ),
    "huggingface": Format(
        "PNG files and metadata.jsonl, for the datasets package",
        _huggingface,
        _read_huggingface,
        'from datasets import load_dataset\ndataset = load_dataset("{at}", split="train")\n'
        "image, label = dataset[0]['image'], dataset[0]['label']",
    ),
    "npz": Format(
        "one compressed file for NumPy",
        _npz,
        _read_npz,
        'import numpy\nfound = numpy.load("{at}/set.npz")\nimages, labels = found["images"], found["labels"]',
    ),
}
