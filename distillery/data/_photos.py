"""Photos of one split: original bytes from tar shards by offset, decoded once into the cache or each time anew."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Generator, Iterable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import PIL
import torch
from torch import Tensor

from distillery.data import _decode, limits
from distillery.data._cache import Cache, touch
from distillery.data._parallel import cores, ordered
from distillery.data._shards import BLOCK, cut
from distillery.data.images import REACH, WHOLE, Images, Lazy
from distillery.errors import CorruptArtifact, StoreError
from distillery.files import cache_root, disk

if TYPE_CHECKING:
    from distillery.store import Store
    from distillery.track import Track

FLUSH = 64  # photos between two progress reports
READERS = 16  # threads that hide the latency of a store


class PhotoSplit:
    """One split of a photo set; bytes are read at random, decoded pixels are kept in the cache where they fit."""

    def __init__(self, folder: Path, store: str, split: str, facts: dict[str, Any], side: int, track: Track) -> None:
        self.counts: list[int] = facts["counts"]
        self._folder, self._split, self._side, self._track = folder, split, side, track
        self._shards: list[dict[str, Any]] = facts["shards"]
        self._ends = list(accumulate(record["images"] for record in self._shards))
        self._starts = [0, *accumulate(self.counts)]
        self._source = _Published(store, track) if any("key" in record for record in self._shards) else None

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N], sorted."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    @cached_property
    def runs(self) -> list[int]:
        """Images of each block, in file order."""
        return [end - start for record in self._shards for start, end in _blocks(record)]

    def originals(self, cls: int, indices: list[int]) -> list[Tensor]:
        """Whole photos of a class, uint8 [3, h, w] each, at their own sizes."""
        places = [self._starts[cls] + i for i in indices]
        return list(ordered(lambda place: _decode.tensor(self._picture(place)), places, self._readers))

    def images(self) -> Images:
        """As `pixels` where they fit, else decoded when they are indexed."""
        if limits.is_held(self._shape.numel()):
            return self.pixels()[0]
        return Lazy(self._cropped, range(self._shape[0]), self._side)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """images_u8 [N, 3, R, R] (a view of the cache file) and labels [N]."""
        while True:
            path = self._decoded()
            try:
                flat = torch.from_file(str(path), shared=False, size=self._shape.numel(), dtype=torch.uint8)
                return flat.view(self._shape), self.labels
            except RuntimeError:
                if path.exists():
                    raise  # else another process needed the room

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self._ends[-1] if self._ends else 0, 3, self._side, self._side))

    @property
    def _readers(self) -> int:
        return max(READERS, cores()) if self._source else cores()

    def _decoded(self) -> Path:
        """The cache file with every photo decoded and cropped; written once, continued after a kill."""
        # Another Pillow may bring another JPEG decoder, whose pixels may differ in the last bit.
        parts = [PIL.__version__, *(record["sha256"] for record in self._shards)]
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]
        path = cache_root() / "decoded" / f"{key}-{self._split}-{self._side}.u8"
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):  # cells of one machine decode once, not each
                if path.exists():
                    touch(path, path.stat().st_mtime_ns)
                else:
                    self._decode_to(path.with_suffix(".part"))
                    Cache().finish(path.with_suffix(".part"), path)
        return path

    def _decode_to(self, part: Path) -> None:
        each, count, cache = 3 * self._side * self._side, self._shape[0], Cache()
        done = part.stat().st_size // each if part.exists() else 0
        self._check_space(part, count * each, (count - done) * each)
        with part.open("ab") as file:
            file.truncate(done * each)
            room = 0
            for photo in self._cropped(range(done, count)):
                if not room:
                    room = min(FLUSH, count - done)
                    cache.make_room(room * each)
                room -= 1
                file.write(photo.numpy().tobytes())
                done += 1
                if done % FLUSH == 0 or done == count:
                    file.flush()
                    self._track.log(done, count, decoding=self._split)

    def _check_space(self, part: Path, whole: int, wanted: int) -> None:
        if whole > limits.cache_bytes():
            raise StoreError(
                f"decoded photos need {whole / 2**30:.1f} GiB, {limits.CACHE} allows {limits.cache_bytes() / 2**30:.1f}"
                " GiB for the whole cache; raise it"
            )
        stat = os.statvfs(part.parent)
        free = stat.f_bavail * stat.f_frsize
        if wanted > free:
            raise StoreError(
                f"decoded photos need {wanted / 2**30:.1f} GiB below {part.parent}, {free / 2**30:.1f} GiB are free; "
                "free space there, or set the environment variable DISTILLERY_CACHE to a folder on a larger disk"
            )

    def _cropped(self, places: Iterable[int]) -> Generator[Tensor]:
        """Photos [3, R, R] uint8 in the order of `places`, decoded ahead by threads."""
        ahead = max(1, limits.AHEAD // (3 * self._side * self._side))
        return ordered(
            lambda place: _decode.tensor(_decode.fit(self._picture(place), self._side)), places, self._readers, ahead
        )

    def _picture(self, place: int) -> Any:
        shard = bisect.bisect_right(self._ends, place)
        record = self._shards[shard]
        inside = place - (self._ends[shard] - record["images"])
        where, data = self._bytes(record, inside)
        try:
            return _decode.picture(data)
        except _decode.Unreadable as error:
            raise CorruptArtifact(
                f"{where}: the image at byte {record['offsets'][inside]} no longer decodes ({error}); delete the file "
                "and run again"
            ) from error

    def _bytes(self, record: dict[str, Any], inside: int) -> tuple[str, bytes]:
        """Where an image's file is, and its bytes."""
        if "key" in record and self._source:
            return self._source.image(record, inside, self._keeps)
        path = self._folder / record["file"]
        with path.open("rb") as file:
            file.seek(record["offsets"][inside])
            return str(path), file.read(record["sizes"][inside])

    @cached_property
    def _keeps(self) -> bool:
        """Whether the cache holds what one epoch looks at again and again: the set, or twice the reach of its order.

        Where it does not, most blocks would be fetched anew for each of their images.
        """
        total, count = sum(record["bytes"] for record in self._shards), self._shape[0]
        reach = 1.0 if count <= WHOLE else min(1.0, 2 * REACH / count)
        return reach * total <= limits.cache_bytes()


