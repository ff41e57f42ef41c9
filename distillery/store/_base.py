"""What a store is, and how an artifact travels to and from any of them.

A store keeps bytes under keys like `cell1/synthetic/images.safetensors`. Each key is written whole or not at all;
an artifact counts once its manifest is there, and that is written last.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distillery import artifact
from distillery.artifact import MANIFEST, FileFacts, Manifest
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.files import write_atomic
from distillery.store._crew import together

THREADS = 8  # files in flight
HOLD = ".hold"  # the folder of locks; `list` does not show it

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), after each file


class MissingKey(StoreError):
    """There is nothing under this key."""


@dataclass(frozen=True)
class Entry:
    """One object of a store."""

    key: str
    bytes: int
    etag: str  # changes with the content


class Store(ABC):
    """A folder or a bucket, seen alike. Safe to use from several threads, not across a fork.

    Every method raises StoreError when the store fails (after retrying what can pass), and UserError for wrong
    credentials, a missing bucket or a place that may not be written.
    """

    uri: str  # without a slash at the end

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is something under `key`."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises MissingKey."""

    @abstractmethod
    def read_part(self, key: str, start: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `start` of what is under `key`. Raises MissingKey; StoreError when it is shorter."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, atomically."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; it need not exist."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Everything whose key starts with `prefix` (as a string), sorted by key."""

    @abstractmethod
    def sha256(self, key: str) -> str:
        """sha256 of what is under `key` as far as the store knows it; empty when it does not."""

    @abstractmethod
    def put(self, key: str, path: Path, sha256: str = "") -> None:
        """Put a file under `key`, atomically and streamed.

        Raises:
            CorruptArtifact: its hash is not `sha256`, or it changes meanwhile; what is under `key` stays then.
        """

    @abstractmethod
    def fetch(self, key: str, path: Path, sha256: str = "") -> None:
        """Write what is under `key` to the file `path`, atomically and streamed.

        Raises:
            MissingKey: nothing there. CorruptArtifact: its hash is not `sha256`; `path` is not touched then.
        """

    @abstractmethod
    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold an exclusive lock while the block runs; it ends with the process, however that ends.

        Raises:
            UserError: another process holds it; the message says which, where and since when.
        """

    def push(self, folder: Path, prefix: str, progress: Progress | None = None) -> None:
        """Copy a finished artifact into the store; files that are there already are not sent again.

        Raises:
            CorruptArtifact: the artifact in `folder` is not finished or not intact.
        """
        manifest = artifact.read(folder, verify=False)  # each file is hashed while it is sent
        raw = (folder / MANIFEST).read_bytes()
        for name, facts in manifest.files.items():
            if fault := artifact.find_fault(folder / name, facts, hashed=False):
                raise _damaged(folder, name, fault)
        there = {entry.key: entry.bytes for entry in self.list(join(prefix, ""))}
        last = join(prefix, MANIFEST)
        vouched = last in there and self.read(last) == raw
        if last in there and not vouched:
            artifact.read(folder)  # a whole artifact is not given up for a damaged one
            self.delete(last)  # it must not vouch for a mixture of its files and the new ones

        def send(name: str, facts: FileFacts) -> None:
            key = join(prefix, name)
            if there.get(key) != facts["bytes"] or self.sha256(key) != facts["sha256"]:
                self.put(key, folder / name, facts["sha256"])
            elif fault := artifact.find_fault(folder / name, facts):
                raise _damaged(folder, name, fault)

        self._each_file(send, manifest.files, progress)
        if not vouched:
            self.write(last, raw)

    def pull(self, prefix: str, folder: Path, progress: Progress | None = None) -> Manifest:
        """Copy an artifact from the store into `folder`; files that are right already are not fetched again.

        Raises:
            CorruptArtifact: no manifest there, an unreadable one, or a file that is missing or has other bytes.
        """
        where = f"{self.uri}/{join(prefix, MANIFEST)}"
        try:
            raw = self.read(join(prefix, MANIFEST))
        except MissingKey as error:
            raise CorruptArtifact(f"there is no {where}: that artifact is not finished, or not there at all") from error
        manifest = artifact.parse(raw, where)
        wrong = {name: facts for name, facts in manifest.files.items() if artifact.find_fault(folder / name, facts)}
        if wrong:
            artifact.begin(folder)

        def get(name: str, facts: FileFacts) -> None:
            try:
                self.fetch(join(prefix, name), folder / name, facts["sha256"])
            except MissingKey as error:
                raise CorruptArtifact(f"{where} lists {name!r}, which is missing there") from error

        self._each_file(get, wrong, progress)
        write_atomic(folder / MANIFEST, raw)
        return manifest

    def _each_file(
        self, work: Callable[[str, FileFacts], None], files: Mapping[str, FileFacts], progress: Progress | None
    ) -> None:
        """Run `work` on each file, several at a time; the first failure (or Ctrl-C) abandons the rest."""
        done, total = 0, sum(facts["bytes"] for facts in files.values())
        with ThreadPoolExecutor(THREADS) as pool, together(pool, lambda item: work(*item), files.items()) as running:
            sizes = dict(zip(running, (facts["bytes"] for facts in files.values()), strict=True))
            for future in as_completed(running):
                future.result()
                done += sizes[future]
                if progress is not None:
                    progress(done, total)


def _damaged(folder: Path, name: str, fault: str) -> CorruptArtifact:
    return CorruptArtifact(f"{folder / name} {fault}; delete {folder} and run its step again")


def join(prefix: str, name: str) -> str:
    """A key from a prefix and a name; the prefix may be empty."""
    prefix = prefix.strip("/")
    return f"{prefix}/{name}" if prefix else name


def hidden(uri: str) -> str:
    """A URI as it may be shown: without a user's name and password, and without a signature behind `?`."""
    return re.sub(r"(?<=//)[^/]*@", "...@", uri).partition("?")[0]


def check_key(key: str) -> str:
    """The key itself, if it is a plain relative path.

    Raises:
        UserError: it is empty, absolute or climbs out with `..`.
    """
    path = PurePosixPath(key)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.as_posix() != key:
        raise UserError(f"{key!r} cannot be a key of a store: use a relative path like 'cell1/images.safetensors'")
    return key
