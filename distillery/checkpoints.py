"""Checkpoints in a store: what a lost pod leaves to the one that takes its place.

    URI/work/STEP-KEY/owners/00002-TOKEN        an attempt: one process at this step, numbered after the last one
    URI/work/STEP-KEY/00002-TOKEN/17/NAME       its checkpoint files; none is written twice
    URI/work/STEP-KEY/00002-TOKEN/index.json    written last: the files that make up its checkpoint
    URI/finished/STEP-KEY/                      the artifact; the work is deleted once it is there

No attempt writes what another one wrote: a pod given up for lost and its replacement cannot mix their files, even
on servers without locks or conditional writes. The older one stops writing when it sees the newer. The key stands for
step, configuration, inputs and code, so what other code left is never found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distillery import artifact
from distillery.artifact import MANIFEST
from distillery.errors import CorruptArtifact, DistilleryError, StoreError, UserError
from distillery.files import disk, sha256_of, write_atomic
from distillery.store import MissingKey, Store, check_access, open_store
from distillery.track import FILE, Say

SCHEMA = 1
INDEX, OWNERS = "index.json", "owners"
ATTEMPT, SENDING = "attempt", "sending"  # beside the local checkpoint: whose it is, and what is on its way
PATIENCE = 60.0  # seconds in which one upload must find the store; then a newer checkpoint is tried
PAUSE = 5.0  # seconds between a failed upload and the next
REMIND = 300.0  # seconds between two warnings of the same trouble
LAST = 120.0  # seconds that a failing step waits for its last checkpoint to arrive
MAX_INDEX = 2**26  # bytes; an index of 100,000 files has a third of it
THREADS = 8


@dataclass(frozen=True)
class Place:
    """Where one step's work and its artifact are kept.

    Attributes:
        work: URI of the unfinished work.
        finished: URI of the artifact.
        required: the artifact must arrive there; else a store that fails costs a warning.
    """

    work: str
    finished: str
    required: bool = False

    @classmethod
    def below(cls, uri: str, name: str) -> Place:
        """The usual place of a step below a URI; `name` is the step's with its key."""
        return cls(f"{uri.rstrip('/')}/work/{name}", f"{uri.rstrip('/')}/finished/{name}")


Checkpoints = str | Place  # "" keeps none; a URI is meant for all steps


@dataclass(frozen=True)
class Kept:
    """A checkpoint file in the store."""

    key: str  # below the step's work
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What one attempt's checkpoint consists of."""

    files: dict[str, Kept] = field(default_factory=dict)  # by the name it has in the step's checkpoint folder
    schema: int = SCHEMA


_INDEX = TypeAdapter(Index)


