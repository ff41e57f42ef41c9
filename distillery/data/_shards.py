"""Few large files out of many images: safetensors for small tensors, tar (WebDataset layout) for photos.

The same images give the same bytes: nothing here knows a clock, a user or a host.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from distillery.files import replacing, sha256_of, write_atomic

PHOTO_SHARD = 256 * 2**20  # bytes
PIXEL_SHARD = 128 * 2**20  # bytes; held in memory twice while it is written
BLOCK = 4 * 2**20  # bytes of a photo shard that are fetched and verified at once
HEADER = 512  # bytes of a tar header in ustar format with a short name
LISTS = ("offsets", "sizes")  # long lists of a record; they travel as tensors in a checkpoint
Record = dict[str, Any]  # one shard in data.json: file, images, bytes, sha256 and for photos offsets, sizes
Seal = Callable[[Path, Record], None]


class PixelWriter:
    """Writes `SPLIT-00000.safetensors`...: `images` uint8 [n, 3, S, S] and `labels` int64 [n]."""

    def __init__(self, folder: Path, split: str, side: int, seal: Seal, done: list[Record]) -> None:
        self._folder, self._split, self._seal = folder, split, seal
        self._shard = len(done)
        room = max(1, PIXEL_SHARD // (3 * side * side))
        self._images = torch.empty(room, 3, side, side, dtype=torch.uint8)
        self._labels = torch.empty(room, dtype=torch.int64)
        self._filled = 0

    def add(self, label: int, images_u8: Tensor) -> None:
        """Append images [n, 3, S, S] of one class."""
        while len(images_u8):
            if self._filled == len(self._images):  # before adding, so that a checkpoint names the next item exactly
                self._close()
            n = min(len(images_u8), len(self._images) - self._filled)
            part = slice(self._filled, self._filled + n)
            self._images[part], self._labels[part] = images_u8[:n], label
            self._filled += n
            images_u8 = images_u8[n:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self._close()

    def _close(self) -> None:
        if not self._filled:
            return
        path = self._folder / f"{self._split}-{self._shard:05d}.safetensors"
        count = self._filled
        write_atomic(path, save({"images": self._images[:count], "labels": self._labels[:count]}))
        self._filled, self._shard = 0, self._shard + 1
        self._seal(path, _record(path, count))


class PhotoWriter:
    """Writes `SPLIT-00000.tar`...: `SPLIT-KEY.jpg` (the original bytes) and `SPLIT-KEY.cls` (the label)."""

    def __init__(self, folder: Path, split: str, seal: Seal, done: list[Record]) -> None:
        self._folder, self._split, self._seal = folder, split, seal
        self._shard, self._key = len(done), sum(record["images"] for record in done)
        self._tar: tarfile.TarFile | None = None
        self._open = ExitStack()  # the shard's file; it appears under its name when it is whole
        self._offsets: list[int] = []
        self._sizes: list[int] = []

    def add(self, label: int, photo: tuple[bytes, str]) -> None:
        """Append one image file: its bytes and extension."""
        data, extension = photo
        if self._tar is not None and self._tar.offset + len(data) > PHOTO_SHARD:
            self._close()
        if self._tar is None:
            file = self._open.enter_context(replacing(self._path()))
            self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        key = f"{self._split}-{self._key:08d}"
        self._offsets.append(self._tar.offset + HEADER)
        self._sizes.append(len(data))
        _append(self._tar, f"{key}.{extension}", data)
        _append(self._tar, f"{key}.cls", str(label).encode())
        self._key += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self._close()
        else:
            self._open.__exit__(*failure)

    def _close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._open.close()
        path = self._path()
        record = _record(path, len(self._sizes)) | {"offsets": self._offsets, "sizes": self._sizes}
        self._tar, self._offsets, self._sizes, self._shard = None, [], [], self._shard + 1
        self._seal(path, record)

    def _path(self) -> Path:
        return self._folder / f"{self._split}-{self._shard:05d}.tar"


def cut(offsets: list[int], sizes: list[int], block: int) -> list[tuple[int, int]]:
    """Blocks of a shard, at most `block` bytes each or one larger image: first image and end of each."""
    found, first = [], 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or offsets[i] + sizes[i] - offsets[first] > block:
            found.append((first, i))
            first = i
    return found


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, no names
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _record(path: Path, images: int) -> Record:
    return {"file": path.name, "images": images, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
