"""Records of runs for tests of the history: everything a record has, changed by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distillery.history.record import CellRecord, Fault, Reached, Record, Taught

TEXT = """
name: toy
dataset: {name: digits, per_class: 12}
teacher: {net: convnet1, net_options: {width: 8}, epochs: 2, batch: 32}
methods:
  - {method: rded, ipc: [2], options: {mipc: 12}}
students:
  - {net: convnet1, net_options: {width: 8}, recipe: {preset: fair-soft, epochs: 3}}
"""


def cell(method: str = "rded", seed: int = 0, acc: float = 0.5, **changes: Any) -> CellRecord:
    """A cell with one student; `seconds` is merged, `acc` a fraction."""
    seconds = {"synthesize": 20.0, "relabel": 1.0, "evaluate_student": 30.0} | changes.pop("seconds", {})
    student = Reached(changes.pop("net", "convnet1"), changes.pop("recipe", "fair-soft"), "soft", acc, acc + 0.01)
    made = CellRecord(
        id=f"{method}-ipc10-seed{seed}",
        dataset="digits",
        method=method,
        options={},
        ipc=10,
        seed=seed,
        images_sha256=f"images of {method} {seed}",
        seconds=seconds,
        image_bytes=100,
        label_bytes=50,
        students=(student,),
        entry=method,
        teacher="convnet1",
        hardware="a cpu",
    )
    return replace(made, **changes)


def failed(method: str = "rded", seed: int = 0) -> CellRecord:
    """A cell that has no result."""
    return cell(method, seed, students=(), failure=Fault("synthesize", "no room"), images_sha256="")


def seeds(method: str, *accuracies: float, **changes: Any) -> tuple[CellRecord, ...]:
    """A cell for each accuracy (a fraction)."""
    return tuple(cell(method, seed, acc, **changes) for seed, acc in enumerate(accuracies))


def record(run: str = "one", number: int = 0, cells: Sequence[CellRecord] = (), **changes: Any) -> Record:
    """A finished run; the number is its second of that day."""
    hours, rest = divmod(number, 3600)
    cells = tuple(cells) or seeds("rded", 0.50, 0.51, 0.52)
    made = Record(
        run=run,
        experiment="toy",
        schedule="",
        finished=f"2026-11-21T{hours:02d}:{rest // 60:02d}:{rest % 60:02d}+00:00",
        seconds=60.0,
        status="failed" if any(c.failure for c in cells) else "succeeded",
        code_version="0.1.0+a",
        hardware=("a cpu",),
        config=TEXT,
        config_sha256="0" * 64,
        teachers=(Taught("convnet1", "convnet1", 0.9),),
        cells=cells,
        steps={"train_teacher": 100.0, "synthesize": 60.0},
        data="digits",
    )
    return replace(made, **changes)
