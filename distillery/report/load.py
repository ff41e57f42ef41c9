"""Artifact folders -> rows: what each cell's students reached, or why the cell failed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery import artifact
from distillery.errors import CorruptArtifact

STEPS = ("prepare_data", "train_teacher", "gather_teachers", "synthesize", "relabel", "evaluate_student")
SHARED = STEPS[:3]  # made once for several cells


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    cell: str
    method: str
    ipc: int | None
    seed: int | None
    step: str
    error: str
    hint: str
    traceback: str

    @property
    def where(self) -> str:
        """The cell in words, or its id when nothing more is known."""
        if not self.method:
            return self.cell
        return f"{self.method}, IPC {self.ipc}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """One student of one cell. Accuracies in percent, None where the cell failed."""

    cell: str
    dataset: str
    method: str
    options: str  # canonical JSON
    ipc: int
    seed: int
    student: str
    net_options: str  # canonical JSON
    recipe: str
    recipe_values: str  # canonical JSON
    regime: str
    labels: str
    acc_last: float | None
    acc_best: float | None
    teacher: str
    teacher_acc: float | None
    seconds: dict[str, float]
    images: int | None
    image_bytes: int | None
    label_bytes: int | None
    fkd_bytes: int | None
    views: int | None
    code_version: str
    hardware: str
    failure: str
    curve: tuple[tuple[int, float], ...]  # (epoch, accuracy in percent)
    per_class: tuple[float, ...]  # percent


@dataclass(frozen=True)
class Outcome:
    """Everything the report needs from one artifact folder."""

    cell: dict[str, Any]
    rows: tuple[Row, ...]
    failure: Failure | None
    classes: tuple[str, ...]
    preview: Path | None
    code_version: str
    hardware: str
    seconds: dict[str, float]


def load(folder: Path) -> Outcome:
    """Read one artifact of kind result or failure; anything else, or a damaged one, is itself reported as a failure."""
    try:
        manifest = artifact.read(folder)
        if manifest.kind not in ("result", "failure"):
            raise CorruptArtifact(f"{folder.name}: an artifact of kind {manifest.kind!r}, expected result or failure")
    except CorruptArtifact as error:
        hint = "start the same run again: what is damaged or unfinished is made anew"
        failure = Failure(folder.name, "", None, None, "report", str(error), hint, "")
        return Outcome({}, (), failure, (), None, "", "", {})
    data = json.loads((folder / f"{manifest.kind}.json").read_text(encoding="utf-8"))
    return _result(folder, manifest, data) if manifest.kind == "result" else _failure(manifest, data)


def canonical(value: object) -> str:
    """JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _result(folder: Path, manifest: artifact.Manifest, data: dict[str, Any]) -> Outcome:
    cell, teacher = _cell(data["cell"] | {k: manifest.config[k] for k in ("students", "labels")}), data["teacher"]
    common = _common(cell, manifest) | {"teacher": teacher["net"], "teacher_acc": _percent(teacher["accuracy"])}
    seen: dict[tuple[str, str], int] = {}
    rows = []
    for student in data["students"]:
        names = (student["net"], student["recipe"])
        seen[names] = seen.get(names, 0) + 1
        rows.append(Row(**common, **_planned(cell, names, seen[names] - 1), **_measured(student), failure=""))
    preview = folder / "preview.png"
    return _outcome(cell, tuple(rows), manifest, classes=tuple(data["classes"]), preview=preview)


