"""What a run is worse in than the run before it: accuracy, speed, or images that changed without a reason.

Accuracy is compared over seeds by Welch's t-test; with one seed the noise is not known, and a larger fixed distance
stands in for the test. Speed is compared on the same hardware only. A step that was kept or cached carries the seconds
of the run that made it, so it never counts as slower.
"""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distillery.config import SHARED, canonical
from distillery.history.record import CellRecord, Record, Regression

LEVEL = 0.05  # of the test
LEAST = 0.5  # points: smaller drops are none, whatever the test says
LONE = 2.0  # points: what counts as a drop where one of the runs has a single seed
SLOWER, SECONDS = 1.5, 5.0  # slower by this factor, and by more than these seconds
NAMED = 3  # cells named in one text


@dataclass(frozen=True, order=True)
class Key:
    """What results of two runs must share to be compared."""

    dataset: str
    ipc: int
    student: str
    recipe: str
    method: str  # with the options that tell it from the same method's other entries of a run
    teacher: str  # "" where every run has one only

    @property
    def words(self) -> str:
        """As one text."""
        parts = (self.method, f"IPC {self.ipc}", self.student, self.recipe, self.dataset, self.teacher)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Group:
    """An entry's accuracies in percent, one value per seed in the order of the seeds."""

    last: tuple[float, ...]
    best: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the last epoch."""
        return statistics.fmean(self.last)

    @property
    def std(self) -> float | None:
        """Sample deviation over seeds, None for one."""
        return statistics.stdev(self.last) if len(self.last) > 1 else None


def entries(records: Sequence[Record], loosely: bool = False) -> list[dict[Key, Group]]:
    """The entries of each run, under names that mean the same in all of them.

    Args:
        records: of the runs.
        loosely: put recipes of one preset beside each other, whatever else was written in them, where no run has two.
    """
    method_of, presets = _names(records), _presets(records) if loosely else {}
    several = any(len({cell.teacher for cell in record.cells if cell.students}) > 1 for record in records)
    found = []
    for record in records:
        seeds: dict[Key, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for cell in record.cells:
            for one in cell.students:
                if one.acc_last is not None:
                    recipe = presets.get(one.recipe, one.recipe)
                    names = (one.net, recipe, method_of(cell), cell.teacher if several else "")
                    best = one.acc_last if one.acc_best is None else one.acc_best
                    seeds[Key(cell.dataset, cell.ipc, *names)][cell.seed].append((100 * one.acc_last, 100 * best))
        found.append({key: _group(own) for key, own in sorted(seeds.items())})
    return found


def welch(one: Sequence[float], other: Sequence[float]) -> float | None:
    """p of Welch's t-test that two means are equal, two-sided; None with fewer than two values on a side."""
    if min(len(one), len(other)) < 2:
        return None
    if len(set(one)) == len(set(other)) == 1:  # no spread at all: the test divides by it
        return 1.0 if one[0] == other[0] else 0.0
    from scipy import stats  # takes a second to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that are almost the same
        p = float(stats.ttest_ind(list(one), list(other), equal_var=False).pvalue)
    return p if math.isfinite(p) else 1.0


def judge(before: Record, now: Record) -> list[Regression]:
    """Everything in which a run is worse than the one before it, heaviest kind first."""
    besides = differing(before, now)
    found = [*_accuracy(before, now), *_images(before, now), *_slower(before, now)]
    said = f" (different besides: {', '.join(besides)})" if besides else " (nothing else is known to differ)"
    return [Regression(r.kind, r.entry, r.text + said, round(r.before, 6), round(r.after, 6)) for r in found]


def differing(before: Record, now: Record) -> list[str]:
    """What could explain other numbers, in words."""
    names = [(t.name, t.net, t.accuracy) for t in before.teachers], [(t.name, t.net, t.accuracy) for t in now.teachers]
    found = {
        "configuration": before.config_sha256 != now.config_sha256,
        "code version": before.code_version != now.code_version,
        "hardware": before.hardware != now.hardware,
        "data": bool(before.data and now.data) and before.data != now.data,
        "teachers": names[0] != names[1],
    }
    return [name for name, different in found.items() if different]


def largest_drop(before: Record, now: Record) -> float:
    """How much lower the accuracy of an entry is at most, in points; 0 where none is lower."""
    old, new = entries([before, now])
    return max([0.0, *(old[key].mean - new[key].mean for key in old.keys() & new.keys())])


