"""report.html: what each section shows, and the limits that keep the page under 2 MB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distillery.report import charts
from distillery.report.load import SHARED, Failure, Outcome, Row
from distillery.report.notes import HOW_TO_READ, Note, labels, title
from distillery.report.table import Entry, Setting, by_setting, mean_by_seed

FOLDER = Path(__file__).parent
IMAGE_BYTES = 480_000  # of all image grids together, before base64
MOST_GRIDS, MOST_CHARTS, MOST_FAILURES, MOST_ENTRIES = 16, 20, 20, 300
GRID_WIDTH = 340  # CSS pixels, see report.css
MOST_CLASSES, MOST_HEAT = 100, 4000  # cells of all per-class tables together
MOST_TEXT = 2000  # characters of an error or traceback
MOST_CONFIG = 40_000
TIMED = ("synthesize", "relabel", "evaluate_student")


@dataclass(frozen=True)
class Report:
    """What the page is made of."""

    name: str
    facts: dict[str, str]
    headline: str
    entries: Sequence[Entry]
    notes: Sequence[Note]
    outcomes: Sequence[Outcome]
    failures: Sequence[Failure]
    config: str


def html(report: Report) -> str:
    """The whole page, self-contained; every name and text in it is escaped by the template engine."""
    look = charts.looks({e.method: e.baseline for e in report.entries})
    settings = by_setting(report.entries[:MOST_ENTRIES])
    shared, times = _times(report.entries)
    context = {
        "report": report,
        "css": (FOLDER / "report.css").read_text(encoding="utf-8"),
        "how": HOW_TO_READ,
        "look": look,
        "board": [_block(setting, group) for setting, group in settings.items()],
        "curves": _curves(settings, look),
        "trends": _trends(report.entries, look),
        "grids": _grids(report.outcomes, report.entries),
        "heat": _heat(settings, report.outcomes),
        "shared": shared,
        "times": times,
        "sizes": _sizes(report.entries),
        "failures": [_shown(failure) for failure in report.failures[:MOST_FAILURES]],
        "left_out": {
            "entries": max(0, len(report.entries) - MOST_ENTRIES),
            "curves": max(0, len(settings) - MOST_CHARTS),
            "failures": max(0, len(report.failures) - MOST_FAILURES),
        },
        "config": report.config if len(report.config) <= MOST_CONFIG else f"{report.config[:MOST_CONFIG]}\n...",
    }
    return _template().render(context)


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter."""
    if seconds is None:
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "\u2013"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def signed(points: float) -> str:
    """Points with a sign, and a true minus."""
    return f"{points:+.2f}".replace("-", "\u2212")


def configuration(outcomes: Sequence[Outcome]) -> str:
    """What all cells share, and where they differ, as YAML."""
    cells = [o.cell for o in outcomes if o.cell]
    if not cells:
        return ""
    shared = [key for key in cells[0] if key != "id" and all(cell[key] == cells[0][key] for cell in cells)]
    common = yaml.safe_dump({key: cells[0][key] for key in shared}, sort_keys=False, width=100)
    differing = [{k: v for k, v in cell.items() if k not in shared} for cell in cells]
    return common + yaml.safe_dump({"cells": differing}, sort_keys=False, default_flow_style=None, width=100)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(FOLDER)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"duration": duration, "size": size, "signed": signed}
    return env.get_template("template.html.jinja")


def _block(setting: Setting, group: Sequence[Entry]) -> dict[str, Any]:
    """One block of the leaderboard, with the bars' scale: from 0 to the teacher or the best bar."""
    top = max([setting.teacher_acc, *(e.mean + (e.std or 0.0) for e in group)]) or 1.0
    random = next((e.mean for e in group if e.rows[0].method == "random"), None)
    lines = []
    for entry in group:
        low, high = entry.mean - (entry.std or 0.0), entry.mean + (entry.std or 0.0)
        bar = {"width": entry.mean, "from": max(0.0, low), "length": high - max(0.0, low)}
        lines.append({"entry": entry, "bar": {k: round(100 * v / top, 2) for k, v in bar.items()}})
    return {
        "title": title(setting),
        "lines": lines,
        "random": None if random is None else round(100 * random / top, 2),
        "teacher": round(100 * setting.teacher_acc / top, 2),
    }


def _curves(settings: Mapping[Setting, list[Entry]], look: Mapping[str, charts.Look]) -> list[dict[str, Any]]:
    drawn = [(s, g) for s, g in settings.items() if any(charts.average_curve(e.rows)[0] for e in g)]
    return [
        {"title": title(setting), "svg": charts.curves(group, look, f"curve{i}")}
        for i, (setting, group) in enumerate(drawn[:MOST_CHARTS])
    ]