class Vault:
    """One step's share of the store.

    Args:
        place: where.
        say: told of everything a person should know; see `track.Say`.

    Raises:
        UserError: wrong credentials, a missing bucket, or a place that may not be written: known before the work.
    """

    def __init__(self, place: Place, say: Say) -> None:
        self.place, self._say, self._pulled = place, say, False
        try:
            check_access(place.work)
        except StoreError as error:
            say(_warning(f"{error}; waiting for it before this step begins"))

    def pull(self, folder: Path) -> bool:
        """Fetch the finished artifact if it is there; whether it was."""
        store = open_store(self.place.finished)
        if not store.exists(MANIFEST):
            return False
        try:
            store.pull("", folder)
        except CorruptArtifact as error:
            self._say(_warning(f"{error}; it is not believed, and made again"))
            store.delete(MANIFEST)
            return False
        self.forget()
        self._pulled = True
        return True

    def push(self, folder: Path) -> None:
        """Keep the finished artifact in the store, then delete the work that led to it.

        Raises:
            StoreError, UserError: it could not, and the place is required to have it.
        """
        if self._pulled:
            return
        try:
            store = open_store(self.place.finished)
            if self.place.required or not store.exists(MANIFEST):  # else another attempt was quicker: it is the same
                store.push(folder, "")
            self.forget()
        except (StoreError, UserError) as error:
            if self.place.required:
                raise
            self._say(_warning(f"{error}; this step's result is not kept for another run, its work is"))

    def forget(self) -> None:
        """Delete the work, whoever did it."""
        store = open_store(self.place.work)
        keys = [entry.key for entry in store.list()]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(store.delete, sorted(keys, reverse=True)))  # owners first: who looks, stops

    def open(self, folder: Path, clear: Callable[[], None]) -> Mirror:
        """Begin an attempt: bring the newest checkpoint here, unless what lies here is at least as new.

        Args:
            folder: the local checkpoint's folder.
            clear: removes everything unfinished beside it, which belongs to an older state.
        """
        store = open_store(self.place.work)
        attempts = sorted((e.key.removeprefix(f"{OWNERS}/") for e in store.list(f"{OWNERS}/")), reverse=True)
        latest = int(attempts[0].partition("-")[0]) if attempts and attempts[0][:5].isdigit() else 0
        own = f"{latest + 1:05d}-{uuid.uuid4().hex[:12]}"
        store.write(f"{OWNERS}/{own}", os.uname().nodename.encode())  # first of all: who sees it deletes nothing more
        here = (folder / ATTEMPT).read_text() if (folder / ATTEMPT).is_file() else ""
        shutil.rmtree(folder / SENDING, ignore_errors=True)
        mirror = Mirror(self.place.work, own, folder, self._say)
        for attempt in attempts:
            if not store.exists(f"{attempt}/{INDEX}"):
                continue
            if attempt == here:
                with contextlib.suppress(CorruptArtifact, MissingKey):
                    mirror.adopt(_read(store, f"{attempt}/{INDEX}"))
                break
            if (found := self._fetch(store, attempt, folder, clear)) is not None:
                mirror.adopt(found)
                return mirror
        for path in sorted(folder.rglob(FILE)):  # what lies here is newer than what arrived there, or there is nothing
            mirror.keep(path.relative_to(folder).as_posix(), path)
        return mirror

    def _fetch(self, store: Store, attempt: str, folder: Path, clear: Callable[[], None]) -> Index | None:
        """Copy an attempt's checkpoint to `folder`; None when it is not to be believed."""
        for _ in range(3):  # its owner may still be at work and replace a file while it is read
            clear()
            shutil.rmtree(folder, ignore_errors=True)
            try:
                index = _read(store, f"{attempt}/{INDEX}")
                with disk(folder):
                    for name in index.files:
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(lambda item: store.fetch(item[1].key, folder / item[0], item[1].sha256),
                                  index.files.items()))  # fmt: skip
            except MissingKey:
                continue
            except CorruptArtifact as error:
                self._say(_warning(f"{error}; this checkpoint is not believed"))
                return None
            self._say({"event": "note", "text": f"found the checkpoint of attempt {attempt} in {self.place.work}"})
            return index
        self._say(_warning(f"{self.place.work}/{attempt}: files of this checkpoint are missing; it is not believed"))
        return None


