"""Write the accuracy tables of README.md and docs/results/README.md from the committed result folders.

    python benchmarks/tables.py            # rewrite
    python benchmarks/tables.py --check    # exit 1 when a table differs from the results (the tests ask this)

A table stands between `<!-- results -->` and `<!-- /results -->`. Nothing in it is typed by hand.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = ("data set", "teacher", "IPC", "student", "recipe", "method", "last", "best", "seeds", "source")
Row = dict[str, str]


def rows() -> list[Row]:
    """Every finished row of every result folder, with the folder's name."""
    found = []
    for path in sorted(RESULTS.glob("*/results.csv")):
        with path.open(newline="") as file:
            found += [row | {"source": path.parent.name} for row in csv.DictReader(file) if row["acc_last"]]
    return found


def table() -> str:
    """One line per method under one recipe: mean and sample standard deviation over seeds, in percent."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows():
        teacher = f"{row['teacher']} {float(row['teacher_acc']):.1f}"
        key = (row["dataset"], teacher, row["ipc"], row["student"], row["recipe"], row["method"], row["source"])
        groups[key].append(row)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for key in sorted(groups, key=_order):
        *shown, source = key
        own = groups[key]
        last, best = (_mean([float(row[name]) for row in own]) for name in ("acc_last", "acc_best"))
        link = f"[log](docs/results/{source})"
        lines.append("| " + " | ".join([*shown, last, best, str(len(own)), link]) + " |")
    return "\n".join(lines)


def _order(key: tuple[str, ...]) -> tuple[object, ...]:
    rank = {"rded": 0, "median": 1, "random": 2}
    dataset, teacher, ipc, student, recipe, method, source = key
    return (dataset, source, int(ipc), student, recipe, rank.get(method, 9), method, teacher)


def _mean(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def replaced(text: str, content: str) -> str:
    """The text with what stands between the markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def main() -> int:
    """Rewrite or check both files."""
    stale = []
    for path, prefix in ((ROOT / "README.md", "docs/results/"), (RESULTS / "README.md", "")):
        before = path.read_text()
        after = replaced(before, table().replace("docs/results/", prefix))
        if after != before:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(after)
    if "--check" in sys.argv and stale:
        print(f"{', '.join(stale)}: the tables differ from docs/results; run python benchmarks/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
