"""Photos of one split: original bytes from tar shards by offset, and the local cache of decoded ones."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import PIL
import torch
from torch import Tensor

from distillery.data import _decode
from distillery.data._parallel import ordered
from distillery.errors import CorruptArtifact, StoreError
from distillery.files import cache_root, disk, sha256_of

if TYPE_CHECKING:
    from distillery.track import Track

FLUSH = 64  # photos between two progress reports


class PhotoSplit:
    """One split of a photo set; bytes are read at random, decoded pixels come from a local cache."""

    def __init__(self, folder: Path, store: str, split: str, facts: dict[str, Any], side: int, track: Track) -> None:
        self.counts: list[int] = facts["counts"]
        self._folder, self._store, self._split, self._side, self._track = folder, store, split, side, track
        self._shards: list[dict[str, Any]] = facts["shards"]
        self._ends = list(accumulate(record["images"] for record in self._shards))
        self._starts = [0, *accumulate(self.counts)]
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N], sorted."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    def originals(self, cls: int, indices: list[int]) -> list[Tensor]:
        """Whole photos of a class, uint8 [3, h, w] each, at their own sizes."""
        places = [self._starts[cls] + i for i in indices]
        return list(ordered(lambda place: _decode.tensor(self._picture(place)), places))

    def pixels(self) -> tuple[Tensor, Tensor]:
        """images_u8 [N, 3, R, R] (a view of the cache file) and labels [N]."""
        shape = (self._ends[-1], 3, self._side, self._side)
        path = self._decoded(shape)
        flat = torch.from_file(str(path), shared=False, size=torch.Size(shape).numel(), dtype=torch.uint8)
        return flat.view(shape), self.labels

    def _decoded(self, shape: tuple[int, ...]) -> Path:
        """The cache file with every photo decoded and cropped; written once, continued after a kill."""
        # Another Pillow may bring another JPEG decoder, whose pixels may differ in the last bit.
        parts = [PIL.__version__, *(record["sha256"] for record in self._shards)]
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]
        path = cache_root() / "decoded" / f"{key}-{self._split}-{self._side}.u8"
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):  # cells of one machine decode once, not each
                if not path.exists():
                    self._decode_to(path.with_suffix(".part"), shape[0])
                    path.with_suffix(".part").replace(path)
        return path

    def _decode_to(self, part: Path, count: int) -> None:
        each = 3 * self._side * self._side
        done = part.stat().st_size // each if part.exists() else 0
        self._check_space(part, (count - done) * each)
        with part.open("ab") as file:
            file.truncate(done * each)
            for photo in ordered(self._cropped, range(done, count)):
                file.write(photo)
                done += 1
                if done % FLUSH == 0 or done == count:
                    file.flush()
                    self._track.log(done, count, decoding=self._split)

    def _check_space(self, part: Path, wanted: int) -> None:
        stat = os.statvfs(part.parent)
        free = stat.f_bavail * stat.f_frsize
        if wanted > free:
            raise StoreError(
                f"decoded photos need {wanted / 2**30:.1f} GiB below {part.parent}, {free / 2**30:.1f} GiB are free; "
                "free space there, or set the environment variable DISTILLERY_CACHE to a folder on a larger disk"
            )

    def _cropped(self, place: int) -> bytes:
        return _decode.tensor(_decode.fit(self._picture(place), self._side)).numpy().tobytes()

    def _picture(self, place: int) -> Any:
        shard = bisect.bisect_right(self._ends, place)
        record = self._shards[shard]
        inside = place - (self._ends[shard] - record["images"])
        offset, size = record["offsets"][inside], record["sizes"][inside]
        path = self._open(shard)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return _decode.picture(file.read(size))
        except _decode.Unreadable as error:
            raise CorruptArtifact(
                f"{path}: the image at byte {offset} no longer decodes ({error}); delete the file and run again"
            ) from error

    def _open(self, shard: int) -> Path:
        """The shard's file: inside the artifact, or fetched from the store and checked at its first use."""
        if shard not in self._paths:
            with self._lock:  # the first reader of a shard fetches it, the others wait
                if shard not in self._paths:
                    self._paths[shard] = self._fetched(self._shards[shard])
        return self._paths[shard]

    def _fetched(self, record: dict[str, Any]) -> Path:
        if "key" not in record:
            return self._folder / record["file"]
        from distillery.store import open_store  # only a published set needs the store

        path = cache_root() / "shards" / record["key"]
        if not path.exists() or sha256_of(path) != record["sha256"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._track.note(f"fetching {self._store}/{record['key']}")
            open_store(self._store).fetch(record["key"], path, record["sha256"])
        return path