class Mirror:
    """An attempt's checkpoint on its way to the store, in a thread of its own: the newest state wins.

    Args:
        uri: the step's work.
        attempt: this attempt's name.
        folder: the local checkpoint's folder.
        say: see `Vault`.
    """

    def __init__(self, uri: str, attempt: str, folder: Path, say: Say) -> None:
        self.attempt = attempt
        self._store, self._folder, self._say = open_store(uri, PATIENCE), folder, say
        self._files: dict[str, Kept] = {}
        self._waiting: dict[str, Path | None] = {}  # by name: what to upload; None: to drop
        self._flying: set[Path] = set()  # of these, what is being uploaded
        self._replaced: list[str] = []  # keys that the index in the store no longer names
        self._count = self._written = 0
        self._told: float | None = None  # when the last warning of this trouble was given
        self._change = threading.Condition()
        self._closing = self._lost = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"checkpoints {attempt}")
        self._thread.start()

    def adopt(self, index: Index) -> None:
        """Begin with another attempt's files, which lie in the folder now; they are not sent again."""
        self._files = dict(index.files)

    def keep(self, name: str, path: Path) -> None:
        """See `track.Remote`."""
        with self._change:
            if self._lost:
                return
            self._count += 1
            staged = self._folder / SENDING / f"{self._count}.bin"
            with disk(staged):
                staged.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, staged)
                except OSError:  # a file system without links
                    shutil.copyfile(path, staged)
            self._put_off(name, staged)

    def drop(self, name: str) -> None:
        """See `track.Remote`."""
        with self._change:
            if not self._lost and (name in self._files or name in self._waiting):
                self._put_off(name, None)

    def close(self, wait: float = 0.0) -> None:
        """End the uploads; with `wait` seconds for the last state to arrive, else what has not begun is given up."""
        with self._change:
            self._change.wait_for(lambda: self._lost or not self._waiting, wait)
            late = bool(wait and self._waiting and not self._lost)
            self._closing = True
            self._change.notify_all()
        self._thread.join(PATIENCE)
        if late:
            self._say(_warning("the last checkpoint did not arrive in the store; the one before it counts"))

    def _put_off(self, name: str, path: Path | None) -> None:
        before = self._waiting.get(name)
        if before is not None and before not in self._flying:
            before.unlink(missing_ok=True)
        self._waiting[name] = path
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._waiting)
                if self._closing:
                    return
                batch = dict(self._waiting)
                self._flying = {path for path in batch.values() if path is not None}
            try:
                self._upload(batch)
                arrived = True
            except (DistilleryError, OSError) as error:
                arrived = False
                self._warn(error)
            with self._change:
                self._settle(batch, arrived)
                if self._lost:
                    return
                if arrived and self._told is not None:
                    self._told = None
                    self._say({"event": "note", "text": "checkpoints reach the store again"})
                elif not arrived:
                    self._change.wait_for(lambda: self._closing, PAUSE)

    def _settle(self, batch: dict[str, Path | None], arrived: bool) -> None:
        """Take what has arrived off the list, and remove the copies that nobody needs any more."""
        for name, path in batch.items():
            newest = name in self._waiting and self._waiting[name] is path
            if newest and arrived:
                del self._waiting[name]
            if path is not None and (arrived or not newest):
                path.unlink(missing_ok=True)
        self._flying = set()
        if self._lost:
            self._waiting.clear()
        self._change.notify_all()

    def _upload(self, batch: dict[str, Path | None]) -> None:
        """Write a batch's files and then the index, unless the step has another owner by now."""
        owners = {entry.key.removeprefix(f"{OWNERS}/") for entry in self._store.list(f"{OWNERS}/")}
        newer = max(owners, default="")
        if self.attempt not in owners or newer.partition("-")[0] > self.attempt.partition("-")[0]:
            self._lost = True
            who = f"attempt {newer} has taken this step over" if self.attempt in owners else "this step is finished"
            self._say(_warning(f"{who}, elsewhere; attempt {self.attempt} writes no more checkpoints and works on"))
            return
        for key in self._replaced:  # one round late, so that a newcomer who has just read the index still finds them
            self._store.delete(key)
        self._replaced = []
        files, replaced = dict(self._files), []
        for name, path in batch.items():
            old = files.pop(name, None)
            replaced += [old.key] if old else []
            if path is not None:
                self._written += 1
                key = f"{self.attempt}/{self._written}/{name}"
                self._store.put(key, path)
                files[name] = Kept(key, path.stat().st_size, sha256_of(path))
            if self._closing:
                return
        self._store.write(f"{self.attempt}/{INDEX}", _INDEX.dump_json(Index(files)))
        self._files, self._replaced = files, replaced
        write_atomic(self._folder / ATTEMPT, self.attempt.encode())

    def _warn(self, error: Exception) -> None:
        if self._told is None or time.monotonic() - self._told > REMIND:
            self._told = time.monotonic()
            since = "the work goes on, but nothing newer than the last checkpoint there would survive this machine"
            self._say(_warning(f"a checkpoint did not reach the store: {error}; {since}"))


def _read(store: Store, key: str) -> Index:
    """An attempt's index.

    Raises:
        MissingKey: it has none. CorruptArtifact: unreadable, of a newer program, or not plain names.
    """
    where = f"{store.uri}/{key}"
    size = next((entry.bytes for entry in store.list(key) if entry.key == key), 0)
    if size > MAX_INDEX:
        raise CorruptArtifact(f"{where} has {size} bytes, more than an index can have ({MAX_INDEX})")
    data = store.read(key)
    try:
        index = _INDEX.validate_json(data)
    except ValidationError as error:
        raise CorruptArtifact(f"{where} is not an index of checkpoints ({error.errors()[0]['msg']})") from error
    if index.schema > SCHEMA:
        raise CorruptArtifact(f"{where} has schema {index.schema}, this program reads up to {SCHEMA}: it is newer")
    for name in index.files:
        if not artifact.is_inside(name):
            raise CorruptArtifact(f"{where} lists {name!r}, which is not a plain path")
    return index


def _warning(text: str) -> dict[str, Any]:
    return {"event": "note", "level": "warning", "text": f"WARNING: {text}"}
