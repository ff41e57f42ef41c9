"""The report of an experiment: results.csv, report.md, report.html and summary.json from the cells' artifacts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillery.config import SHARED
from distillery.report import table
from distillery.report.answer import answer
from distillery.report.load import Failure, Outcome, Row, load, reached, shared_seconds
from distillery.report.markdown import markdown
from distillery.report.notes import Past, past, weaknesses
from distillery.report.table import Entry
from distillery.report.words import duration


@dataclass(frozen=True)
class Summary:
    """What the run reached, as plain values.

    `leaderboard` holds one mapping per entry, accuracies in percent and distances in points; `metrics` holds named
    finite numbers for dashboards; `failures` says in one line each which cell failed, where and why. `regressions` says
    what is worse than in the run before, `previous`, as in `history.Record`.
    """

    experiment: str
    code_version: str
    failures: list[str]
    leaderboard: list[dict[str, Any]]
    metrics: dict[str, float]
    previous: str = ""
    regressions: list[dict[str, Any]] = field(default_factory=list)


def build(
    experiment_name: str,
    results: list[Path],
    out: Path,
    code_version: str,
    config: str = "",
    teachers: Mapping[str, str] | None = None,
    ungated: Sequence[str] = (),
    before: Past | None = None,
) -> Summary:
    """Write results.csv, report.md, report.html and summary.json into `out`.

    Args:
        experiment_name: heading of the report.
        results: artifact folders of kind result or failure, in any order; what cannot be read is shown as a failure.
        out: folder to write into; made if absent.
        code_version: version of the code that builds the report.
        config: the experiment as its author wrote it, shown on the page; "" shows what the cells were given.
        teachers: what a cell's teachers are called, by the cell's id; without, by their nets.
        ungated: teachers from which the experiment demands no accuracy.
        before: how the run stands beside the one before it; None where no history is kept.

    Returns:
        The content of summary.json.
    """
    from distillery.report import page, provenance  # matplotlib takes a second to import: only when a report is built

    outcomes = sorted((load(result, teachers or {}) for result in results), key=_order)
    rows = sorted((row for outcome in outcomes for row in outcome.rows), key=table.order)
    entries = table.leaderboard(rows)
    failures = [o.failure for o in outcomes if o.failure]
    before = before or Past()
    notes = [*past(before), *weaknesses(entries, outcomes, ungated)]
    said = answer(entries, _seconds(outcomes))
    facts = _facts(outcomes, rows, entries, code_version)
    summary = Summary(
        experiment=experiment_name,
        code_version=code_version,
        failures=[_line(failure) for failure in failures],
        leaderboard=[table.scalars(entry) for entry in entries],
        metrics=_metrics(entries, outcomes) | dict(before.metrics),
        previous=before.run,
        regressions=[dict(found) for found in before.regressions],
    )
    shown = config or provenance.configuration(outcomes)
    report = page.Report(experiment_name, facts, said, entries, notes, outcomes, failures, shown)
    out.mkdir(parents=True, exist_ok=True)
    table.write_csv(rows, out / "results.csv")
    _write(out / "report.md", markdown(experiment_name, said, facts, entries, notes, failures))
    _write(out / "report.html", page.html(report))
    _write(out / "summary.json", json.dumps(asdict(summary), indent=2, sort_keys=True, allow_nan=False) + "\n")
    return summary


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _order(outcome: Outcome) -> tuple[object, ...]:
    failed = outcome.failure.cell if outcome.failure else ""
    return (failed, [table.order(row) for row in outcome.rows], str(outcome.cell.get("id", "")))


def _line(failure: Failure) -> str:
    return f"{failure.where}: {failure.step}: {' '.join(failure.error.split())[:500]}"


def _facts(
    outcomes: Sequence[Outcome], rows: Sequence[Row], entries: Sequence[Entry], code_version: str
) -> dict[str, str]:
    """The header: what was run, on what, and how long it computed."""
    teachers = sorted({(r.teacher, r.teacher_acc) for r in rows if r.teacher_acc is not None})
    failed = sum(o.failure is not None for o in outcomes)
    facts = {
        "Data": ", ".join(sorted({r.dataset for r in rows})),
        "Teacher" if len(teachers) < 2 else "Teachers": "; ".join(
            f"{name}, {reached(name, acc)}" for name, acc in teachers
        ),
        "Students": ", ".join(sorted({e.setting.student for e in entries})),
        "Images per class": ", ".join(map(str, sorted({e.setting.ipc for e in entries}))),
        "Cells": f"{len(outcomes) - failed} of {len(outcomes)} finished" if outcomes else "none",
        "Time": duration(_seconds(outcomes)) if outcomes else "",
        "Hardware": "; ".join(sorted({o.hardware for o in outcomes if o.hardware})),
        "Finished": _moment(max((o.created for o in outcomes), default="")),
        "Code": code_version,
    }
    return {key: value for key, value in facts.items() if value}


def _moment(created: str) -> str:
    """`2026-11-21T17:27:03+00:00` for people; manifests are dated in UTC."""
    return f"{created[:16].replace('T', ' ')} UTC" if created else ""


def _seconds(outcomes: Sequence[Outcome]) -> float:
    """Seconds of all steps; what several cells share counts once."""
    own = sum(seconds for o in outcomes for step, seconds in o.seconds.items() if step not in SHARED)
    return own + sum(shared_seconds(outcomes).values())


def _metrics(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> dict[str, float]:
    failed = sum(o.failure is not None for o in outcomes)
    found: dict[str, float] = {"cells": len(outcomes), "cells_failed": failed}
    if entries:
        found["teacher_acc"] = round(max(e.setting.teacher_acc for e in entries), 2)
        found["acc_last_max"] = round(max(e.mean for e in entries), 2)
    for entry in entries:
        setting = entry.setting
        words = f"{entry.method} ipc{setting.ipc} {setting.student} {setting.recipe} {setting.context}"
        name = f"accuracy {' '.join(re.sub(r'[^A-Za-z0-9_.-]+', ' ', words).split())}"
        while name in found:  # settings that differ in their labels alone
            name += " more"
        found[name] = round(entry.mean, 2)
    return found
