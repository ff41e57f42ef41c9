"""report.html: what each section shows, and the limits that keep the page under 2 MB."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distillery.report import charts, costs, provenance, words
from distillery.report.classes import confusions, heat
from distillery.report.load import Failure, Outcome, shared_seconds
from distillery.report.notes import HOW_TO_READ, Note, labels, title
from distillery.report.table import BASELINES, Entry, Setting, by_setting

FOLDER = Path(__file__).parent
LARGEST = 1_950_000  # bytes of the page
SHARES = (1.0, 0.6, 0.3, 0.1, 0.0)  # of the limits, until the page fits
IMAGE_BYTES = 600_000  # of all pictures together, before base64
MOST_GRIDS, MOST_CHARTS, MOST_FAILURES, MOST_ENTRIES, MOST_CONFUSIONS = 16, 20, 20, 300, 6
MOST_HEAT = 4000  # numbers of all per-class tables together
GRID_WIDTH = 340  # pictures up to here consist of pixels, not of photos
STRIP = 120  # pictures up to here stand side by side in a narrow column
MOST_TEXT = 2000  # characters of an error or traceback


@dataclass(frozen=True)
class Report:
    """What the page is made of."""

    name: str
    facts: dict[str, str]
    answer: str
    entries: Sequence[Entry]
    notes: Sequence[Note]
    outcomes: Sequence[Outcome]
    failures: Sequence[Failure]
    config: str


def html(report: Report) -> str:
    """The whole page, self-contained; every name and text in it is escaped by the template engine.

    A page that would be too large is written again with fewer charts, tables and smaller pictures, and says so.
    """
    page = ""
    for share in SHARES:
        page = _page(report, share)
        if len(page.encode()) <= LARGEST:
            break
    return page


def _page(report: Report, share: float) -> str:
    look = charts.looks({e.method: e.baseline for e in report.entries})
    settings = by_setting(report.entries[: round(MOST_ENTRIES * max(share, 0.3))])
    classes = next((o.classes for o in report.outcomes if o.classes), ())
    most_charts = round(MOST_CHARTS * share)
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    context = {
        "report": report,
        "css": Markup((FOLDER / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        "script": Markup(script),  # noqa: S704 - our own file
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "how": HOW_TO_READ,
        "look": look,
        "board": [_block(setting, group) for setting, group in settings.items()],
        "curves": _curves(settings, look, most_charts),
        "trends": _trends(report.entries, look, most_charts),
        "grids": _grids(report.outcomes, report.entries, share),
        "heat": heat(settings, classes, round(MOST_HEAT * share)),
        "confusions": confusions(settings, report.outcomes, classes, round(MOST_CONFUSIONS * share)),
        "shared": list(shared_seconds(report.outcomes).items()),
        "times": costs.times(report.entries, report.outcomes),
        "sizes": costs.sizes(report.entries),
        "crossings": _crossings(report.entries),
        "recipes": provenance.recipes([row for e in report.entries for row in e.rows])[: round(40 * max(share, 0.1))],
        "hashes": provenance.hashes(report.outcomes, report.config),
        "failures": [_shown(failure) for failure in report.failures[:MOST_FAILURES]],
        "left_out": {
            "entries": len(report.entries) - sum(map(len, settings.values())),
            "curves": max(0, len(by_setting(report.entries)) - most_charts),
            "failures": max(0, len(report.failures) - MOST_FAILURES),
        },
        "config": provenance.shortened(report.config),
    }
    return _template().render(context)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(FOLDER)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {name: getattr(words, name) for name in ("duration", "size", "signed", "rate")}
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
        "own_net": setting.own_net,
        "lines": lines,
        "random": None if random is None else round(100 * random / top, 2),
        "teacher": round(100 * setting.teacher_acc / top, 2),
    }


def _curves(
    settings: Mapping[Setting, list[Entry]], look: Mapping[str, charts.Look], most: int
) -> list[dict[str, Any]]:
    drawn = [(s, g) for s, g in settings.items() if any(charts.average_curve(e.rows)[0] for e in g)]
    return [
        {"title": title(setting), "svg": charts.curves(group, look, f"curve{i}")}
        for i, (setting, group) in enumerate(drawn[:most])
    ]


def _trends(entries: Sequence[Entry], look: Mapping[str, charts.Look], most: int) -> list[dict[str, Any]]:
    """One chart for each student and recipe with a method that was run at several IPCs."""
    found: list[dict[str, Any]] = []
    for _, same in groupby(sorted(entries, key=lambda e: e.setting.series), key=lambda e: e.setting.series):
        group = list(same)
        setting = group[0].setting
        ipcs: dict[str, set[int]] = {}
        for entry in group:
            ipcs.setdefault(entry.method, set()).add(entry.setting.ipc)
        if max(map(len, ipcs.values())) > 1 and len(found) < most:
            parts = (setting.context, setting.student, f"{setting.recipe} recipe", labels(setting))
            name = " \u00b7 ".join(part for part in parts if part)
            found.append({"title": name, "svg": charts.against_ipc(group, look, f"trend{len(found)}")})
    return found


def _grids(outcomes: Sequence[Outcome], entries: Sequence[Entry], share: float) -> dict[str, Any]:
    """Pictures of each method, IPC and teacher, the lowest seed's, with their real neighbours."""
    names, apart = {row.cell: e.method for e in entries for row in e.rows}, costs.teachers_apart(entries)
    first: dict[tuple[int, str, str], Outcome] = {}
    for outcome in sorted((o for o in outcomes if o.preview and o.rows), key=lambda o: o.rows[0].seed):
        row = outcome.rows[0]
        first.setdefault((row.ipc, names[row.cell], apart[row.cell]), outcome)
    chosen = sorted(first.items())[: round(MOST_GRIDS * share)]
    budget = round(IMAGE_BYTES * share / max(1, 2 * len(chosen)))
    grids = [_grid(*shown, outcome, budget) for shown, outcome in chosen]
    narrow = [grid for grid in grids if grid["picture"].width <= STRIP]
    wide = [grid for grid in grids if grid["picture"].width > STRIP]
    return {"groups": [group for group in (narrow, wide) if group], "left_out": len(first) - len(chosen)}


