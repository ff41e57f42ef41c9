"""The history of a store: one immutable JSON record of every finished run, under `history/`.

    <store>/history/20261121T164500Z-<run id>.json

Names sort by time, so the newest stands last. A record is never changed; a run whose report is made again after a retry
adds another one, and of several records of one run the newest counts. What cannot be read (half written, of another
program, or of a newer schema) is left alone and counted.

`record` has the types, `of_run` makes a record of a finished run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

from distillery.errors import CorruptArtifact
from distillery.history.record import Record, Regression, parse
from distillery.store import MissingKey, Store, open_store

FOLDER = "history"
READERS = 16  # objects read at once
BRIEF = 60.0  # seconds to try: a run that is done does not wait longer for its place in the history
STAMP = "%Y%m%dT%H%M%SZ"
OWN = ("finished", "previous", "regressions")  # what may differ between two records of one and the same end

T = TypeVar("T")


def folder_of(place: str) -> str:
    """Where the records of a store lie: `history` below the place, or the place itself if it ends so."""
    place = place.rstrip("/")
    return place if place.rpartition("/")[2] == FOLDER else f"{place}/{FOLDER}"


class History(Generic[T]):
    """The records of a store, read once: asking again lists the store, and reads only what is new.

    Args:
        place: a folder or URI; the records lie in `history` below it.
        keep: what to keep of each record in memory (`whole` keeps all of it).
        patience: seconds to try while the store does not answer; 0 means its default.
    """

    def __init__(self, place: str, keep: Callable[[Record], T], patience: float = 0.0) -> None:
        self._store, self._keep = open_store(folder_of(place), patience), keep
        self.uri = self._store.uri
        self.unreadable = 0  # objects that are no records, at the last `read`
        self._known: dict[str, tuple[str, tuple[str, T] | None]] = {}  # key -> etag, and (run, what is kept of it)

    def read(self) -> list[T]:
        """What is kept of each run, oldest first; of several records of one run the newest.

        Raises:
            StoreError, UserError: the store does not answer, or refuses; what was read before stays known.
        """
        there = {entry.key: entry.etag for entry in self._store.list() if entry.key.endswith(".json")}
        self._known = {key: value for key, value in self._known.items() if there.get(key) == value[0]}
        for key, record in _each(self._store, [key for key in there if key not in self._known]):
            self._known[key] = there[key], (record.run, self._keep(record)) if record else None
        found: dict[str, T] = {}
        for key in sorted(self._known):
            if (kept := self._known[key][1]) is not None:
                found.pop(kept[0], None)
                found[kept[0]] = kept[1]
        self.unreadable = sum(value[1] is None for value in self._known.values())
        return list(found.values())


def whole(record: Record) -> Record:
    """The record itself: for a `History` that keeps everything."""
    return record


def enter(
    place: str, record: Record, judge: Callable[[Record, Record], Sequence[Regression]]
) -> tuple[Record, Record | None]:
    """Add a run to the history of a store, compared with the run before it.

    The run before is the newest other one of the same experiment, and of the same schedule where it has one, of which a
    cell finished. The same end of the same run is entered once: a report that is made again changes nothing.

    Args:
        place: a folder or URI.
        record: see `of_run.record`.
        judge: (the run before, this one) -> what is worse.

    Returns:
        The record as it stands in the history, and the run before it, if there is one.

    Raises:
        StoreError, UserError: the store does not answer within a minute, or refuses.
    """
    store = open_store(folder_of(place), BRIEF)
    keys = sorted((entry.key for entry in store.list() if entry.key.endswith(".json")), reverse=True)
    same = [key for key in keys if key.endswith(f"Z-{record.run}.json")]
    own = next((found for _, found in _each(store, same[:1]) if found), None)
    if own is not None and own.run == record.run and _end(own) == _end(record):
        earlier = [key for key in keys if own.previous and key.endswith(f"Z-{own.previous}.json")]
        return own, next((found for _, found in _each(store, earlier[:1]) if found), None)
    before = next((found for found in _newest(store, keys) if _precedes(found, record)), None)
    if before is not None:
        record = replace(record, previous=before.run, regressions=tuple(judge(before, record)))
    moment = record.ended
    while (key := f"{moment.strftime(STAMP)}-{record.run}.json") in keys:  # a record is never changed
        moment += timedelta(seconds=1)
    record = replace(record, finished=moment.isoformat(timespec="seconds"))
    store.write(key, record.json())
    return record, before


def _precedes(found: Record, record: Record) -> bool:
    same = found.experiment == record.experiment and (not record.schedule or found.schedule == record.schedule)
    return same and found.run != record.run and any(cell.students for cell in found.cells)


def _newest(store: Store, keys: Sequence[str]) -> Iterator[Record]:
    """Records from the newest on, read a few at a time."""
    for start in range(0, len(keys), READERS):
        yield from (record for _, record in _each(store, keys[start : start + READERS]) if record is not None)


def _each(store: Store, keys: Sequence[str]) -> Iterator[tuple[str, Record | None]]:
    """(key, record or None) in the order of the keys; what vanished meanwhile is left out."""

    def read(key: str) -> tuple[str, bytes | None]:
        try:
            return key, store.read(key)
        except MissingKey:
            return key, None

    if not keys:
        return
    with ThreadPoolExecutor(READERS) as pool:
        for key, data in pool.map(read, keys):
            if data is not None:
                yield key, _parsed(data, key)


def _parsed(data: bytes, key: str) -> Record | None:
    try:
        return parse(data, key)
    except CorruptArtifact:
        return None


def _end(record: Record) -> dict[str, Any]:
    return {name: value for name, value in json.loads(record.json()).items() if name not in OWN}
