"""What a reader must know before believing the numbers, and the words shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillery.methods import REPRODUCED
from distillery.report.load import Outcome
from distillery.report.table import MIN_SEEDS, TIE, Entry, Setting, by_setting

LISTED = 8  # blocks named in one note
HOW_TO_READ = (
    "Top-1 accuracy on the validation images, in percent: the last epoch, mean and sample standard deviation over "
    "seeds. Distances are in points. Only rows of one block are comparable: same IPC (images per class), student, "
    "recipe and labels. The best epoch is chosen with the validation images, so it flatters."
)


@dataclass(frozen=True)
class Note:
    """A weakness of the numbers, and where it applies."""

    text: str
    where: tuple[str, ...]


@dataclass(frozen=True)
class Past:
    """How a run stands beside the one before it in the history.

    Attributes:
        run: id of the run before; "" = there is none.
        regressions: what is worse, each as the mapping of a `history.Regression`.
        metrics: named finite numbers of the comparison.
        unwritten: why this run could not be entered into the history; "" = it was, or none is kept.
    """

    run: str = ""
    regressions: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    unwritten: str = ""


def title(setting: Setting) -> str:
    """The setting in words."""
    parts = (setting.context, f"IPC {setting.ipc}", setting.student, f"{setting.recipe} recipe", labels(setting))
    return " \u00b7 ".join(part for part in parts if part)


def labels(setting: Setting) -> str:
    """The label mode in words."""
    if setting.regime == "hard":
        return "hard labels"
    kind = {"on_the_fly": "on the fly"}.get(setting.labels, setting.labels.replace("-top", ", top "))
    return f"soft labels, {kind}"


def past(before: Past) -> list[Note]:
    """What the history says against the run; an empty list where it says nothing."""
    texts = _short([str(found["text"]) for found in before.regressions])
    unwritten = (before.unwritten,) if before.unwritten else ()
    lost = "This run could not be compared with the one before it, nor entered into the history"
    found = [Note(f"Worse than the run before it ({before.run})", texts), Note(lost, unwritten)]
    return [note for note in found if note.where]


def weaknesses(entries: Sequence[Entry], outcomes: Sequence[Outcome], ungated: Sequence[str] = ()) -> list[Note]:
    """Notes in order of weight; an empty list where nothing needs saying.

    Args:
        entries: the leaderboard.
        outcomes: all cells.
        ungated: teachers from which no accuracy was demanded.
    """
    unproven = sorted({e.rows[0].method for e in entries if not e.baseline} - set(REPRODUCED))
    lone = [
        title(s) for s, group in by_setting(entries).items() if not any(e.rows[0].method == "random" for e in group)
    ]
    tied = f"within {TIE} points, or within two standard errors of it; not a difference"
    found = [
        _note("Worse than random real images, beyond the noise", entries, lambda e: e.tie is False and _below(e)),
        _note("Inside the noise: the distance to random is " + tied, entries, lambda e: e.tie is True),
        _note("One seed: no spread is known, so no difference to it can be judged", entries, lambda e: e.n == 1),
        _note(f"Fewer than {MIN_SEEDS} seeds: the spread is a guess", entries, lambda e: 1 < e.n < MIN_SEEDS),
        _note(f"The best epoch differs from the last by more than {TIE} points", entries, _peaked),
        Note("No random baseline in this block, so the distance to it is unknown", _short(lone)),
        Note("No accuracy was demanded of the teacher (min_accuracy, expected_accuracy)", _short(ungated)),
        Note("The published accuracy of these methods was not reproduced with this code so far", _short(unproven)),
        _mixed("code version", sorted({o.code_version for o in outcomes if o.code_version})),
        _mixed("hardware", sorted({o.hardware for o in outcomes if o.hardware})),
    ]
    return [note for note in found if note.where]


def _below(entry: Entry) -> bool:
    return entry.to_random is not None and entry.to_random < 0


def _peaked(entry: Entry) -> bool:
    return entry.best - entry.mean > TIE


def _note(text: str, entries: Sequence[Entry], applies: Callable[[Entry], bool]) -> Note:
    found = [e for e in entries if applies(e)]
    if len(found) == len(entries) > 1:
        return Note(text, ("every entry",))
    blocks = by_setting(found).items()
    return Note(text, _short([f"{', '.join(e.method for e in own)} ({title(setting)})" for setting, own in blocks]))


def _mixed(what: str, values: Sequence[str]) -> Note:
    return Note(f"Results of more than one {what} stand side by side", _short(values) if len(values) > 1 else ())


def _short(names: Sequence[str]) -> tuple[str, ...]:
    more = len(names) - LISTED
    return (*names[:LISTED], f"and {more} more") if more > 0 else tuple(names)
