"""Rows -> results.csv and the leaderboard: mean and std over seeds, distances to random and to the teacher.

The last epoch's accuracy is the result; the best epoch stands beside it, because choosing an epoch on the test images
flatters. Rows are compared only inside one setting: same data, teacher, IPC, student, recipe and label mode.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.config import STEPS, canonical
from distillery.report.load import Row, reached, several

BASELINES = ("random", "median")  # real images, nothing synthesized
TIE = 0.5  # points: smaller gaps are ties whatever the std says
MIN_SEEDS = 3
PLAIN = ("dataset", "method", "ipc", "seed", "student", "recipe", "regime", "acc_last", "acc_best", "teacher")
COUNTS = ("images", "image_bytes", "label_bytes", "fkd_bytes", "views")
COLUMNS = (
    *(*PLAIN, "teacher_acc"),
    *(f"seconds_{step}" for step in STEPS),
    *(*COUNTS, "code_version", "hardware", "status", "failure", "labels", "options", "cell"),
)


@dataclass(frozen=True)
class Setting:
    """What two rows must share to be compared."""

    dataset: str
    teacher: str
    teacher_acc: float  # percent
    ipc: int
    student: str
    recipe: str
    regime: str
    labels: str
    identity: str  # canonical JSON of everything that the names above may hide
    context: str  # data and teacher in words where the report has more than one, else ""
    own_net: bool = False  # the teacher is the student's own net, trained on all images

    @property
    def series(self) -> tuple[str, ...]:
        """The setting without its IPC: what one accuracy-versus-IPC chart holds fixed."""
        teacher = (self.teacher, f"{self.teacher_acc:.6f}")
        return (self.dataset, *teacher, self.student, self.recipe, self.regime, self.labels)


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard. Accuracies in percent, distances in points."""

    setting: Setting
    method: str  # with the options that tell it from the same method's other entries
    baseline: bool
    mean: float  # of the last epoch, over seeds
    std: float | None  # sample std over seeds; None for one seed
    best: float  # mean of the best epochs
    n: int  # seeds
    to_random: float | None  # None: is random, or no random beside it
    noise: float | None  # what a distance must exceed; None where a std is missing
    to_teacher: float
    rows: tuple[Row, ...]

    @property
    def tie(self) -> bool | None:
        """Whether the distance to random is inside the noise; None where that cannot be said."""
        if self.to_random is None:
            return None
        if abs(self.to_random) < TIE:
            return True
        return None if self.noise is None else abs(self.to_random) < self.noise