def _grid(ipc: int, name: str, teacher: str, outcome: Outcome, most_bytes: int) -> dict[str, Any]:
    assert outcome.preview is not None
    rows = ", ".join(outcome.classes[:10])
    by = f"IPC {ipc}" + (f", teacher {teacher}" if teacher else "")
    alt = f"Images of {name} at {by}, one row per class" + (f": {rows}" if rows else "")
    found = charts.picture(outcome.preview, most_bytes)
    return {
        "method": name,
        "by": f"{by}, seed {outcome.rows[0].seed}",
        "alt": alt,
        "baseline": outcome.rows[0].method in BASELINES,
        "picture": found,
        "real": charts.picture(outcome.neighbours, most_bytes) if outcome.neighbours else None,
        "closeness": _closeness(outcome.distances),
        "sharp": found.width <= GRID_WIDTH,  # small images are shown as their pixels, photos smoothly
    }


def _closeness(distances: Sequence[float]) -> str:
    """How far the pictured images are from real ones, in words."""
    if not distances:
        return ""
    copies, others = sum(d == 0 for d in distances), [d for d in distances if d > 0]
    if not others:
        return "Each is a training image as it is." if len(distances) > 1 else "It is a training image as it is."
    away = f"{statistics.median(others):.0f} of 255 grey levels from its nearest training image (median)"
    if not copies:
        return f"None is a training image; each is {away}."
    return f"{copies} of {len(distances)} are training images as they are; any other is {away}."


def _crossings(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """For each recipe and IPC that several nets were trained with: the same sets, one column per net."""
    tables: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        own, setting = entry.rows[0], entry.setting
        key = (setting.dataset, setting.teacher, setting.teacher_acc, own.recipe, setting.regime, setting.labels)
        tables.setdefault((*key, setting.ipc), []).append(entry)
    found = []
    for group in tables.values():
        columns = list(dict.fromkeys((e.setting.student, e.setting.recipe) for e in group))
        if len({student for student, _ in columns}) < 2:
            continue
        lines: dict[str, dict[tuple[str, str], Entry]] = {}
        for entry in group:
            lines.setdefault(entry.method, {})[entry.setting.student, entry.setting.recipe] = entry
        best = {column: max(own[column].mean for own in lines.values() if column in own) for column in columns}
        repeated = len({student for student, _ in columns}) < len(columns)
        setting, recipe = group[0].setting, group[0].rows[0].recipe
        parts = (setting.context, f"IPC {setting.ipc}", f"{recipe} recipe", labels(setting))
        found.append(
            {
                "title": " \u00b7 ".join(part for part in parts if part),
                "columns": [f"{student}, {name}" if repeated else student for student, name in columns],
                "lines": [
                    (m, [(own.get(c), c in own and own[c].mean == best[c]) for c in columns])
                    for m, own in lines.items()
                ],
            }
        )
    return found[:MOST_CHARTS]


def _shown(failure: Failure) -> dict[str, str]:
    texts = {"error": failure.error[:MOST_TEXT], "hint": failure.hint[:MOST_TEXT]}
    trace = failure.traceback
    texts["traceback"] = trace if len(trace) <= MOST_TEXT else f"...\n{trace[-MOST_TEXT:]}"
    return {"where": failure.where, "step": failure.step, **texts}
