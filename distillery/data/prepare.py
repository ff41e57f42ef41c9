"""A source of real images -> few large shards and an index, checked image by image.

Up to 64 px: uint8 tensors in safetensors. Above: the original files in tar shards that webdataset and tar read.
`data.json` holds classes, normalisation, the number of images per class and the shards, for photos with the byte
offset of every image. Images stand class by class, in the source's order inside a class.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.data import DATASETS, SIDES, TENSOR_SIDE, Info, _published, _sources
from distillery.data._downloads import downloads
from distillery.data._items import SPLITS, collect
from distillery.data._write import Job, State, write
from distillery.errors import UserError, choices, nearest
from distillery.files import disk, write_atomic

if TYPE_CHECKING:
    from distillery.config import DatasetConfig
    from distillery.track import Track

SCHEMA = 1
INDEX = "data.json"


def prepare(cfg: DatasetConfig, out: Path, track: Track) -> dict[str, Any]:
    """Write shards and `data.json` of one data set; continues after the last checkpointed shard.

    Args:
        cfg: which data set, and where it is.
        out: the artifact's folder; shards of an earlier, other attempt are removed.
        track: progress and checkpoints.

    Returns:
        The manifest's `meta`: name, kind, classes, size, mean, std, images and counts per split, unreadable images.

    Raises:
        UserError: unknown name, size out of range, missing or odd layout, empty class, unreadable images.
        StoreError: the disk or the object store failed.
    """
    info = _info(cfg)
    size = cfg.size or info.size
    kind = "pixels" if size <= TENSOR_SIDE else "photos"
    _warn_of_no_effect(cfg, kind, track)
    items = collect(cfg, size, kind, track)
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / INDEX).unlink(missing_ok=True)
        job = Job(cfg, size, kind, items, out, track)
        state = _published_or_written(job) if job.is_published else write(job)
    _check_counts(cfg, items.classes, state)
    facts = _facts(info, size, kind, items.classes)
    _write_index(out, facts, cfg.store if kind == "photos" else "", state)
    return facts | _totals(state)


def class_names(cfg: DatasetConfig) -> tuple[str, ...]:
    """Class names in class order, before anything is prepared: known, or found by listing an imagefolder.

    Raises:
        UserError: unknown name; missing or odd layout of an imagefolder.
    """
    return _info(cfg).classes or _sources.class_names(cfg)


def source_state(cfg: DatasetConfig) -> str:
    """A digest of what lies at the source now: names, sizes and times (or etags), so that changed images are noticed.

    Raises:
        StoreError: the store does not answer.
    """
    if "://" in cfg.root:
        from distillery.store import open_store  # only a URI needs the store

        found = sorted((entry.key, entry.bytes, entry.etag) for entry in open_store(cfg.root).list())
    else:
        root = Path(cfg.root).expanduser() if cfg.root else downloads(cfg.name)
        files = ((Path(place) / name) for place, _, names in os.walk(root, followlinks=True) for name in names)
        found = sorted((str(f.relative_to(root)), f.stat().st_size, str(f.stat().st_mtime_ns)) for f in files)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _published_or_written(job: Job) -> State:
    """The state of an equal preparation that is in the store already; else write and publish one."""
    source = source_state(job.cfg)
    key = _published.key_of(job.cfg, job.size, source)
    if (known := _published.find(job.cfg.store, key, job.track)) is not None:
        job.track.note(f"these photos are in {job.cfg.store} already; nothing is written")
        return State(**known)
    state = write(job)
    if source_state(job.cfg) == source:
        _published.publish(job.cfg.store, key, asdict(state))
    else:
        job.track.note(f"{job.cfg.root} changed while it was read; the next run reads it again")
    return state


def _info(cfg: DatasetConfig) -> Info:
    if cfg.name not in DATASETS:
        raise UserError(f"dataset {cfg.name!r} is not one of {choices(DATASETS)}{nearest(cfg.name, DATASETS)}")
    info = DATASETS[cfg.name]
    low, high = SIDES[0], SIDES[1] if info.kind == "photos" else TENSOR_SIDE
    if cfg.size and not low <= cfg.size <= high:
        raise UserError(
            f"dataset {info.name}: size {cfg.size} is out of range; use {low} to {high} pixels, "
            f"or 0 for the data set's own {info.size}"
        )
    return info


def _warn_of_no_effect(cfg: DatasetConfig, kind: str, track: Track) -> None:
    if cfg.store and kind == "pixels":
        track.note(f"store: {cfg.store} has no effect: sets up to {TENSOR_SIDE} px travel inside the artifact")
    if cfg.name == "digits" and (cfg.root or cfg.download):
        track.note("root and download have no effect: digits come with scikit-learn")


def _check_counts(cfg: DatasetConfig, classes: tuple[str, ...], state: State) -> None:
    empty = [cls for cls, count in zip(classes, state.counts["train"], strict=True) if not count]
    if empty:
        raise UserError(
            f"dataset {cfg.name}: no readable training image in the classes {choices(empty)}; "
            f"unreadable: {choices(state.skipped[:5])}; repair them or remove the classes"
        )
    if not any(state.counts["val"]):
        raise UserError(f"dataset {cfg.name}: no readable validation image; unreadable: {choices(state.skipped[:5])}")


def _facts(info: Info, size: int, kind: str, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": info.name,
        "kind": kind,
        "classes": list(classes),
        "size": size,
        "mean": list(info.mean),
        "std": list(info.std),
    }


def _totals(state: State) -> dict[str, Any]:
    return {
        "counts": state.counts,
        "images": {split: sum(state.counts[split]) for split in SPLITS},
        "bytes": sum(record["bytes"] for split in SPLITS for record in state.shards[split]),
        "unreadable": len(state.skipped),
        "skipped": state.skipped,
    }


def _write_index(out: Path, facts: dict[str, Any], store: str, state: State) -> None:
    splits = {split: {"counts": state.counts[split], "shards": state.shards[split]} for split in SPLITS}
    index = {"schema": SCHEMA, **facts, "store": store, "splits": splits}
    write_atomic(out / INDEX, json.dumps(index, separators=(",", ":")).encode() + b"\n")