def order(row: Row) -> tuple[object, ...]:
    """Sort key of rows: independent of the order in which results arrive."""
    return (row.dataset, row.ipc, row.student, row.recipe, row.regime, row.method, row.options, row.seed, row.cell)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """results.csv: one line per cell and student; accuracies in percent, sizes in bytes, times in seconds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_csv_line(row) for row in rows)


def leaderboard(rows: Sequence[Row]) -> list[Entry]:
    """Entries, settings in order (data, IPC, student, recipe), best mean first inside a setting."""
    grouped: dict[Setting, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    method_name = _names(rows, lambda r: (r.method, r.options))
    setting_of = _settings(rows)
    for row in rows:
        if row.acc_last is not None:
            grouped[setting_of(row)][method_name(row)].append(row)
    entries = []
    for setting in sorted(grouped, key=_setting_order):
        found = [_entry(setting, name, group) for name, group in sorted(grouped[setting].items())]
        random = next((e for e in found if e.rows[0].method == "random"), None)
        entries += sorted((_beside(e, random) for e in found), key=lambda e: (-e.mean, e.method))
    return entries


def by_setting(entries: Iterable[Entry]) -> dict[Setting, list[Entry]]:
    """Entries of each setting, order kept."""
    found: dict[Setting, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.setting, []).append(entry)
    return found


def mean_by_seed(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[float]:
    """One value per seed of the synthetic set: the std is over sets, not over students of one set."""
    per_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found = value(row)
        if found is not None:
            per_seed[row.seed].append(found)
    return [statistics.fmean(per_seed[seed]) for seed in sorted(per_seed)]


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation, None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def scalars(entry: Entry) -> dict[str, Any]:
    """The entry as plain JSON values, rounded as shown."""
    setting = entry.setting
    names = ("dataset", "teacher", "ipc", "student", "recipe", "regime", "labels")
    numbers = {
        "acc_last": entry.mean,
        "acc_last_std": entry.std,
        "acc_best": entry.best,
        "to_random": entry.to_random,
        "to_teacher": entry.to_teacher,
        "teacher_acc": setting.teacher_acc,
    }
    shown = {k: None if v is None else round(v, 2) for k, v in numbers.items()}
    facts = {"method": entry.method, "baseline": entry.baseline, "seeds": entry.n, "tie_with_random": entry.tie}
    return {name: getattr(setting, name) for name in names} | facts | shown


def _csv_line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {name: getattr(row, name) for name in (*PLAIN, *COUNTS, "labels", "options", "cell")}
    accuracies = {k: getattr(row, k) for k in ("acc_last", "acc_best", "teacher_acc")}
    line |= {k: "" if v is None else f"{v:.2f}" for k, v in accuracies.items()}
    line |= {f"seconds_{s}": f"{row.seconds[s]:.2f}" if s in row.seconds else "" for s in STEPS}
    line |= {"code_version": row.code_version, "hardware": row.hardware}
    return line | {"status": "failed" if row.failure else "ok", "failure": row.failure}


def _entry(setting: Setting, name: str, rows: Sequence[Row]) -> Entry:
    last = mean_by_seed(rows, lambda r: r.acc_last)
    mean = statistics.fmean(last)
    return Entry(
        setting=setting,
        method=name,
        baseline=rows[0].method in BASELINES,
        mean=mean,
        std=spread(last),
        best=statistics.fmean(mean_by_seed(rows, lambda r: r.acc_best)),
        n=len(last),
        to_random=None,
        noise=None,
        to_teacher=mean - setting.teacher_acc,
        rows=tuple(rows),
    )


def _beside(entry: Entry, random: Entry | None) -> Entry:
    """The entry with its distance to random, and two standard errors of that distance."""
    if random is None or entry is random or entry.rows[0].method == "random":
        return entry
    noise = None
    if entry.std is not None and random.std is not None:
        noise = max(TIE, 2 * math.sqrt(entry.std**2 / entry.n + random.std**2 / random.n))
    return Entry(**{**vars(entry), "to_random": entry.mean - random.mean, "noise": noise})


def _settings(rows: Sequence[Row]) -> Callable[[Row], Setting]:
    student_name = _names(rows, lambda r: (r.student, r.net_options))
    recipe_name = _names(rows, lambda r: (r.recipe, r.recipe_values))
    different = len({(r.dataset, r.teacher, r.teacher_acc) for r in rows if r.teacher_acc is not None}) > 1

    def setting(row: Row) -> Setting:
        assert row.teacher_acc is not None, f"{row.cell} has a result but no teacher accuracy"
        who = "teachers" if several(row.teacher) else "teacher"
        context = f"{row.dataset}, {who} {row.teacher} at {reached(row.teacher, row.teacher_acc)}"
        return Setting(
            dataset=row.dataset,
            teacher=row.teacher,
            teacher_acc=row.teacher_acc,
            ipc=row.ipc,
            student=student_name(row),
            recipe=recipe_name(row),
            regime=row.regime,
            labels="none" if row.regime == "hard" else row.labels,
            identity=canonical([row.net_options, row.recipe, row.recipe_values, row.labels]),
            context=context if different else "",
            own_net=row.taught_by_own_net,
        )

    return setting


def _setting_order(setting: Setting) -> tuple[object, ...]:
    return (*setting.series[:3], setting.ipc, *setting.series[3:], setting.identity)


def _names(rows: Sequence[Row], split: Callable[[Row], tuple[str, str]]) -> Callable[[Row], str]:
    """Names that tell apart what shares a name: `rded`, or `rded factor=1` and `rded factor=2` where both occur.

    Only differences at one IPC count: defaults that grow with IPC are not variants.
    """
    variants: dict[tuple[str, int], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        base, values = split(row)
        variants[base, row.ipc][values] = _flat(json.loads(values))
    varying: dict[str, set[str]] = defaultdict(set)
    for (base, _), found in variants.items():
        varying[base] |= _varying(list(found.values()))

    def name(row: Row) -> str:
        base, values = split(row)
        own = variants[base, row.ipc][values]
        return " ".join([base, *(f"{key}={own.get(key, 'default')}" for key in sorted(varying[base]))])

    return name


def _varying(variants: Sequence[dict[str, str]]) -> set[str]:
    keys = {key for variant in variants for key in variant}
    return {key for key in keys if len({variant.get(key) for variant in variants}) > 1}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value if isinstance(value, str) else canonical(value)}
    return {k: v for key in sorted(value) for k, v in _flat(value[key], f"{prefix}{key}.").items()}
