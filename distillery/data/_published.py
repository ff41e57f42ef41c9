"""Photo shards in an object store: written once, found again by what they were made from, and only referenced.

    SHA20/train-00000.tar   a shard, under the hash of its bytes: writers of equal shards write the same object
    prepared/KEY.json       which shards a source and its settings gave; written last, so what it names is whole

KEY hashes the list of the source's files (names, sizes, times or etags) and every setting that can change a shard.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.data._shards import BLOCK, LISTS, PHOTO_SHARD, Record, cut

if TYPE_CHECKING:
    from distillery.config import DatasetConfig
    from distillery.track import Track

LAYOUT = 1  # of shards and blocks; another one is prepared anew
PLACES = {"root", "download", "store"}  # where things are, not what they are


def key_of(cfg: DatasetConfig, size: int, source: str) -> str:
    """What a preparation is found by; `source` is the state of its files."""
    settings = cfg.model_dump(mode="json", exclude=PLACES) | {"size": size}
    parts = [LAYOUT, PHOTO_SHARD, BLOCK, settings, source]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find(uri: str, key: str, track: Track) -> dict[str, Any] | None:
    """What `publish` kept under this key, if all its shards are still there; else None."""
    from distillery.store import open_store  # only a published set needs the store

    store = open_store(uri)
    if not store.exists(_index(key)):
        return None
    try:
        state: dict[str, Any] = json.loads(store.read(_index(key)))
        wanted = {record["key"]: record["bytes"] for records in state["shards"].values() for record in records}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        track.note(f"{uri}/{_index(key)} is not readable ({error}); preparing the photos again")
        return None
    found = {entry.key: entry.bytes for entry in store.list()}
    lost = [name for name, nbytes in wanted.items() if found.get(name) != nbytes]
    if lost:
        track.note(
            f"{len(lost)} of {len(wanted)} published shards are gone or cut, first {uri}/{lost[0]}; preparing again"
        )
        return None
    return state


def publish(uri: str, key: str, state: dict[str, Any]) -> None:
    """Keep a finished preparation under its key."""
    from distillery.store import open_store  # only a published set needs the store

    open_store(uri).write(_index(key), json.dumps(state, separators=(",", ":")).encode())


def move(uri: str, path: Path, record: Record) -> Record:
    """Move a shard to the store, unless it is there, and note its key and the hashes of its blocks (long lists last, as
    in a record that comes back from a checkpoint)."""
    from distillery.store import open_store  # only a published set needs the store

    store, key = open_store(uri), f"{record['sha256'][:20]}/{record['file']}"
    if not store.exists(key) or store.sha256(key) != record["sha256"]:
        store.put(key, path)
    offsets, sizes = record["offsets"], record["sizes"]
    spans = [(offsets[first], offsets[end - 1] + sizes[end - 1]) for first, end in cut(offsets, sizes, BLOCK)]
    with path.open("rb") as file:
        hashes = [_hash(file, start, end) for start, end in spans]
    path.unlink()
    facts = {name: value for name, value in record.items() if name not in LISTS}
    return facts | {"key": key, "block": BLOCK, "blocks": hashes} | {name: record[name] for name in LISTS}


def _hash(file: Any, start: int, end: int) -> str:
    file.seek(start)
    return hashlib.sha256(file.read(end - start)).hexdigest()


def _index(key: str) -> str:
    return f"prepared/{key}.json"
