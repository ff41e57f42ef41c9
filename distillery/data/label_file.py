"""The file of stored labels: one safetensors file of fp16 logits, written in place and read by slices.

    logits  fp16 [epochs, N, C], or with top-k [epochs, N, K + 1] (the last value stands for all other classes)
    places  uint8 or int32 [epochs, N, K], the classes of the first K values; only with top-k

N counts positions in an epoch's order, not images. Labels can exceed memory, so the file is memory-mapped while it is
written; a process that continues finds what an earlier one wrote.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from distillery.errors import CorruptArtifact
from distillery.files import disk

LOGITS, PLACES = "logits", "places"
Arrays = dict[str, np.memmap]


def stored_bytes(images: int, epochs: int, classes: int, top_k: int) -> int:
    """Bytes of the labels of one run (without the header of some 100 bytes)."""
    layout = _layout(images, epochs, classes, top_k if top_k < classes else 0)
    return sum(math.prod(shape) * kind.itemsize for _, kind, shape in layout.values())


def create(path: Path, images: int, epochs: int, classes: int, top_k: int) -> tuple[Arrays, bool]:
    """Map the arrays of a label file for writing.

    Returns:
        The arrays by name, and whether the file is new (else a file of this very shape was there).
    """
    layout = _layout(images, epochs, classes, top_k)
    starts, table, end = {}, {}, 0
    for key, (name, kind, shape) in layout.items():
        starts[key], end = end, end + math.prod(shape) * kind.itemsize
        table[key] = {"dtype": name, "shape": list(shape), "data_offsets": [starts[key], end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    fresh = not _is_there(path, head, len(head) + end)
    if fresh:
        with disk(path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, len(head) + end)  # a full disk under a mapping is a SIGBUS
            file.write(head)
    return {
        key: np.memmap(path, kind, "r+", offset=len(head) + starts[key], shape=shape)
        for key, (_, kind, shape) in layout.items()
    }, fresh


class Reader:
    """Slices of a finished label file.

    Raises:
        CorruptArtifact: the file is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CorruptArtifact(f"{path}: the stored labels are missing; run relabel again")
        self._file = safe_open(path, framework="pt")
        self.top_k = PLACES in list(self._file.keys())

    def read(self, name: str, epoch: int, part: slice) -> Tensor:
        """One array of one batch, [B, values]."""
        found: Tensor = self._file.get_slice(name)[epoch : epoch + 1, part]
        return found[0]


def _layout(
    images: int, epochs: int, classes: int, top_k: int
) -> dict[str, tuple[str, np.dtype[Any], tuple[int, ...]]]:
    half = np.dtype(np.float16)
    if not top_k:
        return {LOGITS: ("F16", half, (epochs, images, classes))}
    name, kind = ("U8", np.dtype(np.uint8)) if classes <= 256 else ("I32", np.dtype(np.int32))
    return {LOGITS: ("F16", half, (epochs, images, top_k + 1)), PLACES: (name, kind, (epochs, images, top_k))}


def _is_there(path: Path, head: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(head)) == head
