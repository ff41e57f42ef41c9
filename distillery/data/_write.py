"""The loop that writes shards: in parallel, checkpointed shard by shard, published to a store when asked to."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillery.data import _published
from distillery.data._decode import Unreadable
from distillery.data._items import SPLITS, Items
from distillery.data._parallel import ordered
from distillery.data._shards import LISTS, PhotoWriter, PixelWriter, Record
from distillery.errors import UserError
from distillery.files import sha256_of

if TYPE_CHECKING:
    from distillery.config import DatasetConfig
    from distillery.track import Track


@dataclass
class State:
    """How far the work has come: all items before `consumed` are in `shards` or in `skipped`."""

    key: str
    consumed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    counts: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Everything that stays the same while shards are written."""

    cfg: DatasetConfig
    size: int
    kind: str
    items: Items
    out: Path
    track: Track

    @property
    def is_published(self) -> bool:
        """Whether shards go to the store instead of the artifact."""
        return bool(self.cfg.store) and self.kind == "photos"


def write(job: Job) -> State:
    """Write all shards of both splits.

    Raises:
        UserError: an unreadable image, or more of them than allowed.
    """
    state = _resume(job)
    for split in SPLITS:
        _write_split(job, state, split)
    return state


def _write_split(job: Job, state: State, split: str) -> None:
    items = job.items.splits[split]
    sealed = state.shards[split]

    def seal(path: Path, record: Record) -> None:
        sealed.append(_published.move(job.cfg.store, path, record) if job.is_published else record)
        if job.items.are_files and job.track.due():
            _save(job, state)

    writer = (
        PixelWriter(job.out, split, job.size, seal, sealed)
        if job.kind == "pixels"
        else PhotoWriter(job.out, split, seal, sealed)
    )
    first = state.consumed[split]
    done = sum(map(sum, state.counts.values())) + len(state.skipped)
    todo = (item for _, item in items[first:])
    with writer, contextlib.closing(ordered(job.items.work[split], todo, job.items.readers)) as results:
        for index, result in enumerate(results, first):
            state.consumed[split] = index
            label = items[index][0]
            if isinstance(result, Unreadable):
                _skip(job, state, items[index][1], result)
                done += 1
            else:
                writer.add(label, result)
                count = len(result) if isinstance(result, Tensor) else 1
                state.counts[split][label] += count
                done += count
            job.track.log(done, job.items.images, split=split)
        state.consumed[split] = len(items)


def _skip(job: Job, state: State, name: str, image: Unreadable) -> None:
    cfg = job.cfg
    if cfg.on_unreadable == "fail":
        raise UserError(
            f"unreadable image {image}; repair or remove it, or set on_unreadable: skip to leave out up to "
            f"max_unreadable: {cfg.max_unreadable} such images"
        )
    state.skipped.append(name)
    if len(state.skipped) > cfg.max_unreadable:
        raise UserError(
            f"{len(state.skipped)} unreadable images, more than max_unreadable: {cfg.max_unreadable}; "
            f"first {state.skipped[0]}, last {image}; repair or remove them, or raise max_unreadable"
        )
    job.track.note(f"left out unreadable image {image}")


def _identity(job: Job) -> str:
    """What a checkpoint belongs to: the configuration and the list of files."""
    total = hashlib.sha256(json.dumps([job.cfg.model_dump(mode="json"), job.size, job.items.classes]).encode())
    for split in SPLITS:
        for label, item in job.items.splits[split]:
            total.update(f"{label}\x1f{item}\x1e".encode("utf-8", "surrogateescape") if job.items.are_files else b"")
    return total.hexdigest()


def _save(job: Job, state: State) -> None:
    lists = {
        f"{split}.{name}": torch.tensor([n for record in state.shards[split] for n in record.get(name, [])])
        for split in SPLITS
        for name in LISTS
    }
    values = asdict(state)
    for split in SPLITS:
        values["shards"][split] = [{k: v for k, v in r.items() if k not in LISTS} for r in state.shards[split]]
    job.track.save(lists, values)


def _resume(job: Job) -> State:
    """The checkpoint's state if it belongs to this job and its shards are intact; else a fresh one."""
    zeros = {split: [0] * len(job.items.classes) for split in SPLITS}
    fresh = State(_identity(job), counts=zeros)
    loaded = job.track.load()
    state = fresh
    if loaded is not None:
        found = _restored(*loaded)
        intact = found.key == fresh.key and all(_is_intact(job, r) for s in SPLITS for r in found.shards[s])
        state = found if intact else fresh
        if not intact:
            job.track.note("the checkpoint is of other files or its shards are gone; starting from the first image")
    kept = {record["file"] for split in SPLITS for record in state.shards[split]}
    for split in SPLITS:
        for path in job.out.glob(f"{split}-?????.*"):
            if path.name not in kept:
                path.unlink()
    return state


def _restored(lists: dict[str, Tensor], values: dict) -> State:
    for split in SPLITS:
        start = 0
        for record in values["shards"][split]:
            end = start + record["images"]
            for name in LISTS:
                if len(lists[f"{split}.{name}"]):
                    record[name] = lists[f"{split}.{name}"][start:end].tolist()
            start = end
    return State(**values)


def _is_intact(job: Job, record: Record) -> bool:
    if "key" in record:
        from distillery.store import open_store  # only a URI needs the store

        return open_store(job.cfg.store).exists(record["key"])
    path = job.out / record["file"]
    return path.exists() and path.stat().st_size == record["bytes"] and sha256_of(path) == record["sha256"]
