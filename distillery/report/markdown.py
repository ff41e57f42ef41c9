"""report.md: the leaderboard, the weaknesses and the failures as plain Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from distillery.report.load import Failure
from distillery.report.notes import HOW_TO_READ, Note, title
from distillery.report.table import Entry, by_setting

HEAD = "| method | last % | best % | vs random | vs teacher | seeds |\n|:--|--:|--:|--:|--:|--:|"


def markdown(
    name: str,
    said: str,
    facts: dict[str, str],
    entries: Sequence[Entry],
    notes: Sequence[Note],
    failures: Sequence[Failure],
) -> str:
    """The whole page; names and errors are escaped, because they come from users. `said`: the answer."""
    lines = [f"# {escape(name)}", "", *([f"**{escape(said)}**", ""] if said else [])]
    lines += [*(f"- {key}: {escape(value)}" for key, value in facts.items()), ""]
    lines += ["## Leaderboard", ""]
    lines += [HOW_TO_READ, ""] if entries else ["No cell has a result, so there is nothing to compare.", ""]
    for setting, group in by_setting(entries).items():
        lines += [f"### {escape(title(setting))}", "", HEAD, *map(_line, group), ""]
    if notes:
        lines += ["## Before you believe it", ""]
        lines += [f"- {note.text}: {escape('; '.join(note.where))}" for note in notes]
        lines += [""]
    if failures:
        lines += ["## Failures", "", *(_failure(failure) for failure in failures), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for character in "\\`*[]|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _line(entry: Entry) -> str:
    spread = "" if entry.std is None else f" \u00b1 {entry.std:.2f}"
    tie = " (tie)" if entry.tie else ""
    random = "-" if entry.to_random is None else f"{entry.to_random:+.2f}{tie}"
    method = f"{escape(entry.method)} (baseline)" if entry.baseline else f"**{escape(entry.method)}**"
    cells = (method, f"{entry.mean:.2f}{spread}", f"{entry.best:.2f}", random, f"{entry.to_teacher:+.2f}", str(entry.n))
    return f"| {' | '.join(cells)} |"


def _failure(failure: Failure) -> str:
    hint = f" *What to do:* {escape(failure.hint)}" if failure.hint else ""
    return f"- **{escape(failure.where)}**, {escape(failure.step)}: {escape(failure.error[:1000])}{hint}"