def _failure(manifest: artifact.Manifest, data: dict[str, Any]) -> Outcome:
    known = isinstance(data["cell"], dict)
    cell = _cell(data["cell"]) if known else {}
    failure = Failure(
        cell=str(cell["id"] if known else data["cell"]),
        method=str(cell.get("method", "")),
        ipc=cell.get("ipc"),
        seed=cell.get("seed"),
        step=str(data["step"]),
        error=str(data["error"]),
        hint=str(data["hint"]),
        traceback=str(data["traceback"]),
    )
    said = f"{failure.step}: {' '.join(failure.error.split())}"
    teachers = {"teacher": "+".join(data["cell"]["teachers"]), "teacher_acc": None} if cell else {}
    common = _common(cell, manifest) | teachers if cell else {}
    rows = []
    for index, student in enumerate(cell.get("students", ())):
        names = (student["net"], student["recipe"]["name"])
        same = [s for s in cell["students"][:index] if (s["net"], s["recipe"]["name"]) == names]
        planned = _planned(cell, names, len(same)) | {"regime": student["recipe"]["regime"]}
        rows.append(Row(**common, **planned, **NOTHING_MEASURED, failure=said))
    return _outcome(cell, tuple(rows), manifest, failure=failure)


NOTHING_MEASURED: dict[str, Any] = {
    "acc_last": None,
    "acc_best": None,
    "images": None,
    "image_bytes": None,
    "label_bytes": None,
    "fkd_bytes": None,
    "views": None,
    "curve": (),
    "per_class": (),
}


def _outcome(
    cell: dict[str, Any],
    rows: tuple[Row, ...],
    manifest: artifact.Manifest,
    *,
    failure: Failure | None = None,
    classes: tuple[str, ...] = (),
    preview: Path | None = None,
) -> Outcome:
    return Outcome(
        cell=cell,
        rows=rows,
        failure=failure,
        classes=classes,
        preview=preview if preview and preview.exists() else None,
        code_version=manifest.code_version,
        hardware=str(manifest.run.get("hardware", "")),
        seconds=_seconds(manifest),
    )


def _cell(said: dict[str, Any]) -> dict[str, Any]:
    """What the report shows of a cell, alike for results and failures: nothing that depends on the machine."""
    dataset = said["dataset"]
    names = ("id", "method", "ipc", "seed", "options", "labels", "students")
    return {"dataset": dataset["name"] if isinstance(dataset, dict) else dataset} | {name: said[name] for name in names}


def _common(cell: dict[str, Any], manifest: artifact.Manifest) -> dict[str, Any]:
    return {
        "cell": cell["id"],
        "dataset": cell["dataset"],
        "method": cell["method"],
        "options": canonical(cell["options"]),
        "ipc": int(cell["ipc"]),
        "seed": int(cell["seed"]),
        "labels": _label_mode(cell["labels"]),
        "seconds": _seconds(manifest),
        "code_version": manifest.code_version,
        "hardware": str(manifest.run.get("hardware", "")),
    }


def _planned(cell: dict[str, Any], names: tuple[str, str], nth: int) -> dict[str, Any]:
    """What the cell says of its nth student of this net and recipe name (the names alone may not tell two apart)."""
    same = [s for s in cell["students"] if (s["net"], s["recipe"]["name"]) == names]
    found = same[min(nth, len(same) - 1)] if same else {"net_options": {}, "recipe": {}}
    values = {"net_options": canonical(found["net_options"]), "recipe_values": canonical(found["recipe"])}
    return {"student": names[0], "recipe": names[1], **values}


def _measured(student: dict[str, Any]) -> dict[str, Any]:
    counts = {k: int(student[k]) for k in ("images", "image_bytes", "label_bytes", "fkd_bytes", "views")}
    return {
        "regime": student["regime"],
        "acc_last": _percent(student["acc_last"]),
        "acc_best": _percent(student["acc_best"]),
        "curve": tuple((int(point[0]), _percent(point[1])) for point in student["curve"]),
        "per_class": tuple(map(_percent, student["per_class"])),
        **counts,
    }


def _label_mode(labels: dict[str, Any]) -> str:
    top_k = int(labels.get("top_k", 0))
    return str(labels["mode"]) + (f"-top{top_k}" if top_k else "")


def _seconds(manifest: artifact.Manifest) -> dict[str, float]:
    steps = {name: float(seconds) for name, seconds in manifest.run.get("steps", {}).items()}
    if manifest.step not in steps and "seconds" in manifest.run:
        steps[manifest.step] = float(manifest.run["seconds"])
    return steps


def _percent(fraction: float) -> float:
    return 100.0 * float(fraction)
