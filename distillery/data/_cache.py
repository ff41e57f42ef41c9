"""Blocks of published shards on the local disk: fetched once, verified, and evicted when the limit asks for it.

An entry is named by the sha256 of its bytes, so equal blocks of different sets are one, and nobody's view can go stale.
Any number of processes may share the folder: an entry appears whole, one process fetches it while the others wait, and
one that vanishes between two looks is fetched again. The limit holds for decoded photos in the same cache too; at it,
what was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from distillery.data import limits
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.files import FULL, OLD_PART, cache_root, disk

LEVEL = 0.9  # of the limit, down to which one eviction goes
WRITING = 10.0  # seconds that a block's unfinished file is waited for when only such files are left to evict
STRIPES = 256  # locks for fetching: two processes seldom wait for each other's blocks


class Cache:
    """The data cache below `DISTILLERY_CACHE`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._root, self.limit = cache_root(), limits.cache_bytes()
        self._room = _Room(self._root, self.limit)
        self._trusted: dict[str, tuple[int, int, int]] = {}  # sha256 -> inode, size, mtime of a file that was verified

    def read(self, sha256: str, nbytes: int, part: slice, fetch: Callable[[], bytes]) -> bytes:
        """Some bytes of a block, which is fetched when it is not there or not intact.

        Args:
            sha256: of the whole block.
            nbytes: its length.
            part: the bytes that are wanted.
            fetch: gets the whole block from where it is published.

        Raises:
            CorruptArtifact: what `fetch` gives is not that block, or `sha256` is none.
            UserError: the block is larger than the cache may be. StoreError: the disk is full, or failed.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a path
            raise CorruptArtifact(f"{sha256!r} is no sha256 of a block")
        self._room.check(nbytes)
        path = self._path(sha256)
        found = self._kept(path, nbytes, part)
        if found is not None:
            return found
        with disk(path), self._fetching(sha256):
            found = self._kept(path, nbytes, part)
            if found is None:
                block = fetch()
                if hashlib.sha256(block).hexdigest() != sha256:
                    raise CorruptArtifact(f"has other bytes than when it was published (not sha256 {sha256[:12]})")
                self._keep(path, block)
                found = block[part]
        return found

    def has(self, sha256: str) -> bool:
        """Whether the block lies here; it may be gone at the next look."""
        return self._path(sha256).exists()

    def make_room(self, nbytes: int) -> None:
        """Evict until so many bytes can be added; see `_Room.take`."""
        self._room.take(nbytes, None)

    def finish(self, unfinished: Path, path: Path) -> None:
        """Give a whole file its name, but not while somebody counts: neither name may be there at both their looks."""
        with self._room.counting():
            unfinished.replace(path)

    def _path(self, sha256: str) -> Path:
        return self._root / "shards" / sha256[:2] / sha256

    def _kept(self, path: Path, nbytes: int, part: slice) -> bytes | None:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._trusted.get(path.name) != state:
                intact = stat.st_size == nbytes and hashlib.file_digest(file, "sha256").hexdigest() == path.name
                if not intact:
                    return None  # it stays until a good one takes its place: another thread may have just put it there
                self._trusted[path.name] = state
            touch(file.fileno(), stat.st_mtime_ns)
            return os.pread(file.fileno(), part.stop - part.start, part.start)
        return None

    def _keep(self, path: Path, block: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            self._room.take(len(block), unfinished)
            _fill(unfinished, block)
            stat = unfinished.stat()
            self.finish(unfinished, path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StoreError(
                f"the disk of {self._root} is full ({error}) before the data cache has the {self.limit} bytes of "
                f"{limits.CACHE}; lower that, free space, or set DISTILLERY_CACHE to a folder on a larger disk"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
        self._trusted[path.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    @contextlib.contextmanager
    def _fetching(self, sha256: str) -> Iterator[None]:
        locks = self._root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(
            locks / f"{int(sha256[:8], 16) % STRIPES:02x}"
        ):  # ends with the process, however it ends
            yield


class _Room:
    """What is left below the limit, counted by all processes together in the file `used`.

    Looking at every file costs time, so the count is only corrected when it says that the cache is full, and when a
    process begins; whatever ends between counting and writing makes it too high, never too low.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self._limit, self._began = root, limit, False
        self._file = root / "used"

    def take(self, nbytes: int, part: Path | None) -> None:
        """Evict until so many bytes can be added, and count them.

        Args:
            nbytes: how many.
            part: an unfinished file that gets this length at once, so that whoever corrects the count sees it.

        Raises:
            UserError: more than the limit.
        """
        self.check(nbytes)
        self._root.mkdir(parents=True, exist_ok=True)
        while not self._taken(nbytes, part):
            time.sleep(0.01)

    def _taken(self, nbytes: int, part: Path | None) -> bool:
        """Take room, or tell that there will be some when others have written their blocks."""
        with self.counting():
            used, full = self._counted(), False
            if used is None or used + nbytes > self._limit:
                used, full = self._evict(nbytes)
            if not full:
                self._file.write_text(str(used + nbytes))
                if part is not None:
                    with part.open("wb") as file:
                        file.truncate(nbytes)
        return not full

    def counting(self) -> filelock.BaseFileLock:
        """The lock under which files are counted and evicted, and get their names."""
        return filelock.FileLock(self._root / "used.lock")

    def check(self, nbytes: int) -> None:
        """Refuse what can never fit."""
        if nbytes > self._limit:
            raise UserError(
                f"{limits.CACHE} is {self._limit} bytes, and one piece of data has {nbytes}; set it to many times that"
            )

    def _counted(self) -> int | None:
        began, self._began = self._began, True
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(self._file.read_text()) if began else None
        return None

    def _evict(self, nbytes: int) -> tuple[int, bool]:
        """Bytes that are left after enough was evicted, and whether it is not enough for a moment.

        Someone is writing an unfinished file, so it stays; but who was killed never ends, so nobody waits for long,
        and photos take long to decode, so nobody waits for theirs. Rather than stop then, the cache grows too large.
        """
        files, now = sorted(_entries(self._root)), time.time_ns()
        total = sum(size for _, size, _ in files)
        if total + nbytes <= self._limit:
            return total, False
        for used, size, path in files:
            if total <= min(self._limit - nbytes, LEVEL * self._limit):
                break
            if path.suffix != ".part" or now - used > OLD_PART * 1e9:
                path.unlink(missing_ok=True)
                total -= size
        blocks = self._root / "shards"
        writing = (
            path.suffix == ".part" and now - used < WRITING * 1e9 for used, _, path in files if blocks in path.parents
        )
        return total, total + nbytes > self._limit and any(writing)


def _fill(unfinished: Path, block: bytes) -> None:
    """Write a file that already has its length, and has it all the while: somebody may count.

    Nothing is flushed to the disk: after a power cut its hash tells.
    """
    with unfinished.open("r+b") as file:
        file.write(block)


def touch(file: int | Path, mtime_ns: int) -> None:
    """Note that a file was used now: its access time is the order of eviction, also where the disk keeps none."""
    with contextlib.suppress(FileNotFoundError, PermissionError):  # of another user, on a shared volume
        os.utime(file, ns=(time.time_ns(), mtime_ns))


def _entries(root: Path) -> Iterator[tuple[int, int, Path]]:
    """Last use (ns), bytes and path of everything that counts."""
    for folder in ("shards", "decoded"):
        for path in (root / folder).rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix != ".lock" and not path.is_dir():
                    yield max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, path
