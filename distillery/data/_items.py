"""What a data set consists of, as two lists of items and the function that turns an item into images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from distillery.data import DATASETS, Info, _arrays, _decode, _sources
from distillery.errors import choices

if TYPE_CHECKING:
    from distillery.config import DatasetConfig
    from distillery.track import Track

SPLITS = ("train", "val")
CHUNK = 256  # rows of an array handled at once
Item = tuple[int, Any]  # label, and a file name or row numbers


@dataclass(frozen=True)
class Items:
    """Both splits in class order.

    `work[split]` takes an item's second part and returns what the writer takes: images_u8 [n, 3, S, S] for pixels,
    (bytes, extension) for photos; or an `Unreadable` that names the file.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
    work: dict[str, Callable[[Any], Any]]
    images: int
    readers: int = 0  # threads; 0 = one per core
    are_files: bool = True


def collect(cfg: DatasetConfig, size: int, kind: str, track: Track) -> Items:
    """The items of a data set.

    Raises:
        UserError, DistilleryError: as `_arrays.load` and `_sources.load`.
    """
    return _of_arrays(cfg, size) if cfg.name in _arrays.NAMES else _of_files(cfg, size, kind, track)


def _of_arrays(cfg: DatasetConfig, size: int) -> Items:
    info, arrays = DATASETS[cfg.name], _arrays.load(cfg)
    items: dict[str, list[Item]] = {}
    for split, part in arrays.items():
        limit = (cfg.per_class if split == "train" else 0) or len(part.labels)
        rows = [(part.labels == cls).nonzero()[:, 0][:limit] for cls in range(len(info.classes))]
        items[split] = [(cls, chunk) for cls, found in enumerate(rows) for chunk in found.split(CHUNK) if len(chunk)]
    work: dict[str, Callable[[Any], Any]] = {
        split: partial(_rows, part.images_u8, size) for split, part in arrays.items()
    }
    images = sum(len(rows) for split in SPLITS for _, rows in items[split])
    return Items(info.classes, items, work, images, are_files=False)


def _rows(images_u8: Tensor, size: int, rows: Tensor) -> Tensor:
    """Images [n, 3, S, S] of some rows: as they are, zero-padded (28 px, unless 28 is asked for), or resized."""
    found = images_u8[rows]
    if found.shape[-1] == _arrays.FASHION_SIDE != size:
        found = torch.nn.functional.pad(found, (2, 2, 2, 2))
    if found.shape[-1] == size:
        return found
    pictures = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in found)
    return torch.stack([_decode.tensor(_decode.fit(picture, size)) for picture in pictures])


def _of_files(cfg: DatasetConfig, size: int, kind: str, track: Track) -> Items:
    tree = _sources.load(cfg)
    _note_oddities(tree, DATASETS[cfg.name], track)
    items: dict[str, list[Item]] = {
        "train": [(cls, name) for cls, names in enumerate(tree.train) for name in names[: cfg.per_class or None]],
        "val": [(cls, name) for cls, names in enumerate(tree.val) for name in names],
    }
    work = partial(_photo, tree.place) if kind == "photos" else partial(_small, tree.place, size)
    images = sum(map(len, items.values()))
    return Items(tree.classes, items, dict.fromkeys(SPLITS, work), images, tree.place.readers)


def _note_oddities(tree: _sources.Tree, info: Info, track: Track) -> None:
    if tree.ignored:
        endings = _sources.suffixes(tree.ignored)
        track.note(f"{len(tree.ignored)} files are no images and were left out ({endings}), first {tree.ignored[0]}")
    without = [cls for cls, names in zip(tree.classes, tree.val, strict=True) if not names]
    if without:
        track.note(f"{len(without)} classes have no validation image: {choices(without[:5])}")
    found, official = (sum(map(len, tree.train)), sum(map(len, tree.val))), (info.train, info.val)
    if info.train and found != official:
        track.note(
            f"{tree.place.uri} has {found[0]} + {found[1]} images, {info.name} has {official[0]} + {official[1]}"
        )


def _photo(place: _sources.Place, name: str) -> tuple[bytes, str] | _decode.Unreadable:
    try:
        data = place.read(name)
        return data, _decode.check(data)
    except (OSError, _decode.Unreadable) as error:
        return _decode.Unreadable(f"{place.uri}/{name}: {error}")


def _small(place: _sources.Place, size: int, name: str) -> Tensor | _decode.Unreadable:
    try:
        return _decode.tensor(_decode.fit(_decode.picture(place.read(name)), size))[None]
    except (OSError, _decode.Unreadable) as error:
        return _decode.Unreadable(f"{place.uri}/{name}: {error}")