class _Published:
    """The store that shards were published to, behind the local cache."""

    def __init__(self, uri: str, track: Track) -> None:
        self._uri, self._track = uri, track

    @cached_property
    def _store(self) -> Store:
        from distillery.store import open_store  # only a published set needs the store

        self._track.note(f"reading photos from {self._uri}")
        return open_store(self._uri)

    @cached_property
    def _cache(self) -> Cache:
        return Cache()

    def image(self, record: dict[str, Any], inside: int, keep: bool) -> tuple[str, bytes]:
        """The URI of an image's shard and the image's bytes: out of its block, or alone where blocks are not kept."""
        key, offset, size = record["key"], record["offsets"][inside], record["sizes"][inside]
        where = f"{self._uri}/{key}"
        blocks = _blocks(record)
        number = bisect.bisect_right(blocks, (inside, record["images"])) - 1
        if len(blocks) != len(record.get("blocks", [])):  # of a version that published whole shards
            raise CorruptArtifact(
                f"{where}: its index has no hashes of the {len(blocks)} blocks; run prepare_data again"
            )
        first, last = blocks[number]
        sha256, start = record["blocks"][number], record["offsets"][first]
        nbytes = record["offsets"][last - 1] + record["sizes"][last - 1] - start
        if not keep and not self._cache.has(sha256):
            return where, self._store.read_part(key, offset, size)
        part = slice(offset - start, offset - start + size)
        try:
            return where, self._cache.read(sha256, nbytes, part, lambda: self._store.read_part(key, start, nbytes))
        except CorruptArtifact as error:
            raise CorruptArtifact(
                f"{where}, bytes {start} to {start + nbytes}: {error}; delete it and run prepare_data again"
            ) from error


def _blocks(record: dict[str, Any]) -> list[tuple[int, int]]:
    """First image and end of each block of a shard; worked out once and kept with the record."""
    if "cut" not in record:
        record["cut"] = cut(record["offsets"], record["sizes"], record.get("block", BLOCK))
    found: list[tuple[int, int]] = record["cut"]
    return found
