"""The result in one sentence: the best method, beside random images, beside training on everything, and its price."""

from __future__ import annotations

from collections.abc import Sequence

from distillery.report.load import reached, several
from distillery.report.table import Entry, by_setting
from distillery.report.words import duration


def answer(entries: Sequence[Entry], seconds: float) -> str:
    """The sentence; "" where nothing was measured.

    Args:
        entries: the leaderboard.
        seconds: what the whole run computed.
    """
    if not entries:
        return ""
    best = max([e for e in entries if not e.baseline] or entries, key=lambda e: e.mean)
    ipc, spread = best.setting.ipc, "" if best.std is None else f" \u00b1 {best.std:.1f}"
    said = f"{best.method} with {ipc} image{'s' * (ipc > 1)} per class reaches {best.mean:.1f}{spread} %"
    said += f" on {best.setting.dataset} ({best.setting.student}, "
    said += "one seed)" if best.n == 1 else f"{best.n} seeds)"
    parts = [said + _share(best), _place(best, by_setting(entries)[best.setting]), _less(best)]
    parts.append(f"{duration(seconds)} of compute in all" if seconds else "")
    return "; ".join(part for part in parts if part) + "."


def _share(best: Entry) -> str:
    teacher, accuracy = best.setting.teacher, best.setting.teacher_acc
    if not accuracy:
        return ""
    share = f", {100 * best.mean / accuracy:.0f} % of"
    if best.setting.own_net:
        return f"{share} the {accuracy:.1f} % that the same net reaches on all images"
    who = "teachers reach" if several(teacher) else f"teacher {teacher} reaches"
    return f"{share} what its {who} ({reached(teacher, accuracy)})"


def _place(best: Entry, group: Sequence[Entry]) -> str:
    leader = max(group, key=lambda e: e.mean)
    methods = len({e.rows[0].method for e in group})
    said = f"the best of {methods} methods" if methods > 1 else ""
    if len(group) > methods == 1:
        said = f"the best of {len(group)} variants"
    if leader.mean > best.mean:
        said = f"behind {leader.method} ({leader.mean:.1f} %)"
    if best.to_random is None:
        return said
    beside = f"{abs(best.to_random):.1f} points {'over' if best.to_random >= 0 else 'under'} random images"
    if best.tie:
        beside = f"not told apart from random images ({best.to_random:+.1f} points)".replace("-", "\u2212")
    return f"{said}, {beside}" if said else beside


def _less(best: Entry) -> str:
    row = best.rows[0]
    if not row.real_images or not row.images or row.real_images < 2 * row.images:
        return ""
    return f"{row.real_images / row.images:,.0f} times fewer images"
