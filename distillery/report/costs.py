"""What it took: time, speed, memory and bytes, beside those of the whole training set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from distillery.report.load import Outcome, Row
from distillery.report.notes import title
from distillery.report.table import Entry, by_setting, mean_by_seed

TIMED = ("synthesize", "relabel", "evaluate_student")
LAST = TIMED[-1]


def times(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Per cell of each method, IPC and teacher, mean over cells: seconds, images a second, and the peak of memory."""
    lines: dict[tuple[int, str, str], dict[str, list[Row]]] = {}
    apart = teachers_apart(entries)
    peaks = {str(o.cell.get("id")): o.peaks for o in outcomes if o.cell}
    for entry in entries:
        for row in entry.rows:
            cells = lines.setdefault((entry.setting.ipc, entry.method, apart[row.cell]), {})
            cells.setdefault(row.cell, []).append(row)
    found = []
    for (ipc, method, teacher), cells in sorted(lines.items()):
        steps = [mean(rows[0].seconds.get(step) for rows in cells.values()) for step in TIMED]
        held = [peak for cell in cells for step, peak in peaks.get(cell, {}).items() if step in TIMED]
        found.append(
            {"ipc": ipc, "method": method, "teacher": teacher, "cells": len(cells), "steps": steps}
            | {"total": sum(s for s in steps if s is not None)}
            | {"made": mean(_rate(rows[0].images, rows[0].seconds.get(TIMED[0])) for rows in cells.values())}
            | {
                "seen": mean(
                    _rate(sum(r.views or 0 for r in rows), rows[0].seconds.get(LAST)) for rows in cells.values()
                )
            }
            | {kind: max((peak[kind] for peak in held if kind in peak), default=None) for kind in ("ram", "gpu")}
        )
    return found


def sizes(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Images and bytes of each setting; methods with the same numbers share a line."""
    lines = []
    for setting, group in by_setting(entries).items():
        same: dict[tuple[float | None, ...], list[str]] = {}
        for entry in group:
            names = ("images", "image_bytes", "label_bytes", "fkd_bytes", "real_bytes")
            numbers = tuple(mean(mean_by_seed(entry.rows, attrgetter(name))) for name in names)
            same.setdefault(numbers, []).append(entry.method)
        for numbers, methods in same.items():
            methods = ["all methods"] if len(same) == 1 and len(methods) > 1 else sorted(methods)
            own = (numbers[1] or 0) + (numbers[2] or 0)
            smaller = numbers[4] / own if numbers[4] and own else None
            lines.append(
                {"title": title(setting), "methods": ", ".join(methods), "numbers": numbers, "smaller": smaller}
            )
    return lines


def teachers_apart(entries: Sequence[Entry]) -> Mapping[str, str]:
    """By cell: its teacher where others made images by the same method at the same IPC, else ""."""
    made: dict[tuple[int, str], dict[str, str]] = {}
    for entry in entries:
        cells = made.setdefault((entry.setting.ipc, entry.method), {})
        cells |= {row.cell: row.teacher for row in entry.rows}
    return {
        cell: teacher if len(set(cells.values())) > 1 else ""
        for cells in made.values()
        for cell, teacher in cells.items()
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _rate(count: int | None, seconds: float | None) -> float | None:
    return count / seconds if count and seconds else None
