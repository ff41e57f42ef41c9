"""Artifact folders -> rows: what each cell's students reached, or why the cell failed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distillery import artifact
from distillery.config import SHARED, canonical
from distillery.errors import CorruptArtifact

TRAINING = "train_teacher"


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
    place: int = 0  # among the cell's students
    taught_by_own_net: bool = False  # the teacher is this student's net, trained on everything
    real_images: int | None = None  # in the whole training set
    real_bytes: int | None = None


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
    teachers: frozenset[str] = frozenset()  # fingerprints
    folder: Path | None = None
    fingerprint: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)  # name -> fingerprint
    neighbours: Path | None = None
    distances: tuple[float, ...] = ()  # of pictured images to their real neighbours, in grey levels
    peaks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # step -> bytes by kind of memory
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""


def load(folder: Path, teachers: Mapping[str, str]) -> Outcome:
    """Read one artifact of kind result or failure; anything else, or a damaged one, is itself reported as a failure.

    Args:
        folder: the artifact.
        teachers: what a cell's teachers are called, by its id; their nets where it is not there.
    """
    try:
        manifest = artifact.read(folder)
        if manifest.kind not in ("result", "failure"):
            raise CorruptArtifact(f"{folder.name}: an artifact of kind {manifest.kind!r}, expected result or failure")
        data = json.loads((folder / f"{manifest.kind}.json").read_text(encoding="utf-8"))
        if manifest.kind == "result":
            return _result(folder, manifest, data, teachers)
        return _failure(manifest, data, teachers)
    except CorruptArtifact as error:
        said, hint = str(error), "start the same run again: what is damaged or unfinished is made anew"
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        said = f"{folder.name} holds something else than expected ({type(error).__name__}: {error})"
        hint = "delete the folder and start the same run again"
    failure = Failure(folder.name, "", None, None, "report", said, hint, "")
    return Outcome({}, (), failure, (), None, "", "", {})


def reached(teacher: str, accuracy: float) -> str:
    """A teacher's accuracy in words; of several it is the mean of theirs, not what they reach together."""
    return f"{accuracy:.2f} %" + (" on average" if several(teacher) else "")


def shared_seconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Seconds of each step that is made for several cells; what is shared counts once.

    A cell's seconds of train_teacher are of all its teachers together, so each teacher's are what the cells with fewer
    of them leave. Other steps are known by their seconds, equal to the digit where they are the same.
    """
    known = [{(step, o.seconds[step]) for o in outcomes if step in o.seconds} for step in SHARED]
    found = {step: sum(sorted(seconds for _, seconds in own)) for step, own in zip(SHARED, known, strict=True) if own}
    if any(o.teachers for o in outcomes):
        found |= {TRAINING: sum(_each_teacher(outcomes).values())} if TRAINING in found else {}
    return found


def _each_teacher(outcomes: Sequence[Outcome]) -> dict[str, float]:
    together: dict[frozenset[str], float] = {}
    for outcome in outcomes:
        if TRAINING in outcome.seconds:  # where a cell failed it may count the experiment's other teachers too
            least = min(outcome.seconds[TRAINING], together.get(outcome.teachers, math.inf))
            together[outcome.teachers] = least
    each: dict[str, float] = {}
    for teachers in sorted(together, key=lambda prints: (len(prints), sorted(prints))):
        new = sorted(teachers - each.keys())
        rest = together[teachers] - sum(each[print_] for print_ in teachers & each.keys())
        each |= dict.fromkeys(new, max(0.0, rest) / max(1, len(new)))
    return each


def several(teacher: str) -> bool:
    """Whether that stands for several teachers at once (no name has a plus)."""
    return "+" in teacher


def _result(folder: Path, manifest: artifact.Manifest, data: dict[str, Any], teachers: Mapping[str, str]) -> Outcome:
    cell, teacher = _cell(data["cell"] | {k: manifest.config[k] for k in ("students", "labels")}), data["teacher"]
    name = teachers.get(cell["id"], teacher["net"])
    common = _common(cell, manifest) | {"teacher": name, "teacher_acc": _percent(teacher["accuracy"])}
    seen: dict[tuple[str, str], int] = {}
    rows = []
    for place, student in enumerate(data["students"]):
        names = (student["net"], student["recipe"])
        seen[names] = seen.get(names, 0) + 1
        planned = _planned(cell, names, seen[names] - 1)
        made_by = (teacher["net"], canonical(teacher["net_options"]) if "net_options" in teacher else None)
        more: dict[str, Any] = {
            "place": place,
            "taught_by_own_net": made_by == (names[0], planned["net_options"]) and not several(name),
        }
        more |= {f"real_{k}": int(v) for k, v in data.get("data", {}).items() if k in ("images", "bytes")}
        rows.append(Row(**common, **planned, **_measured(student), **more, failure=""))
    found = _outcome(cell, tuple(rows), manifest)
    preview, near = folder / "preview.png", folder / "neighbours.png"
    return replace(
        found,
        classes=tuple(map(str, data["classes"])),
        folder=folder,
        distances=tuple(float(each["rms"]) for each in data.get("neighbours", ())),
        preview=preview if preview.exists() else None,
        neighbours=near if near.exists() else None,
    )


def _failure(manifest: artifact.Manifest, data: dict[str, Any], teachers: Mapping[str, str]) -> Outcome:
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
    name = teachers.get(failure.cell) or "+".join(data["cell"]["teachers"] if cell else ())
    common = _common(cell, manifest) | {"teacher": name, "teacher_acc": None} if cell else {}
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
) -> Outcome:
    return Outcome(
        cell=cell,
        rows=rows,
        failure=failure,
        classes=(),
        preview=None,
        code_version=manifest.code_version,
        hardware=str(manifest.run.get("hardware", "")),
        seconds=_seconds(manifest),
        teachers=frozenset(print_ for name, print_ in manifest.inputs.items() if name.startswith("teacher-")),
        fingerprint=manifest.fingerprint,
        inputs=manifest.inputs,
        peaks=manifest.run.get("peaks", {}),
        versions=manifest.run.get("versions", {}),
        created=str(manifest.run.get("created", "")),
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
    if not math.isfinite(fraction):
        raise CorruptArtifact(
            f"an accuracy is {fraction}, which is no number; delete the result and run its step again"
        )
    return 100.0 * float(fraction)
