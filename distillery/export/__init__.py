"""A distilled set as something to take away: images, soft labels, recorded views, a card, and a manifest written last.

README.md      the card: what it is, how to load it, accuracies, recipe, teacher, licence, limits, citation
set.json       the same for programs: classes, normalisation, recipe, learning rate of each epoch
labels.npy     int64 [N]; soft.npy float16 [N, C], the teacher's logits of the images; weights.npy float32 [N]
images.npy     or train/, train-*.tar, set.npz, by format (`formats.py`)
views/         what a student was shown and what the teacher said to it (`views.py`)
test.npz       with `with_test`: images and labels of the validation split
manifest.json  sha256 of every file; its kind is "set"
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillery import artifact, console, teacher
from distillery.artifact import MANIFEST, Manifest
from distillery.config import Student, parse, plain
from distillery.data import DATASETS, augment, real, synthetic
from distillery.data.batches import Batches, slices
from distillery.data.synthetic import Synthetic
from distillery.device import Compute, choose, hardware
from distillery.errors import CorruptArtifact, UserError
from distillery.export import card, formats, source, views
from distillery.export.source import Beside, Origin
from distillery.files import cache_root, disk, write_atomic
from distillery.labels import entries
from distillery.preview import write_preview
from distillery.store import Store, open_store
from distillery.store.local import LocalStore
from distillery.track import Track
from distillery.train import lr_factor

KIND, FACTS, SCHEMA = "set", "set.json", 1
LATEST = "latest.json"
AT_ONCE = 256  # images that the teacher looks at together
OTHERS = 100  # files of a set beside those of its images, at most


@dataclass(frozen=True)
class Wanted:
    """How a set is exported.

    Attributes:
        format: a name in `formats.FORMATS`.
        cell: which cell of a run.
        student: which of the cell's students, from 0, has its views recorded.
        with_views: record the views and their soft labels.
        with_test: add the validation images.
        beside: where the cell's other artifacts are, see `source.Beside`.
    """

    format: str = "folder"
    cell: str = ""
    student: int = 0
    with_views: bool = True
    with_test: bool = False
    beside: Beside = field(default_factory=Beside)


def export(source_uri: str, out: str, wanted: Wanted = Wanted(), *, overwrite: bool = False) -> Manifest:
    """Write a distilled set to a folder or store.

    Args:
        source_uri: see `source.find`.
        out: a folder, or a file:// or s3:// URI.
        wanted: how.
        overwrite: whether an exported set that is there already may be replaced; it stays until the new one is whole.

    Raises:
        UserError: an unknown format or cell, a failed cell, or something else at `out`.
        CorruptArtifact: what should be exported is damaged. StoreError: the disk is full, or the store fails.
    """
    formats.find(wanted.format)
    store = open_store(out)
    _check_free(store, out, overwrite)
    with _staged(store) as folder:
        manifest = make(source_uri, wanted, folder)
        _put(store, folder, manifest)
    return manifest


def publish(source_uri: str, to: str, wanted: Wanted = Wanted(), *, version: str = "") -> tuple[str, Manifest]:
    """Export a set as a new version below a prefix: TO/VERSION/, then TO/latest.json, which points to it.

    Args:
        source_uri: see `source.find`.
        to: a folder, or a file:// or s3:// URI.
        wanted: how it is exported.
        version: its name; "" means the next of v1, v2, ... unless the newest version has the same content.

    Returns:
        The version and its manifest.

    Raises:
        UserError: that version is there already, or its name cannot be one. And as `export`.
    """
    formats.find(wanted.format)
    if version and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}", version):
        raise UserError(f"version {version!r}: use letters, digits, dots and dashes, such as v2 or 1.0.0")
    store = open_store(to)
    with store.hold("publish"):
        known = versions(store)
        if version in known:
            raise UserError(
                f"{store.uri}/{version} is published already, and versions never change; choose another --version than "
                f"{', '.join(known)}"
            )
        with _staged(store) as folder:
            manifest = make(source_uri, wanted, folder)
            pointed = latest(store)
            if not version and pointed and pointed.get("fingerprint") == manifest.fingerprint:
                return str(pointed["version"]), manifest
            version = version or f"v{next(n for n in itertools.count(1) if f'v{n}' not in known)}"
            if isinstance(store, LocalStore):  # what a killed process left, never a published version
                shutil.rmtree(store.root / version, ignore_errors=True)
            for entry in store.list(f"{version}/"):
                store.delete(entry.key)
            store.push(folder, version)
        pointer = {"version": version, "fingerprint": manifest.fingerprint, "created": manifest.run["created"]}
        store.write(LATEST, (json.dumps(pointer, indent=1, sort_keys=True) + "\n").encode())
    return version, manifest


def versions(store: Store) -> list[str]:
    """The finished versions below a prefix."""
    keys = (entry.key.split("/") for entry in store.list())
    return sorted(parts[0] for parts in keys if len(parts) == 2 and parts[1] == MANIFEST)


def latest(store: Store) -> dict[str, Any] | None:
    """What latest.json says: version, fingerprint, created; None where nothing was published.

    Raises:
        CorruptArtifact: it is not readable, or names no plain version.
    """
    if not store.exists(LATEST):
        return None
    try:
        found: dict[str, Any] = json.loads(store.read(LATEST))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", found["version"]):
            raise ValueError(f"version {found['version']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{store.uri}/{LATEST}: not readable ({error}); publish the set again") from error
    return found


def make(source_uri: str, wanted: Wanted, folder: Path) -> Manifest:
    """Write a whole set into an empty folder on this machine."""
    layout, began = formats.find(wanted.format), time.monotonic()
    origin = source.find(source_uri, wanted.cell, data=wanted.with_test, beside=wanted.beside)
    artifact.begin(folder)
    images, made = synthetic.load(origin.images), artifact.read(origin.images, "synthetic")
    if wanted.format in ("imagefolder", "huggingface") and len(images.labels) > artifact.MAX_FILES - OTHERS:
        raise UserError(
            f"--format {wanted.format} would write {len(images.labels)} files, and a set has at most "
            f"{artifact.MAX_FILES}; take webdataset or folder"
        )
    with torch.no_grad(), disk(folder):
        parts = _Parts(origin, made, images, wanted)
        soft, facts = parts.soft(), parts.facts()
        layout.write(folder, images.images_u8, images.labels, soft, facts["classes"])
        views.write(folder / "labels.npy", images.labels.numpy())
        if soft is not None:
            views.write(folder / "soft.npy", soft)
        if images.weights is not None:
            views.write(folder / "weights.npy", images.weights.numpy())
        if wanted.with_test:
            _write_test(folder, origin)
        recorded = parts.record(folder / views.FOLDER)
        facts |= {"soft": soft is not None, "recorded": recorded, "plain": parts.plain(recorded)}
        write_preview(images.images_u8, images.labels, folder / "preview.png")
        write_atomic(folder / FACTS, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
        view_bytes = sum(path.stat().st_size for path in (folder / views.FOLDER).glob("*"))
        write_atomic(folder / "README.md", card.text(facts, origin, view_bytes).encode())
        inputs: dict[str, Path | Manifest] = {"synthetic": made}
        return artifact.finish(
            folder,
            kind=KIND,
            step="export",
            config={"format": wanted.format, "with_views": wanted.with_views, "with_test": wanted.with_test},
            inputs=inputs | ({"result": origin.result[0]} if origin.result else {}),
            meta={name: facts[name] for name in ("dataset", "method", "ipc", "seed", "images", "soft", "recorded")},
            seconds=time.monotonic() - began,
            hardware=hardware(parts.compute),
        )


class _Parts:
    """What goes into a set, out of its origin."""

    def __init__(self, origin: Origin, made: Manifest, images: Synthetic, wanted: Wanted) -> None:
        self.origin, self.made, self.images, self.wanted = origin, made, images, wanted
        config = origin.result[0].config if origin.result else made.config
        self.compute: Compute = choose("auto", config.get("precision", "auto") if origin.result else "auto")
        if config.get("device") == "cpu":
            self.compute = choose("cpu", config.get("precision", "fp32"))
        self.teacher = self._teacher()
        self.student = self._student(config)
        info = DATASETS.get(str(config.get("dataset", "")))
        known = (self.teacher.mean, self.teacher.std) if self.teacher else (info.mean, info.std) if info else None
        self.norm = known

    def soft(self) -> np.ndarray[Any, Any] | None:
        """The teacher's logits of the images themselves, [N, C] fp16."""
        if self.teacher is None:
            return None
        found, size = [], self.images.images_u8.shape[2]
        for batch in self.images.images_u8.split(AT_ONCE):
            x_norm = augment.evaluation_view(
                self.compute.images(batch), size, tuple(self.teacher.mean), tuple(self.teacher.std)
            )
            found.append(self.teacher.logits(x_norm).half().cpu())
        return torch.cat(found).numpy()

    def facts(self) -> dict[str, Any]:
        """The content of set.json, but for what was recorded."""
        config, result = self.made.config, self.origin.result
        facts: dict[str, Any] = {name: config.get(name) for name in ("method", "ipc", "seed", "options")}
        facts |= {"schema": SCHEMA, "format": self.wanted.format, "classes": list(self.made.meta["classes"])}
        facts |= {"images": len(self.images.labels), "size": self.images.images_u8.shape[2]}
        facts |= {"dataset": str(result[0].config["dataset"]) if result else "", "teacher": None, "student": None}
        facts |= {"mean": list(self.norm[0]) if self.norm else None, "std": list(self.norm[1]) if self.norm else None}
        facts["source"] = {"code version": self.made.code_version, "images": self.made.fingerprint}
        if result is not None:
            facts["teacher"] = dict(result[1]["teacher"])
            facts["source"] |= {"run": self.origin.run, "cell": result[0].config["cell"]}
            facts["source"] |= {"result": result[0].fingerprint, "data": result[0].inputs["data"]}
        if self.student is not None and result is not None:
            recipe, reached = self.student.recipe, result[1]["students"][self.wanted.student]
            facts["student"] = {"net": self.student.net, "net_options": dict(self.student.net_options)}
            facts["student"] |= {name: reached[name] for name in ("acc_last", "acc_best")}
            facts["recipe"] = plain(recipe)
            facts["lr"] = [recipe.lr * lr_factor(recipe, epoch) for epoch in range(recipe.epochs)]
            facts["steps"] = [[part.start, part.stop] for part in slices(facts["images"], recipe.batch)]
        return facts

    def record(self, folder: Path) -> list[str]:
        """Write the views of the chosen student; the names of the arrays."""
        if self.student is None or not self.wanted.with_views or self.origin.labels is None or self.norm is None:
            return []
        if self.teacher is None and entries(self.origin.labels)[self.wanted.student]["mode"] == "on_the_fly":
            return []
        recipe, seed, index = self.student.recipe, int(self.made.config["seed"]), self.wanted.student
        batches = Batches(self.images.images_u8, self.images.labels, recipe, seed, self.norm, self.compute)
        kept = entries(self.origin.labels)[index]["mode"] == "stored"
        stored = self.origin.labels / f"student-{index}.safetensors" if kept else None
        track = Track(lambda event: console.emit({"event": "progress", "step": "export"} | event))
        return views.record(folder, batches, recipe, self.teacher, stored, track.log)

    def plain(self, recorded: list[str]) -> bool:
        """Whether docs/train_on_it.py does all that the recipe asks for (but that it decays biases like weights)."""
        if not recorded or self.student is None or self.images.weights is not None:
            return False
        recipe, able = self.student.recipe, {"order", "box", "flip", "partner", "mix_box", "own", "logits"}
        return recipe.loss == "kl" and not recipe.ema and recipe.views.mix != "mixup" and set(recorded) <= able

    def _teacher(self) -> teacher.Frozen | None:
        members = [teacher.load(folder, self.compute) for folder in self.origin.teachers]
        return teacher.Ensemble(members) if len(members) > 1 else members[0] if members else None

    def _student(self, config: dict[str, Any]) -> Student | None:
        if self.origin.result is None:
            return None
        students = config["students"]
        if not 0 <= self.wanted.student < len(students):
            raise UserError(f"--student {self.wanted.student}: the cell has {len(students)}, counted from 0")
        return parse(Student, students[self.wanted.student], "student")


