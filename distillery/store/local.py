"""A store in a local (or mounted) folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.files import disk, replacing, sha256_of, write_atomic
from distillery.store._base import HOLD, Entry, MissingKey, Store, check_key
from distillery.store._lease import Holder

BLOCK = 1 << 20


class LocalStore(Store):
    """Keys are paths below `root`, which comes into being with the first write."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError as error:
            raise UserError(f"{str(root)!r}: {error}; give a full path") from error
        super().__init__(self.root.as_uri())
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give a folder")

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def read(self, key: str) -> bytes:
        with self._reading(key) as path:
            return path.read_bytes()

    def read_part(self, key: str, start: int, nbytes: int) -> bytes:
        with self._reading(key) as path, path.open("rb") as file:
            file.seek(start)
            data = file.read(nbytes)
        if len(data) != nbytes:
            raise StoreError(f"{path} ends before byte {start + nbytes}; it was cut or replaced by another file")
        return data

    def write(self, key: str, data: bytes) -> None:
        write_atomic(self._path(key), data)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with disk(path):
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[Entry]:
        if prefix:
            check_key(prefix.rstrip("/"))
        start = self.root / prefix.rpartition("/")[0]  # the deepest folder that holds all of them
        return [
            Entry(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")
            for path in sorted(start.rglob("*"))
            if path.is_file() and path.suffix != ".part"
            if (key := path.relative_to(self.root).as_posix()).startswith(prefix) and not key.startswith(f"{HOLD}/")
            if (stat := path.stat())
        ]

    def sha256(self, key: str) -> str:
        with self._reading(key) as path:
            return sha256_of(path)

    def put(self, key: str, path: Path, sha256: str = "") -> None:
        with replacing(self._path(key)) as target, path.open("rb") as source:
            found = _copy(source, target)
            if sha256 and found != sha256:
                raise CorruptArtifact(f"{path} has sha256 {found[:12]}, {sha256[:12]} was expected; make it again")

    def fetch(self, key: str, path: Path, sha256: str = "") -> None:
        with self._reading(key) as there, there.open("rb") as source, replacing(path) as target:
            found = _copy(source, target)
            if sha256 and found != sha256:
                raise CorruptArtifact(f"{there} has sha256 {found[:12]}, {sha256[:12]} was expected")

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        path = self._path(f"{HOLD}/{name}")
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends
            except BlockingIOError as error:
                raise Holder.parse(path.read_bytes()).conflict(f"{self.uri} ({name})") from error
            with disk(path):
                file.truncate(0)
                file.write(Holder.me().json())
                file.flush()
            yield

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            yield path
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKey(f"there is no {path}") from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error}; check its permissions and that disk") from error


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    """Copy to the end; gives the sha256."""
    digest = hashlib.sha256()
    while block := source.read(BLOCK):
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
