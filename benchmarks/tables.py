"""Write the generated parts of the pages: tables of results, and what a method's page says about its options.

    python benchmarks/tables.py            # rewrite
    python benchmarks/tables.py --check    # exit 1 when a part differs from its source (the tests ask this)

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. Results come from the committed result folders, options,
recipes and costs from the methods themselves, what pods ask for from the tables that ask for it; nothing in a part is
typed by hand.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pictures, reference
from distillery import estimate, methods
from distillery.config import plain
from distillery.data import DATASETS
from distillery.methods import METHODS, Method
from distillery.profiles import PROFILES

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "docs" / "results", ROOT / "docs" / "methods"
HEAD = ("data set", "teacher", "IPC", "student", "recipe", "method", "last", "best", "seeds", "source")
RANK = {"rded": 0, "median": 1, "random": 2}
COSTS = ("cifar10", "imagenette")  # data sets of the cost columns, at IPC 10
TFLOPS = 20.0  # that the sizing table assumes
USES = ("architectures", "continual", "sharing")  # cases of benchmarks/use_cases.py
BY_HAND = ("First images", "Loss", "Made together")  # lines of a method's page that the comparison repeats
Row = dict[str, str]
Key = tuple[str, ...]


def rows() -> list[Row]:
    """Every finished row of every result folder, with the folder's name."""
    found = []
    for path in sorted(RESULTS.glob("*/results.csv")):
        with path.open(newline="") as file:
            found += [row | {"source": path.parent.name} for row in csv.DictReader(file) if row["acc_last"]]
    return found


def groups() -> dict[Key, list[Row]]:
    """Rows that differ in the seed alone, by data set, teacher, IPC, student, recipe, method, options, source."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows():
        teacher = f"{row['teacher']} {float(row['teacher_acc']):.1f}"
        setting = (row["dataset"], teacher, row["ipc"], row["student"], row["recipe"])
        found[*setting, row["method"], changed(row), row["source"]].append(row)
    return found


def changed(row: Row) -> str:
    """The options in which a row differs from its method's recipe, as text."""
    usual = plain(methods.config_of(row["method"], {}, row["dataset"], int(row["ipc"])))
    return values({k: v for k, v in json.loads(row["options"]).items() if usual.get(k) != v})


def results(folder: str) -> str:
    """One line per method under one recipe: mean and sample standard deviation over seeds, in percent."""
    found, lines = groups(), []
    for key in sorted(found, key=_order):
        *setting, method, options, source = key
        named = f"{method} ({options})" if options else method
        lines.append([*setting, named, *_accuracies(found[key]), f"[log]({folder}{source})"])
    return markdown(HEAD, lines)


def _order(key: Key) -> tuple[object, ...]:
    dataset, teacher, ipc, student, recipe, method, options, source = key
    return (dataset, source, int(ipc), student, recipe, RANK.get(method, 9), method, options, teacher)


def _accuracies(own: list[Row]) -> list[str]:
    """Last, best, and the number of seeds."""
    return [*(_mean([float(row[name]) for row in own]) for name in ("acc_last", "acc_best")), str(len(own))]


def _mean(numbers: list[float]) -> str:
    mean = f"{statistics.mean(numbers):.1f}"
    return f"{mean} +- {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def measured(name: str) -> str:
    """A method's own lines of the results, with random real images under the same setting beside them."""
    found, lines = groups(), []
    for key in sorted(found, key=_order):
        *setting, method, options, source = key
        if method != name:
            continue
        last, best, seeds = _accuracies(found[key])
        baseline = found.get((*setting, "random", "", source))
        random = [_accuracies(baseline)[0] if baseline else "not run"] if name != "random" else []
        lines.append([*setting, options or "-", last, best, *random, seeds, f"[log](../results/{source})"])
    beside = ["random, last"] if name != "random" else []
    head = [*HEAD[:5], "options changed", "last", "best", *beside, "seeds", "source"]
    return markdown(head, lines) if lines else "Not measured yet."


