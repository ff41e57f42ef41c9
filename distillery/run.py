"""The in-process runner: the same steps in the same order, resumable, into a folder or an object store.

    OUT/experiment.yaml  1-data/  2-teachers/  3-synthetic/  4-labels/  5-students/  6-report/  history/  log.jsonl

Every artifact's folder ends in its step's key (see `execution.Spec.key`), so a run that starts again finds what is
finished and repeats only what changed. With an object store as OUT the work happens in a local cache; each artifact is
pushed when it is finished, pulled when a later step needs it, and checkpoints are mirrored.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery import artifact, experiment, steps
from distillery.artifact import Manifest
from distillery.checkpoints import Checkpoints, Place
from distillery.config import Experiment
from distillery.errors import UserError
from distillery.files import cache_root
from distillery.store import Store, open_store
from distillery.store.local import LocalStore

NAME_FILE = "experiment.name"


@dataclass(frozen=True)
class Done:
    """What a run leaves: the report's folder (local), where it lies for others, and the failures."""

    report: Path
    uri: str
    failures: list[str]


def run(source: str, out: str, history: str = "") -> Done:
    """Run an experiment to its end.

    Args:
        source: see `experiment.read`.
        out: a folder, or a file:// or s3:// URI.
        history: folder or URI of the store whose history receives the run; "" = `out`.

    Returns:
        The report's place and the failed cells (the caller decides the exit status).

    Raises:
        UserError: a faulty experiment, a folder that belongs to another experiment, or a second process on it.
        StoreError: the store failed after all retries. Finished artifacts are kept in every case.
    """
    text, _ = experiment.read(source)
    wanted = experiment.load(source)
    experiment.cells(wanted)
    _check_report()
    store, _ = open_store(out), open_store(history or out)  # a wrong place shows now, not after hours
    remote, name = not isinstance(store, LocalStore), hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    local = store.root if isinstance(store, LocalStore) else cache_root() / "runs" / name
    with store.hold("run"):
        _claim(store, wanted, out)
        store.write("experiment.yaml", text.encode())
        events, before = local / "log.jsonl", os.environ.get("DISTILLERY_EVENTS")
        local.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("DISTILLERY_EVENTS", str(events))
        try:
            return _Run(text, local, store if remote else None, history or out).all()
        finally:
            if before is None:
                del os.environ["DISTILLERY_EVENTS"]
            if remote and events.exists():
                store.put("log.jsonl", events)


@dataclass
class _Run:
    text: str
    local: Path
    remote: Store | None
    history: str

    def all(self) -> Done:
        cells, every = steps.plan(self.text), steps.plan_teachers(self.text)
        data = self._place("1-data", cells[0]["dataset"]["name"], steps.dataset_spec(self.text).key)
        self._step(data, lambda out, kept: steps.prepare_data(self.text, out, kept))
        steps.check_counts(cells, data)
        taught = {each["teacher"]: self._teacher(each["teacher"], data) for each in every}
        teachers = self._place("2-teachers", "all", steps.teachers_spec(self.text, data, taught).key)
        self._step(teachers, lambda out, kept: steps.gather_teachers(self.text, data, taught, out, kept))
        results = [self._cell(cell, data, teachers) for cell in cells]
        out = self.local / "6-report"
        failures = steps.report(self.text, list(results), out, history=self.history)
        if self.remote is not None:
            self.remote.push(out, "6-report")
        return Done(out, f"{self.remote.uri}/6-report" if self.remote else str(out), failures)

    def _teacher(self, name: str, data: Path) -> Path:
        place = self._place("2-teachers", name, steps.teacher_spec(self.text, name, data).key)
        self._step(place, lambda out, kept: steps.train_teacher(self.text, name, data, out, kept))
        return place

    def _cell(self, cell: dict[str, Any], data: Path, teachers: Path) -> Path:
        name = cell["id"]
        synthetic = self._place("3-synthetic", name, steps.synthetic_spec(cell, data, teachers).key)
        self._step(synthetic, lambda out, kept: self._synthesize(cell, data, teachers, out, kept))
        labels = self._place("4-labels", name, steps.labels_spec(cell, synthetic, teachers).key)
        self._step(labels, lambda out, kept: steps.relabel(cell, synthetic, teachers, out, kept))
        result = self._place("5-students", name, steps.result_spec(cell, data, teachers, synthetic, labels).key)
        made = (data, teachers, synthetic, labels)
        self._step(result, lambda out, kept: steps.evaluate_student(cell, *made, out, kept))
        return result

    def _synthesize(self, cell: dict[str, Any], data: Path, teachers: Path, out: Path, kept: Checkpoints) -> Manifest:
        """A cell's images at once or, with shards, piece by piece: the same artifact."""
        there = isinstance(kept, Place) and open_store(kept.finished).exists(artifact.MANIFEST)
        whole = artifact.is_finished(out) and artifact.read(out).kind == "synthetic"
        if cell["shards"] == 1 or there or whole:
            return steps.synthesize(cell, data, teachers, out, kept)
        made = []
        for piece in steps.pieces(cell):
            key = steps.piece_spec(piece, data, teachers).key
            made.append(self._place("3-synthetic", f"{cell['id']}-piece{piece['shard']}", key))
            self._step(made[-1], functools.partial(steps.synthesize_piece, piece, data, teachers))
        return steps.gather_pieces(cell, data, teachers, made, out, kept)

    def _place(self, folder: str, name: str, key: str) -> Path:
        return self.local / folder / f"{name}-{key}"

    def _step(self, folder: Path, work: Callable[[Path, Checkpoints], Manifest]) -> None:
        """Make an artifact, or fetch it from the run's store if that has it."""
        if self.remote is None:
            work(folder, "")
            return
        root, name = self.remote.uri, folder.relative_to(self.local).as_posix()
        work(folder, Place(f"{root}/checkpoints/{name}", f"{root}/{name}", required=True))


def _check_report() -> None:
    for name in ("jinja2", "markupsafe", "matplotlib"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"the report needs {name}; run: pip install 'distillery[report]'") from error


def _claim(store: Store, wanted: Experiment, out: str) -> None:
    """Tie an output place to one experiment's name."""
    if store.exists(NAME_FILE):
        owner = store.read(NAME_FILE).decode().strip()
        if owner != wanted.name:
            raise UserError(
                f"{out}: holds the artifacts of experiment {owner!r}, not of {wanted.name!r}; choose another --out, or "
                "give the experiment that name to share its finished artifacts"
            )
    elif store.list("1-data/"):
        raise UserError(f"{out}: holds artifacts but no {NAME_FILE}; choose an empty --out")
    store.write(NAME_FILE, f"{wanted.name}\n".encode())
