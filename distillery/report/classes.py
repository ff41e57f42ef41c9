"""What the students got right and wrong, class by class: accuracies, and what was mistaken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distillery import evaluate
from distillery.report import charts
from distillery.report.load import Outcome, Row
from distillery.report.notes import title
from distillery.report.table import Entry, Setting

MOST_CLASSES = 100  # in a table of accuracies by class
MOST_NAMED = 20  # in a confusion matrix with its numbers
MOST_DRAWN = 200  # in one without
EXTREMES = 10  # of more classes only so many at either end are named
LISTED = 8  # mistakes


def heat(settings: Mapping[Setting, list[Entry]], classes: Sequence[str], most: int) -> dict[str, Any]:
    """Tables of accuracy by class, one per setting, while they fit; `left_out` says how many did not.

    `methods` is how many columns the widest has.

    Args:
        settings: entries by setting.
        classes: names.
        most: numbers in all tables together.
    """
    tables: list[dict[str, Any]] = []
    cells = left_out = 0
    for setting, group in settings.items():
        columns = [(e, per_class(e.rows)) for e in group]
        columns = [(e, values) for e, values in columns if len(values) == len(classes)]
        if not columns or not classes:
            continue
        shown = list(range(len(classes)))
        if len(classes) > MOST_CLASSES:
            ranked = sorted(shown, key=lambda i: -columns[0][1][i])
            shown = [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
        cells += len(columns) * len(shown)
        if cells > most:
            left_out += 1
            continue
        lines = [(classes[i], [values[i] for _, values in columns]) for i in shown]
        tables.append({"title": title(setting), "methods": [e.method for e, _ in columns], "lines": lines})
    partial = EXTREMES if len(classes) > MOST_CLASSES else 0
    widest = max((len(table["methods"]) for table in tables), default=0)
    return {"tables": tables, "methods": widest, "left_out": left_out, "classes": len(classes), "partial": partial}


def per_class(rows: Sequence[Row]) -> list[float]:
    """Mean accuracy of each class over rows, percent."""
    count = min((len(row.per_class) for row in rows), default=0)
    return [sum(row.per_class[i] for row in rows) / len(rows) for i in range(count)]


def confusions(
    settings: Mapping[Setting, list[Entry]], outcomes: Sequence[Outcome], classes: Sequence[str], most: int
) -> list[dict[str, Any]]:
    """What the best method of each setting took for what, over all its seeds; the best settings first.

    Args:
        settings: entries by setting, best first.
        outcomes: the cells, for their predictions.
        classes: names.
        most: matrices at most.
    """
    folders = {o.cell["id"]: o.folder for o in outcomes if o.cell and o.folder}
    found: list[dict[str, Any]] = []
    for setting, group in sorted(settings.items(), key=lambda item: -item[1][0].mean):
        best = next((e for e in group if not e.baseline), group[0])
        counts = [_counts(row, folders.get(row.cell), len(classes)) for row in best.rows]
        known = [own for own in counts if own is not None]
        if known and len(found) < most:
            found.append(_matrix(best, torch.stack(known).sum(0), classes) | {"title": title(setting)})
    return found


def _counts(row: Row, folder: Any, classes: int) -> Tensor | None:
    if folder is None or classes < 2:
        return None
    return evaluate.confusion(folder, row.place, classes)


def _matrix(entry: Entry, counts: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The matrix as percent of each true class, and the most frequent mistakes in words."""
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    wrong = counts.clone().fill_diagonal_(0)
    top = wrong.flatten().argsort(descending=True, stable=True)[:LISTED].tolist()
    places = [divmod(place, len(classes)) for place in top if wrong.flatten()[place] > 0]
    mistakes = [(classes[true], classes[taken], float(shares[true, taken])) for true, taken in places]
    named, drawn = len(classes) <= MOST_NAMED, MOST_NAMED < len(classes) <= MOST_DRAWN
    said = ", ".join(f"{true} taken for {taken} {share:.0f} %" for true, taken, share in mistakes[:3])
    return {
        "method": entry.method,
        "mistakes": mistakes,
        "lines": list(zip(classes, shares.tolist(), strict=True)) if named else [],
        "picture": charts.matrix(shares) if drawn else None,
        "alt": f"Confusion matrix of {entry.method}, {len(classes)} classes; most often {said}",
    }