def options(method: Method) -> str:
    """A method's options with default and meaning."""
    fields = method.Config.model_fields.items()
    lines = [[f"`{key}`", f"`{value(option.default)}`", option.description or ""] for key, option in fields]
    return markdown(("option", "default", "meaning"), lines) if lines else "It has none."


def recipes(method: Method) -> str:
    """What a method changes by itself on some data sets; equal ones share a line."""
    shared: dict[tuple[int, str], list[str]] = defaultdict(list)
    for (dataset, ipc), changes in method.RECIPES.items():
        shared[ipc, values(changes)].append(dataset)
    lines = [[", ".join(sets), str(ipc or "any"), said] for (ipc, said), sets in shared.items()]
    return markdown(("data set", "IPC", "options"), lines) if lines else "The defaults hold on every data set."


def value(one: object) -> str:
    """An option's value as it is written in YAML."""
    return one if isinstance(one, str) else json.dumps(one)


def values(some: dict[str, Any]) -> str:
    """Options in a row: `lr 0.1, crop none`."""
    return ", ".join(f"{key} {value(one)}" for key, one in some.items())


def summary(folder: str) -> str:
    """One line per method for the README."""
    done, lines = {row["method"] for row in rows()}, []
    for name, method in METHODS.items():
        called, _, line = first_line(method).partition(": ")
        lines.append([f"[{name}]({folder}{name}.md)", called, line.rstrip("."), "yes" if name in done else "not yet"])
    return markdown(("in the YAML", "method", "in a line", "measured here"), lines)


def first_line(method: Method) -> str:
    """What a method's file says first."""
    return (method.__doc__ or "").strip().splitlines()[0]


def comparison() -> str:
    """All methods side by side: what their pages say first, what they need, and what an image costs."""
    head = [*BY_HAND, "Teachers", "Statistics gathered first", *(f"Cost on {name}" for name in COSTS)]
    lines = []
    for name, method in METHODS.items():
        page = PAGES / f"{name}.md"
        needs, text = method.NEEDS, page.read_text() if page.exists() else ""
        by_hand = [_after(f"- {label}: ", text) for label in BY_HAND]
        teachers = "several" if needs.several else "one" if needs.teacher else "only to label"
        gathered = ", ".join(needs.statistics) or "none"
        lines.append([f"[{name}]({name}.md)", *by_hand, teachers, gathered, *(cost(name, one) for one in COSTS)])
    return markdown(["Method", *head], lines)


def _after(label: str, text: str) -> str:
    """The rest of the line that begins with a label, without its full stop."""
    found = re.search(f"^{re.escape(label)}(.*)$", text, re.MULTILINE)
    return found.group(1).rstrip(".") if found else "?"


def cost(name: str, dataset: str) -> str:
    """Passes of the teacher for one image at IPC 10: forward, and backward."""
    info, ipc = DATASETS[dataset], 10
    cfg, classes = methods.config_of(name, {}, dataset, ipc), len(info.classes)
    found = METHODS[name].estimate(cfg, ipc=ipc, classes=classes, size=info.size, train=info.train)
    forwards, backwards = (found.get(which, 0) / (classes * ipc) for which in ("forwards", "backwards"))
    return f"{forwards:,.0f} + {backwards:,.0f}" if backwards else f"{forwards:,.0f}"


def costs(name: str) -> str:
    """The same in a sentence, for the method's page."""
    said = " and ".join(f"{cost(name, one)} on {one}" for one in COSTS)
    return f"Passes of the teacher for one image at IPC 10 (forward + backward): {said}."


