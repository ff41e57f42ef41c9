"""A finished run -> its record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from distillery import artifact, experiment
from distillery.config import SHARED, Cell, Experiment, canonical, plain
from distillery.errors import DistilleryError
from distillery.history.record import CellRecord, Fault, Reached, Record, Taught, identifier
from distillery.report.load import Outcome, Row, load, shared_seconds
from distillery.report.table import leaderboard


def record(
    wanted: Experiment, text: str, results: Iterable[Path], *, code: str, run: str = "", schedule: str = ""
) -> Record:
    """The record of a run that ends now.

    Args:
        wanted: the experiment.
        text: the same as its author wrote it.
        results: its artifacts of kind result or failure.
        code: the code's version.
        run: the run's id; "" makes one from the artifacts, the same for the same artifacts.
        schedule: name of the recurring run.
    """
    folders, cells = list(results), {cell.id: cell for cell in experiment.cells(wanted)}
    outcomes = [load(folder, experiment.taught(wanted)) for folder in folders]
    shared = shared_seconds(outcomes)
    steps = shared | _own_seconds(outcomes)
    nets = {teacher.name: teacher.net for teacher in wanted.every_teacher}
    named = _entries(outcomes)
    made = [_cell(outcome, cells, named, _images(folder)) for outcome, folder in zip(outcomes, folders, strict=True)]
    rows = [(row.cell, row.teacher_acc) for outcome in outcomes for row in outcome.rows if row.teacher_acc is not None]
    taught = {(_teacher(cells, cell), round(accuracy / 100, 8)) for cell, accuracy in rows if math.isfinite(accuracy)}
    return Record(
        run=identifier(run) or _derived(wanted.name, folders),
        experiment=wanted.name,
        schedule=schedule,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(sum(steps.values()), 3),
        status="failed" if any(outcome.failure for outcome in outcomes) else "succeeded",
        code_version=code,
        hardware=tuple(sorted({outcome.hardware for outcome in outcomes} - {""})),
        config=text,
        config_sha256=resolved(wanted),
        teachers=tuple(Taught(name, _nets(name, nets), accuracy) for name, accuracy in sorted(taught)),
        cells=tuple(sorted(made, key=lambda cell: cell.id)),
        steps={step: round(seconds, 3) for step, seconds in sorted(steps.items())},
        data=next((print_ for folder in folders if (print_ := _inputs(folder).get("data"))), ""),
    )


def resolved(wanted: Experiment) -> str:
    """sha256 of everything in an experiment that can change a number, with defaults and recipes filled in."""
    free = {"id", "name", "shards", "code_version", "stop_on_failure"}  # what a cell has that changes none
    pods = {name for name in Cell.model_fields if name.endswith(("_cpu", "_memory", "_gpus"))}
    cells = [plain(cell) for cell in experiment.cells(wanted)]
    kept = [{name: value for name, value in cell.items() if name not in free | pods} for cell in cells]
    for cell in kept:
        cell["dataset"] = {k: v for k, v in cell["dataset"].items() if k not in ("root", "download", "store")}
        for student in cell["students"]:
            student["recipe"] = {k: v for k, v in student["recipe"].items() if k != "name"}
    teachers = [plain(teacher) for teacher in wanted.every_teacher]
    return hashlib.sha256(canonical([teachers, kept]).encode()).hexdigest()


def _derived(name: str, folders: Sequence[Path]) -> str:
    """An id for a run that has none: another one as soon as anything was made anew."""
    manifests = [path.read_bytes() for folder in folders if (path := folder / artifact.MANIFEST).is_file()]
    return identifier(f"{name}-{hashlib.sha256(b''.join(sorted(manifests))).hexdigest()[:12]}")


def _cell(
    outcome: Outcome, cells: Mapping[str, Cell], named: Mapping[int, tuple[str, str, str]], images: str
) -> CellRecord:
    said, failure = outcome.cell, outcome.failure
    name = str(said.get("id", failure.cell if failure else ""))
    measured = [row for row in outcome.rows if not row.failure]
    sizes = [row.image_bytes for row in measured if row.image_bytes is not None]
    return CellRecord(
        id=name,
        dataset=str(said.get("dataset", "")),
        method=str(said.get("method", "")),
        options=dict(said.get("options", {})),
        ipc=int(said.get("ipc", 0)),
        seed=int(said.get("seed", 0)),
        images_sha256=images,
        seconds=outcome.seconds,
        image_bytes=max(sizes, default=None),
        label_bytes=sum(row.label_bytes or 0 for row in measured) if measured else None,
        students=tuple(_student(row, named.get(id(row))) for row in measured),
        failure=Fault(failure.step, " ".join(failure.error.split())[:500]) if failure else None,
        entry=next((named[id(row)][0] for row in measured if id(row) in named), str(said.get("method", ""))),
        teacher=_teacher(cells, name),
        hardware=outcome.hardware,
    )


def _student(row: Row, names: tuple[str, str, str] | None) -> Reached:
    _, net, recipe = names or ("", row.student, row.recipe)
    return Reached(net, recipe, row.regime, _fraction(row.acc_last), _fraction(row.acc_best))


def _fraction(percent: float | None) -> float | None:
    return None if percent is None or not math.isfinite(percent) else round(percent / 100, 8)


def _entries(outcomes: Sequence[Outcome]) -> dict[int, tuple[str, str, str]]:
    """The names that the leaderboard gives to each row's method, student and recipe."""
    entries = leaderboard([row for outcome in outcomes for row in outcome.rows])
    return {id(row): (e.method, e.setting.student, e.setting.recipe) for e in entries for row in e.rows}


def _teacher(cells: Mapping[str, Cell], name: str) -> str:
    return " + ".join(cells[name].teachers) if name in cells else ""


def _nets(name: str, nets: Mapping[str, str]) -> str:
    return " + ".join(nets.get(part, part) for part in name.split(" + "))


def _own_seconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    found: dict[str, float] = {}
    for outcome in outcomes:
        for step, seconds in outcome.seconds.items():
            if step not in SHARED:
                found[step] = found.get(step, 0.0) + seconds
    return found


def _images(folder: Path) -> str:
    try:
        return str(artifact.read(folder, verify=False).meta.get("images_sha256", ""))
    except DistilleryError:
        return ""


def _inputs(folder: Path) -> dict[str, str]:
    try:
        return artifact.read(folder, verify=False).inputs
    except DistilleryError:
        return {}