def _write_test(folder: Path, origin: Origin) -> None:
    if origin.data is None:
        raise UserError(f"--with-test: {origin.images} was given without its run, so the real images are not known")
    images, labels = real.load(origin.data).images("val")
    np.savez(folder / "test.npz", images=images[slice(0, len(labels))].numpy(), labels=labels.numpy())


def _check_free(store: Store, out: str, overwrite: bool) -> None:
    """Refuse what is not ours to replace, before any work."""
    there = store.list()
    if not there and not (isinstance(store, LocalStore) and store.root.is_dir() and any(store.root.iterdir())):
        return
    if not store.exists(MANIFEST) or artifact.parse(store.read(MANIFEST), f"{out}/{MANIFEST}").kind != KIND:
        raise UserError(f"{out} holds something else than an exported set; choose another --out, or empty it yourself")
    if not overwrite:
        raise UserError(f"{out} holds an exported set; choose another --out, or replace it with --overwrite")


@contextmanager
def _staged(store: Store) -> Iterator[Path]:
    """An empty folder that is gone afterwards: beside a local destination, else in the cache."""
    above = store.root.parent if isinstance(store, LocalStore) else cache_root() / "export"
    with disk(above):
        above.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".distillery-export-", dir=above))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(store: Store, folder: Path, manifest: Manifest) -> None:
    """Move or send a finished set to its place; an older one there goes when the new one is whole."""
    if isinstance(store, LocalStore):
        with disk(store.root):
            old = folder.with_name(f"{folder.name}.old")
            folder.chmod(0o777 & ~_umask())  # temporary folders are closed to others
            if store.root.exists():
                os.rename(store.root, old)
            try:
                os.rename(folder, store.root)
            except OSError:
                if old.exists():
                    os.rename(old, store.root)
                raise
            shutil.rmtree(old, ignore_errors=True)
        return
    before = {entry.key for entry in store.list()}
    store.push(folder, "")
    for key in sorted(before - set(manifest.files) - {MANIFEST}):
        store.delete(key)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["FACTS", "KIND", "LATEST", "Wanted", "export", "latest", "make", "publish", "versions"]
