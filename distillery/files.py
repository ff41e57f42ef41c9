"""Files on a disk: written whole or not at all, hashed once, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distillery.errors import StoreError, UserError

OLD_PART = 3600.0  # seconds after which a `.part` file is a dead process's leftover
TICK = 50_000_000  # ns; file times advance in ticks, so a younger file can change without showing it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

_hashes: dict[tuple[str, int, int], str] = {}  # (path, size, mtime_ns) -> sha256
_swept: dict[str, float] = {}  # folder -> when leftovers were last looked for


def sha256_of(path: Path) -> str:
    """sha256 of a file as hex; a file unchanged since it was last asked for is not read again."""
    stat = path.stat()
    key = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
    if key in _hashes:
        return _hashes[key]
    settled = time.time_ns() - stat.st_mtime_ns > TICK
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _hashes[key] = digest
    return digest


def remember(path: Path, sha256: str) -> None:
    """Note the hash of a file whose bytes were hashed while they were written."""
    stat = path.stat()
    _hashes[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] = sha256


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn a failing file operation on `path` into an error with a remedy.

    Raises:
        UserError: not writable. StoreError: full, or anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreError(f"the disk of {path} is full ({error}); free space there or choose another place, "
                             "then start again (finished artifacts are kept)") from error  # fmt: skip
        if error.errno in FORBIDDEN:
            raise UserError(f"{path} cannot be written ({error}); choose a folder you may write to") from error
        raise StoreError(f"{path} cannot be used ({error}); check that path and its disk, then start again") from error


@contextlib.contextmanager
def replacing(path: Path, flushed: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends well; else nothing changes.

    Args:
        path: what is replaced; the file can be read, too.
        flushed: wait for the disk. A copy whose hash is checked before it is used, and that can be had again, need not.

    Raises:
        StoreError, UserError: see `disk`.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            with part.open("w+b") as file:
                yield file
                if flushed:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if flushed:
            sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a mixture.

    Raises:
        StoreError, UserError: see `disk`.
    """
    with replacing(path) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; some file systems cannot for folders, and need not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of files they were writing; once an hour, since folders can be large."""
    now = time.time()
    if now - _swept.get(str(folder), 0.0) < OLD_PART:
        return
    _swept[str(folder)] = now
    for entry in os.scandir(folder):
        if entry.name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):
                if now - entry.stat(follow_symlinks=False).st_mtime > OLD_PART:
                    os.unlink(entry.path)


def cache_root() -> Path:
    """The local cache, safe to delete at any time: the folder named by DISTILLERY_CACHE, else ~/.cache/distillery."""
    return Path(os.environ.get("DISTILLERY_CACHE") or "~/.cache/distillery").expanduser()