def _accuracy(before: Record, now: Record) -> list[Regression]:
    old, new = entries([before, now])
    found = []
    for key in [key for key in old if key in new]:
        a, b = old[key], new[key]
        drop, p = a.mean - b.mean, welch(a.last, b.last)
        if drop > (LONE if p is None else LEAST) and (p is None or p < LEVEL):
            why = f"one seed, so anything above {LONE:g} points counts" if p is None else f"Welch's p {p:.2g}"
            seeds = f"{len(a.last)} and {len(b.last)} seeds"
            text = f"{key.words}: {a.mean:.2f} -> {b.mean:.2f} %, {drop:.2f} points lower ({why}; {seeds})"
            found.append(Regression("accuracy", key.words, text, a.mean / 100, b.mean / 100))
    return found


def _images(before: Record, now: Record) -> list[Regression]:
    """Other images under an equal configuration, one line per method and IPC."""
    if before.config_sha256 != now.config_sha256:
        return []
    known = {cell.id: cell.images_sha256 for cell in before.cells}
    compared = [cell for cell in now.cells if cell.images_sha256 and known.get(cell.id)]
    found = []
    for words, own in _by_entry(compared).items():
        changed = [cell.id for cell in own if cell.images_sha256 != known[cell.id]]
        if changed:
            text = f"{words}: the images of {_some(changed)} changed under an equal configuration"
            found.append(Regression("images", words, text, len(own), len(changed)))
    return found


def _slower(before: Record, now: Record) -> list[Regression]:
    """Steps that took longer on the same hardware: means over the cells that both runs have."""
    found = []
    old = {cell.id: cell for cell in before.cells}
    both = [c for c in now.cells if c.id in old and c.hardware and c.hardware == old[c.id].hardware]
    for words, own in _by_entry(both).items():
        for step in sorted({step for cell in own for step in cell.seconds} - set(SHARED)):
            pairs = [(old[c.id].seconds[step], c.seconds[step]) for c in own if _timed(step, old[c.id], c)]
            found += _time(f"{step} of {words}", pairs)
    if before.hardware == now.hardware and _taught(before) == _taught(now):
        for step in [step for step in SHARED if step in before.steps and step in now.steps]:
            found += _time(step, [(before.steps[step], now.steps[step])])
    return found


def _time(what: str, pairs: Sequence[tuple[float, float]]) -> list[Regression]:
    if not pairs:
        return []
    a, b = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    if b <= SLOWER * a or b - a <= SECONDS:
        return []
    text = f"{what}: {a:.1f} -> {b:.1f} s" + (f", {b / a:.1f} times as long" if a > 0 else "")
    return [Regression("slower", what, f"{text} on the same hardware", a, b)]


def _timed(step: str, one: CellRecord, other: CellRecord) -> bool:
    return one.failure is None and other.failure is None and step in one.seconds and step in other.seconds


def _taught(record: Record) -> list[str]:
    return [teacher.name for teacher in record.teachers]


def _by_entry(cells: Iterable[CellRecord]) -> dict[str, list[CellRecord]]:
    found: dict[str, list[CellRecord]] = defaultdict(list)
    for cell in cells:
        found[f"{cell.entry or cell.method}, IPC {cell.ipc}, {cell.dataset}"].append(cell)
    return dict(sorted(found.items()))


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _group(seeds: Mapping[int, Sequence[tuple[float, float]]]) -> Group:
    each = [seeds[seed] for seed in sorted(seeds)]
    last, best = ([statistics.fmean(pair[side] for pair in own) for own in each] for side in (0, 1))
    return Group(tuple(last), tuple(best))


def _names(records: Sequence[Record]) -> Callable[[CellRecord], str]:
    """Methods under names that tell the entries of a run apart, alike in all runs.

    An option counts where some run has two values of it at one IPC; an option that differs only from run to run is
    what a comparison is about.
    """
    varying: dict[str, set[str]] = defaultdict(set)
    for record in records:
        seen: dict[tuple[str, int, str], set[str]] = defaultdict(set)
        for cell in record.cells:
            if cell.students:
                for option, value in _flat(cell.options).items():
                    seen[cell.method, cell.ipc, option].add(value)
        for method, _, option in [key for key, values in seen.items() if len(values) > 1]:
            varying[method].add(option)

    def name(cell: CellRecord) -> str:
        own = _flat(cell.options)
        return " ".join([cell.method, *(f"{o}={own.get(o, 'default')}" for o in sorted(varying[cell.method]))])

    return name


def _presets(records: Sequence[Record]) -> dict[str, str]:
    """Recipe -> its preset, where that alone tells each run's recipes apart."""
    each = [{one.recipe for cell in record.cells for one in cell.students} for record in records]
    found = {recipe: re.split(r"[ (]", recipe)[0] for own in each for recipe in own}
    twice = {preset for own in each for preset, count in Counter(found[recipe] for recipe in own).items() if count > 1}
    return {recipe: preset for recipe, preset in found.items() if preset not in twice}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else canonical(value)}
    inner = [_flat(value[key], f"{prefix}.{key}" if prefix else str(key)) for key in sorted(value)]
    return {key: text for part in inner for key, text in part.items()}