def _trends(entries: Sequence[Entry], look: Mapping[str, charts.Look]) -> list[dict[str, Any]]:
    """One chart for each student and recipe that was run at several IPCs."""
    found: list[dict[str, Any]] = []
    for _, same in groupby(sorted(entries, key=lambda e: e.setting.series), key=lambda e: e.setting.series):
        group = list(same)
        setting = group[0].setting
        if len({e.setting.ipc for e in group}) > 1 and len(found) < MOST_CHARTS:
            parts = (setting.context, setting.student, f"{setting.recipe} recipe", labels(setting))
            name = " \u00b7 ".join(part for part in parts if part)
            found.append({"title": name, "svg": charts.against_ipc(group, look, f"trend{len(found)}")})
    return found


def _grids(outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One picture per method and IPC: the lowest seed's."""
    names = {row.cell: e.method for e in entries for row in e.rows}
    first: dict[tuple[int, str], Outcome] = {}
    for outcome in sorted((o for o in outcomes if o.preview and o.rows), key=lambda o: o.rows[0].seed):
        row = outcome.rows[0]
        first.setdefault((row.ipc, names[row.cell]), outcome)
    chosen = sorted(first.items())[:MOST_GRIDS]
    return [_grid(ipc, name, outcome, IMAGE_BYTES // len(chosen)) for (ipc, name), outcome in chosen]


def _grid(ipc: int, name: str, outcome: Outcome, most_bytes: int) -> dict[str, Any]:
    assert outcome.preview is not None
    rows = ", ".join(outcome.classes[:10])
    alt = f"Images of {name} at IPC {ipc}, one row per class" + (f": {rows}" if rows else "")
    seed = outcome.rows[0].seed
    found = charts.picture(outcome.preview, most_bytes)
    sharp = found.width <= GRID_WIDTH  # small images are shown as their pixels, photos smoothly
    return {"method": name, "ipc": ipc, "seed": seed, "alt": alt, "picture": found, "sharp": sharp}


def _heat(settings: Mapping[Setting, list[Entry]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Per-class accuracy tables, one per setting, while they fit; `left_out` says how many did not."""
    classes = next((o.classes for o in outcomes if o.classes), ())
    tables: list[dict[str, Any]] = []
    cells = left_out = 0
    for setting, group in settings.items():
        columns = [(e, _per_class(e.rows)) for e in group]
        columns = [(e, values) for e, values in columns if len(values) == len(classes)]
        cells += len(columns) * len(classes)
        if not columns or len(classes) > MOST_CLASSES:
            continue
        if cells > MOST_HEAT:
            left_out += 1
            continue
        lines = [(name, [values[i] for _, values in columns]) for i, name in enumerate(classes)]
        tables.append({"title": title(setting), "methods": [e.method for e, _ in columns], "lines": lines})
    return {"tables": tables, "left_out": left_out, "classes": len(classes), "most": MOST_CLASSES}


def _per_class(rows: Sequence[Row]) -> list[float]:
    count = min((len(row.per_class) for row in rows), default=0)
    return [_mean(row.per_class[i] for row in rows) or 0.0 for i in range(count)]


def _times(entries: Sequence[Entry]) -> tuple[list[tuple[str, float]], list[dict[str, Any]]]:
    """Seconds of the shared steps, and mean seconds per cell of each method and IPC."""
    rows = [row for entry in entries for row in entry.rows]
    shared = [(step, _mean(r.seconds.get(step) for r in rows)) for step in SHARED]
    lines: dict[tuple[int, str], dict[str, Row]] = {}
    for entry in entries:
        found = lines.setdefault((entry.setting.ipc, entry.method), {})
        found |= {row.cell: row for row in entry.rows}
    times = []
    for (ipc, method), cells in sorted(lines.items()):
        steps = [_mean(row.seconds.get(step) for row in cells.values()) for step in TIMED]
        total = sum(s for s in steps if s is not None)
        times.append({"ipc": ipc, "method": method, "cells": len(cells), "steps": steps, "total": total})
    return [(step, seconds) for step, seconds in shared if seconds is not None], times


def _sizes(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Images and bytes of each setting; methods with the same numbers share a line."""
    lines = []
    for setting, group in by_setting(entries).items():
        same: dict[tuple[float | None, ...], list[str]] = {}
        for entry in group:
            names = ("images", "image_bytes", "label_bytes", "fkd_bytes", "views")
            numbers = tuple(_mean(mean_by_seed(entry.rows, attrgetter(name))) for name in names)
            same.setdefault(numbers, []).append(entry.method)
        for numbers, methods in same.items():
            methods = ["all methods"] if len(same) == 1 and len(methods) > 1 else sorted(methods)
            lines.append({"title": title(setting), "methods": ", ".join(methods), "numbers": numbers})
    return lines


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _shown(failure: Failure) -> dict[str, str]:
    texts = {"error": failure.error[:MOST_TEXT], "hint": failure.hint[:MOST_TEXT]}
    trace = failure.traceback
    texts["traceback"] = trace if len(trace) <= MOST_TEXT else f"...\n{trace[-MOST_TEXT:]}"
    return {"where": failure.where, "step": failure.step, **texts}
