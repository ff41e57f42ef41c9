"""Sets that come as image files in folders of classes: where they are, and which file belongs to which class.

A root is a local folder or a URI (`s3://bucket/prefix`, `file:///folder`); files are named relative to it.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from distillery.data import DATASETS, Info
from distillery.data._decode import SUFFIXES
from distillery.data._downloads import download, downloads
from distillery.errors import UserError, choices, nearest
from distillery.files import disk

if TYPE_CHECKING:
    from distillery.config import DatasetConfig

ANNOTATIONS = "val/val_annotations.txt"
SIDECARS = frozenset((".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".db"))  # lie beside images without being meant
# Folder names of the archives, so that the folder they were unpacked in can serve as root.
UNPACKED = {
    "imagenette": ("imagenette2-320", "imagenette2", "imagenette2-160"),
    "tiny_imagenet": ("tiny-imagenet-200",),
}
DOWNLOADED_SIZE = "320px"  # shorter side 320: enough for crops at 224 px, a quarter of the full archive
REMOTE_READERS = 16
Names = list[list[str]]  # per class, sorted


@dataclass(frozen=True)
class Place:
    """A root: its files below a folder (a class without files appears as `folder/CLASS/`), and their bytes."""

    uri: str
    names: Callable[[str], list[str]]
    read: Callable[[str], bytes]
    readers: int = 0  # threads that hide the latency of a store; 0 = one per core


@dataclass(frozen=True)
class Tree:
    """Files per class of both splits, in class order, named relative to the root."""

    classes: tuple[str, ...]
    train: Names
    val: Names
    place: Place
    ignored: tuple[str, ...] = ()


def load(cfg: DatasetConfig) -> Tree:
    """List the files of a folder set.

    Raises:
        UserError: no such root, another layout, a class without images, a class in val that train lacks.
        DistilleryError: the download failed.
    """
    info = DATASETS[cfg.name]
    place = _place(cfg, info)
    listed = {split: [n for n in place.names(split) if not _is_hidden(n)] for split in ("train", "val")}
    for split, names in listed.items():
        if not names:
            raise UserError(f"dataset {info.name}: {place.uri} has no folder {split}/; expected layout: {info.note}")
    ignored = tuple(n for names in listed.values() for n in names if _is_unknown(n))
    train = _by_class(listed["train"])
    val = _by_annotations(place, listed["val"]) if ANNOTATIONS in listed["val"] else _by_class(listed["val"])
    _check_classes(info, place, train, val)
    classes = tuple(sorted(train))
    tree = Tree(classes, [train[c] for c in classes], [val.get(c, []) for c in classes], place, ignored)
    _check_filled(info, tree)
    return tree


@functools.cache
def class_names(cfg: DatasetConfig) -> tuple[str, ...]:
    """The classes of a folder set, which is listed once per process.

    Raises:
        UserError: as `load`.
    """
    return load(cfg).classes


def _by_class(names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        _, cls, *below = name.split("/")
        if below:
            files = found.setdefault(cls, [])
            if _is_image(name):
                files.append(name)
    return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _is_image(name: str) -> bool:
    return not name.endswith("/") and PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_unknown(name: str) -> bool:
    return not name.endswith("/") and PurePosixPath(name).suffix.lower() not in SUFFIXES | SIDECARS


def _by_annotations(place: Place, names: list[str]) -> dict[str, list[str]]:
    """Tiny-ImageNet's validation split: all images in one folder, classes in a tab-separated file."""
    present, found = set(names), dict[str, list[str]]()
    for number, line in enumerate(place.read(ANNOTATIONS).decode("utf-8", "replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{place.uri}/{ANNOTATIONS} line {number}: expected FILE<tab>WNID..., found {line!r}")
        name = f"val/images/{fields[0]}"
        if name not in present:
            raise UserError(f"{place.uri}/{ANNOTATIONS} line {number} names {fields[0]}, but {name} does not exist")
        found.setdefault(fields[1], []).append(name)
    return {cls: sorted(files) for cls, files in found.items()}


def _check_classes(info: Info, place: Place, train: dict[str, list[str]], val: dict[str, list[str]]) -> None:
    if len(train) < 2:
        raise UserError(
            f"dataset {info.name}: {place.uri}/train has {len(train)} class folders, at least 2 are needed; "
            f"expected layout: {info.note}"
        )
    if info.name == "tiny_imagenet" and set(val) == {"images"}:
        raise UserError(f"dataset {info.name}: {place.uri}/{ANNOTATIONS} does not exist; expected layout: {info.note}")
    for cls in sorted(set(val) - set(train)):
        raise UserError(
            f"dataset {info.name}: {place.uri}/val has the class {cls!r}, which train lacks{nearest(cls, train)}; "
            f"rename or remove val/{cls}, or add images to train/{cls}"
        )
    odd = sorted(set(train) ^ set(info.classes)) if info.classes else []
    if odd:
        raise UserError(
            f"dataset {info.name}: {place.uri}/train has {len(train)} classes, {info.name} has {len(info.classes)}; "
            f"not in both: {choices(odd[:5])}{' ...' if len(odd) > 5 else ''}; use name: imagefolder for other data"
        )


def _check_filled(info: Info, tree: Tree) -> None:
    for cls, files in zip(tree.classes, tree.train, strict=True):
        if not files:
            raise UserError(
                f"dataset {info.name}: {tree.place.uri}/train/{cls} is an empty class: it has no file that ends in one "
                f"of {choices(sorted(SUFFIXES))}; add images or remove the folder"
            )
    if not any(tree.val):
        raise UserError(f"dataset {info.name}: {tree.place.uri}/val has no image; expected layout: {info.note}")


def _place(cfg: DatasetConfig, info: Info) -> Place:
    if not cfg.root and not _can_download(info):
        raise UserError(f"dataset {info.name}: root is {cfg.root!r}; set it to a folder or URI with {info.note}")
    if cfg.download and not _can_download(info):
        raise UserError(
            f"dataset {info.name}: download: {cfg.download} is not possible, torchvision has no downloader for it; "
            f"fetch it yourself and set root to the folder with {info.note}"
        )
    if "://" not in cfg.root:
        return _local(cfg, info)
    if cfg.download:
        raise UserError(f"dataset {info.name}: download: true needs a local root, not {cfg.root}; drop one of the two")
    return _remote(cfg.root.rstrip("/"), info)


def _can_download(info: Info) -> bool:
    return info.name == "imagenette"


def _local(cfg: DatasetConfig, info: Info) -> Place:
    root = Path(cfg.root).expanduser() if cfg.root else downloads(info.name)
    if cfg.download and _unpacked(root, info) is None:
        _download_imagenette(root)
    found = _unpacked(root, info)
    if found is None:
        state = "has no folder train/" if root.is_dir() else "does not exist"
        fetch = ", or set download: true to let torchvision fetch it" if _can_download(info) else ""
        raise UserError(
            f"dataset {info.name}: root {cfg.root or str(root)!r} {state}; expected layout: {info.note}; "
            f"correct root{fetch}"
        )
    return Place(str(found), lambda folder: _walk(found, folder), lambda name: (found / name).read_bytes())


def _unpacked(root: Path, info: Info) -> Path | None:
    candidates = [root, *(root / name for name in UNPACKED.get(info.name, ()))]
    return next((path for path in candidates if (path / "train").is_dir()), None)


def _walk(root: Path, folder: str) -> list[str]:
    """Files below `root/folder`, and `folder/CLASS/` for each class folder; links are followed, as torchvision does."""
    top = root / folder
    names = [f"{folder}/{entry.name}/" for entry in top.iterdir() if entry.is_dir()] if top.is_dir() else []
    for path, _, files in os.walk(top, followlinks=True):
        inside = Path(path).relative_to(root).as_posix()
        names += [f"{inside}/{file}" for file in files]
    return names


def _remote(uri: str, info: Info) -> Place:
    from distillery.store import open_store  # only a URI needs the store

    for name in ("", *UNPACKED.get(info.name, ())):
        source = open_store(f"{uri}/{name}".rstrip("/"))
        names = {folder: [entry.key for entry in source.list(f"{folder}/")] for folder in ("train", "val")}
        if names["train"]:
            return Place(source.uri, names.__getitem__, source.read, REMOTE_READERS)
    raise UserError(f"dataset {info.name}: nothing at {uri}/train/; expected layout: {info.note}; correct root")


def _download_imagenette(root: Path) -> None:
    name, unfinished = UNPACKED["imagenette"][0], root / "unfinished"
    shutil.rmtree(unfinished / name, ignore_errors=True)  # of a killed attempt; to torchvision it looks complete
    from torchvision import datasets  # here, because the import takes seconds

    download(datasets.Imagenette, unfinished, size=DOWNLOADED_SIZE)
    with disk(root):
        (unfinished / name).replace(root / name)
        shutil.rmtree(unfinished)


def suffixes(names: tuple[str, ...]) -> str:
    """The file endings among some names, most frequent first, for a message."""
    found = Counter(PurePosixPath(name).suffix or "(none)" for name in names)
    return choices(ending for ending, _ in found.most_common(5))