def sizing() -> str:
    """What the experiments of docs/sizing cost on the machine that the page assumes: the lines of `distillery plan`."""
    plans, taught = {}, []
    for path in sorted((ROOT / "docs" / "sizing").glob("*.yaml")):
        lines = [line.strip() for line in estimate.table(str(path), TFLOPS).splitlines()]
        taught.append(", ".join(line.removeprefix("teacher ") for line in lines if line.startswith("teacher ")))
        plans[path.stem] = {line.split("-")[0]: re.split(r"\s{2,}", line)[1:] for line in lines}
        if lacking := [name for name in METHODS if name not in plans[path.stem]]:
            raise ValueError(f"{path.relative_to(ROOT)}: no cell of {', '.join(lacking)}; add a line under methods")
    found = [["teachers, once", *taught]]
    for name in METHODS:
        cells = [plan[name] for plan in plans.values()]
        found.append([name, *(f"{made} + {trained}, {memory}" for made, trained, memory, *_ in cells)])
    cells = [plan["random"] for plan in plans.values()]
    found.append(["images, each method", *(images for *_, images, _ in cells)])
    return markdown(["synthesize + student, memory", *plans], found)


def profiles() -> str:
    """What each part of a run asks for, by hardware profile."""
    lines = [[f"`{name}`", *(str(ask) for ask in vars(row).values())] for name, row in PROFILES.items()]
    return markdown(["profile", *next(iter(map(vars, PROFILES.values())))], lines)


def constants() -> str:
    """What each step's pod has whatever the profile."""
    from pipelines.resources import HOURS, NEEDS

    lines = []
    for step, need in NEEDS.items():
        own = f"cpu {need.cpu}, memory {need.memory}" if need.cpu else "the profile's"
        lines.append([f"`{step}`", own, need.shm, need.scratch, f"{need.deadline / HOURS:g} h"])
    return markdown(["step", "cpu, memory", "/dev/shm", "scratch", "deadline"], lines)


def use_case(name: str) -> str:
    """What the newest result folder of a use case reports, and where it is."""
    path = sorted(RESULTS.glob(f"*_use_case_{name}/report.md"))[-1]
    said = path.read_text().split("\n\n", 2)[2].strip()
    return f"{said}\n\nFrom [results/{path.parent.name}](results/{path.parent.name})."


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|" + " --- |" * len(head)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def replaced(text: str, part: str, content: str) -> str:
    """The text with what stands between a part's markers replaced.

    Raises:
        ValueError: the part is not there exactly once.
    """
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(end) < text.index(begin):
        raise ValueError(f"the part {part!r} is there {text.count(begin)} times; keep one pair of {begin} and {end}")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def parts() -> dict[Path, dict[str, str]]:
    """Every page with its generated parts."""
    found = {
        ROOT / "README.md": {"results": results("docs/results/"), "methods": summary("docs/methods/")},
        RESULTS / "README.md": {"results": results("")},
        PAGES / "README.md": {"methods": comparison()},
        ROOT / "docs" / "operations.md": {"sizing": sizing()},
        ROOT / "docs" / "resources.md": {"profiles": profiles(), "constants": constants()},
        ROOT / "docs" / "use_cases.md": {name: use_case(name) for name in USES},
        ROOT / "docs" / "experiment.md": {part: markdown(*table) for part, table in reference.tables().items()},
    }
    for name, method in METHODS.items():
        own = {"options": options(method), "recipes": recipes(method), "measured": measured(name)}
        own |= {"cost": costs(name), "picture": pictures.shown(name)}
        found[PAGES / f"{name}.md"] = own
    return found


def main() -> int:
    """Rewrite or check all pages."""
    checking, wrong = "--check" in sys.argv, []
    try:
        pages = parts()
    except ValueError as error:
        sys.exit(str(error))
    for path, own in pages.items():
        named = path.relative_to(ROOT).as_posix()
        if not path.exists():
            wrong.append(f"{named}: the page is missing; write it beside the others")
            continue
        before = after = path.read_text()
        try:
            for part, content in own.items():
                after = replaced(after, part, content)
        except ValueError as error:
            wrong.append(f"{named}: {error}")
            continue
        if after != before and checking:
            wrong.append(f"{named}: differs from its source; run python benchmarks/tables.py")
        elif after != before:
            path.write_text(after)
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
