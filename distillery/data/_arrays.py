"""Sets that come as arrays: scikit-learn's digits and torchvision's CIFAR and Fashion-MNIST.

The official CIFAR files are pickles; torchvision's loader reads them after comparing their MD5 sums, and so do we.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distillery.data import DATASETS, Info
from distillery.data._downloads import download, downloads
from distillery.errors import UserError

if TYPE_CHECKING:
    from distillery.config import DatasetConfig

NAMES = ("digits", "cifar10", "cifar100", "fashion_mnist")
DIGITS_EVERY = 5  # every fifth image of a class is validation
FASHION_SIDE = 28


@dataclass(frozen=True)
class Arrays:
    """One split: `images_u8` [N, 3, h, w] at the source's size, `labels` int64 [N], both in file order."""

    images_u8: Tensor
    labels: Tensor


def load(cfg: DatasetConfig) -> dict[str, Arrays]:
    """Read `train` and `val`.

    Raises:
        UserError: the root is missing, has another layout, or holds a damaged file.
        DistilleryError: the download failed.
    """
    info = DATASETS[cfg.name]
    if info.name == "digits":
        return _digits()
    with _local_root(cfg, info) as root:
        return _fashion(root, cfg) if info.name == "fashion_mnist" else _cifar(root, cfg)


def _digits() -> dict[str, Arrays]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"dataset digits needs scikit-learn ({error}); run: pip install scikit-learn") from error
    bunch = load_digits()
    # The values are counts 0..16 of dark pixels in 4x4 blocks.
    grey_u8 = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rank = torch.zeros_like(labels)
    for cls in range(10):
        rank[labels == cls] = torch.arange(int((labels == cls).sum()))
    held_out = rank % DIGITS_EVERY == DIGITS_EVERY - 1
    images = _grey_to_rgb(grey_u8)
    return {name: Arrays(images[mask], labels[mask]) for name, mask in (("train", ~held_out), ("val", held_out))}


def _grey_to_rgb(grey_u8: Tensor) -> Tensor:
    return grey_u8[:, None].expand(-1, 3, -1, -1)


def _cifar(root: Path, cfg: DatasetConfig) -> dict[str, Arrays]:
    from torchvision.datasets.utils import check_integrity  # here, because the import takes seconds

    maker = _maker(cfg.name)
    if cfg.download:
        download(maker, root)
    for name, md5 in _cifar_files(maker):
        path = root / name
        if path.exists() and not check_integrity(str(path), md5):
            raise UserError(f"{path} is damaged: its MD5 is not {md5}; {_fetch_again(cfg)}")
    _check_present(root, [name for name, _ in _cifar_files(maker)], cfg)
    return {"train": _cifar_split(maker(str(root), train=True)), "val": _cifar_split(maker(str(root), train=False))}


def _cifar_split(loaded: Any) -> Arrays:
    return Arrays(torch.from_numpy(loaded.data).permute(0, 3, 1, 2), torch.tensor(loaded.targets))


def _cifar_files(maker: Any) -> list[tuple[str, str]]:
    files = [*maker.train_list, *maker.test_list, (maker.meta["filename"], maker.meta["md5"])]
    return [(f"{maker.base_folder}/{name}", md5) for name, md5 in files]


def _fashion(root: Path, cfg: DatasetConfig) -> dict[str, Arrays]:
    missing = [name for name in _fashion_files() if not (root / name).exists()]
    if cfg.download and missing:
        download(_maker(cfg.name), root)
    _check_present(root, _fashion_files(), cfg)
    return {"train": _fashion_split(root, "train", cfg), "val": _fashion_split(root, "t10k", cfg)}


def _fashion_files() -> list[str]:
    return [f"FashionMNIST/raw/{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]


def _fashion_split(root: Path, split: str, cfg: DatasetConfig) -> Arrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file  # here, because the import takes seconds

    info, raw = DATASETS["fashion_mnist"], root / "FashionMNIST" / "raw"
    count = info.train if split == "train" else info.val
    images, labels = raw / f"{split}-images-idx3-ubyte", raw / f"{split}-labels-idx1-ubyte"
    for path, wanted in ((images, 16 + count * FASHION_SIDE**2), (labels, 8 + count)):
        if path.stat().st_size != wanted:
            raise UserError(f"{path} is damaged: {path.stat().st_size} bytes instead of {wanted}; {_fetch_again(cfg)}")
    try:
        grey_u8, targets = read_image_file(str(images)), read_label_file(str(labels))
    except (ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise UserError(f"{images.parent}: no IDX file of images or labels ({error}); {_fetch_again(cfg)}") from error
    if int(targets.max()) >= len(info.classes):
        raise UserError(f"{labels} is damaged: it holds the label {int(targets.max())}; {_fetch_again(cfg)}")
    return Arrays(_grey_to_rgb(grey_u8), targets.long())


def _maker(name: str) -> Any:
    from torchvision import datasets  # here, because the import takes seconds

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}[name]


def _needed(name: str) -> list[str]:
    return _fashion_files() if name == "fashion_mnist" else [path for path, _ in _cifar_files(_maker(name))]


def _fetch_again(cfg: DatasetConfig) -> str:
    if "://" in cfg.root:
        return f"copy it to {cfg.root} again"
    return "delete it and set download: true to fetch it again"


def _check_present(root: Path, files: list[str], cfg: DatasetConfig) -> None:
    missing = [name for name in files if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"dataset {cfg.name}: {cfg.root or root} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; expected layout: {DATASETS[cfg.name].note} (ROOT is the folder above {missing[0].split('/')[0]}); "
            "set root to it, or download: true to let torchvision fetch it"
        )


@contextlib.contextmanager
def _local_root(cfg: DatasetConfig, info: Info) -> Iterator[Path]:
    """A folder in torchvision's layout: the root itself, the download cache, or a copy of the files at a URI."""
    if "://" not in cfg.root:
        root = Path(cfg.root).expanduser() if cfg.root else downloads(info.name)
        if cfg.root and not cfg.download and not root.is_dir():
            raise UserError(
                f"dataset {info.name}: root {cfg.root!r} does not exist; expected layout: {info.note}; correct root, "
                "or set download: true to let torchvision fetch it"
            )
        yield root
        return
    if cfg.download:
        raise UserError(f"dataset {info.name}: download: true needs a local root, not {cfg.root}; drop one of the two")
    from distillery.store import open_store  # only a URI needs the store

    source = open_store(cfg.root)
    with tempfile.TemporaryDirectory(prefix="distillery-") as folder:
        for name in _needed(info.name):
            if source.exists(name):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                source.fetch(name, Path(folder) / name)
        yield Path(folder)
