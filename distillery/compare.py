"""Runs side by side: what differs in configuration, code, hardware and results; and the list of a store's runs."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from distillery import experiment, history
from distillery.config import canonical, plain
from distillery.console import duration
from distillery.errors import DistilleryError, UserError
from distillery.history import History
from distillery.history.record import RECORD, Record, parse
from distillery.regress import LEVEL, Group, Key, differing, entries, welch
from distillery.report.table import BASELINES
from distillery.store import MissingKey, Store, open_store

REPORTS = ("", "6-report/")  # where the record lies in a report artifact, and in the folder of a run
TASK = "report/"  # where KFP keeps that step's artifacts below a run
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 60  # characters of a value in a table
LABELS = ("method", "name", "net")  # what an entry of a list is called by
ABSENT = "-"


def find(run: str, place: str = "") -> Record:
    """The record of a run.

    Args:
        run: a record's file, a report artifact, the folder of a run (as folder or URI); with `place` also a run's id or
            its beginning.
        place: the store whose history knows the id.

    Raises:
        UserError: nothing of that kind there, or an id that several runs share.
        CorruptArtifact: a record that cannot be read.
    """
    if place and "/" not in run:
        return _by_id(run, place)
    if run.endswith(".json"):
        folder, _, name = run.rpartition("/")
        with contextlib.suppress(MissingKey):
            return parse(open_store(folder or ".").read(name), run)
        raise UserError(f"{run}: there is no such record; `distillery history PLACE` lists a store's runs")
    store = open_store(run)
    for key in (f"{prefix}{RECORD}" for prefix in REPORTS):
        with contextlib.suppress(MissingKey):
            return parse(store.read(key), f"{run}/{key}")
    kept = [entry.key for entry in store.list(TASK) if entry.key.endswith(f"/{RECORD}")]
    if kept:
        return max((parse(store.read(key), f"{run}/{key}") for key in kept), key=lambda r: r.ended)
    raise UserError(
        f"{run}: no record of a run there ({RECORD} of its report); give the folder of a finished run, its "
        "report artifact, or a file under history/. A run of an older version gets one when it is started again"
    )


def _by_id(run: str, place: str) -> Record:
    store: Store = open_store(history.folder_of(place))
    keys = [entry.key for entry in store.list() if entry.key.partition("Z-")[2].startswith(run)]
    names = {key.partition("Z-")[2] for key in keys}
    exact = {name for name in names if name == f"{run}.json"}
    if len(exact or names) != 1:
        known = ", ".join(sorted(name.removesuffix(".json") for name in names)[:5])
        found = f"{len(names)} runs begin so: {known}" if names else "no run begins so"
        raise UserError(f"run {run!r} in {store.uri}: {found}; `distillery history {place}` lists them")
    (name,) = exact or names
    key = max(key for key in keys if key.endswith(f"Z-{name}"))
    return parse(store.read(key), f"{store.uri}/{key}")


def compare(records: Sequence[Record]) -> dict[str, Any]:
    """Everything that differs between runs, as JSON values; each run is held against the first.

    Accuracies in percent, differences in points; `p` is Welch's over seeds, None where a side has one seed.

    Raises:
        UserError: fewer than two runs.
    """
    if not 2 <= len(records) <= len(LETTERS):
        raise UserError(f"{len(records)} runs: give 2 to {len(LETTERS)}")
    first, *others = records
    groups = entries(records, loosely=True)
    results = [_result(key, [own.get(key) for own in groups]) for key in sorted({key for own in groups for key in own})]
    tests = sum(each is not None and each["p"] is not None for result in results for each in result["against_first"])
    names = ("run", "experiment", "schedule", "finished", "status", "seconds", "code_version", "previous")
    return {
        "runs": [{n: getattr(record, n) for n in names} | {"hardware": list(record.hardware)} for record in records],
        "configuration": configurations([record.config for record in records]),
        "same_configuration": len({record.config_sha256 for record in records}) == 1,
        "differing": [differing(first, other) for other in others],
        "steps": {step: [r.steps.get(step) for r in records] for step in sorted({s for r in records for s in r.steps})},
        "results": results,
        "tests": tests,
    }


def _result(key: Key, groups: Sequence[Group | None]) -> dict[str, Any]:
    first, *others = groups
    shown = [
        None if g is None else {"last": g.mean, "std": g.std, "best": sum(g.best) / len(g.best), "seeds": len(g.last)}
        for g in groups
    ]
    return vars(key) | {"runs": shown, "against_first": [_against(first, other) for other in others]}


def _against(first: Group | None, other: Group | None) -> dict[str, Any] | None:
    if first is None or other is None:
        return None
    difference, p = other.mean - first.mean, welch(first.last, other.last)
    if p is None:
        verdict = "the same" if difference == 0 else "cannot be told with 1 seed"
    elif p >= LEVEL:
        verdict = "no difference shown"
    else:
        verdict = "higher" if difference > 0 else "lower"
    return {"difference": difference, "p": p, "verdict": verdict}


def configurations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Key path -> its value in each experiment, where they are not all the same; None where the key is missing."""
    found = _experiments(texts)
    paths = sorted({path for own in found for path in own})
    values = {path: [own.get(path) for own in found] for path in paths}
    return {path: own for path, own in values.items() if len(set(map(canonical, own))) > 1}


def _experiments(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Each experiment flat, with its defaults; as they were written, if this version cannot read one of them."""
    try:
        models = [experiment.load(text) for text in texts]
    except DistilleryError:
        return [flat(_mapping(text)) for text in texts]
    made = []
    for model in models:
        values = plain(model) | {"teachers": [plain(teacher) for teacher in model.every_teacher]}
        made.append(flat({name: value for name, value in values.items() if name not in ("name", "teacher")}))
    return made


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {"text": text}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists of them -> key path -> value. Entries of lists are called by what they are."""
    if isinstance(value, dict) and value:
        parts = [flat(value[key], f"{path}.{key}" if path else str(key)) for key in value]
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        names = [next((str(each[label]) for label in LABELS if each.get(label)), "") for each in value]
        seen: Counter[str] = Counter()
        parts = []
        for name, each in zip(names, value, strict=True):
            seen[name] += 1
            parts.append(flat(each, f"{path}[{name}{f'#{seen[name]}' if seen[name] > 1 else ''}]"))
    else:
        return {path: value}
    return {key: inner for part in parts for key, inner in part.items()}


def text(found: dict[str, Any]) -> str:
    """What `compare` found, for people."""
    runs = found["runs"]
    names = LETTERS[: len(runs)]
    head = ("", "run", "experiment", "finished (UTC)", "status", "time")
    rows = [(n, *_run(run)) for n, run in zip(names, runs, strict=True)]
    lines = columns([head, *rows])
    lines += ["", *_configuration(found, names), ""]
    for what, name in (("hardware", "Hardware"), ("code_version", "Code version")):
        each = [", ".join(run[what]) if isinstance(run[what], list) else run[what] for run in runs]
        same = each[0] if len(set(each)) == 1 else "; ".join(f"{n}: {v}" for n, v in zip(names, each, strict=True))
        lines.append(f"{name}: {same or 'not known'}")
    for name, besides in zip(names[1:], found["differing"], strict=True):
        lines.append(f"{name} differs from A in: {', '.join(besides) or 'nothing known'}")
    lines += ["", *_results(found, names)]
    return "\n".join(line.rstrip() for line in lines)


def _run(run: dict[str, Any]) -> tuple[str, ...]:
    return run["run"], run["experiment"], _moment(run["finished"]), run["status"], duration(run["seconds"])


def _configuration(found: dict[str, Any], names: str) -> list[str]:
    changes = found["configuration"]
    if changes:
        rows = [(f"  {path}", *(_short(value) for value in values)) for path, values in changes.items()]
        return ["Configuration", *columns([("  key", *names), *rows])]
    if found["same_configuration"]:
        return ["Configuration: the same"]
    return ["Configuration: written the same, but what methods or recipes fill in differs between these versions"]


def _results(found: dict[str, Any], names: str) -> list[str]:
    if not found["results"]:
        return ["Results: none of the runs has any"]
    head = ["  result", "A"]
    for name in names[1:]:
        head += [name, f"{name} - A", "p", ""]
    rows = [tuple(head)]
    for result in found["results"]:
        key = Key(**{field.name: result[field.name] for field in fields(Key)})
        row = [f"  {key.words}", _accuracy(result["runs"][0])]
        for one, against in zip(result["runs"][1:], result["against_first"], strict=True):
            row += [_accuracy(one), *_told(against)]
        rows.append(tuple(row))
    lines = ["Results: accuracy of the last epoch in percent, mean +- deviation over seeds (seeds)", *columns(rows)]
    if found["tests"]:
        by_chance = f"{found['tests'] * LEVEL:.1g}"
        lines += ["", f"{found['tests']} tests at p < {LEVEL:g}: about {by_chance} would show a difference by chance "
                      "alone; believe a single small p less, the more rows there are."]  # fmt: skip
    return lines


def _told(against: dict[str, Any] | None) -> tuple[str, str, str]:
    if against is None:
        return "", "", ""
    return f"{against['difference']:+.2f}", _p(against["p"]), against["verdict"]


def _accuracy(one: dict[str, Any] | None) -> str:
    if one is None:
        return ABSENT
    spread = "" if one["std"] is None else f" +- {one['std']:.2f}"
    return f"{one['last']:.2f}{spread} ({one['seeds']})"


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _short(value: Any) -> str:
    said = ABSENT if value is None else value if isinstance(value, str) else json.dumps(value)
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."


def _moment(finished: str) -> str:
    return finished[:16].replace("T", " ")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the values of each column one below the other."""
    wide = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(f"{value:{width}s}" for value, width in zip(row, wide, strict=True)).rstrip() for row in rows]


@dataclass(frozen=True)
class Line:
    """What the list of a store's runs shows of one."""

    run: str
    experiment: str
    schedule: str
    finished: str
    seconds: float
    status: str
    failed: int
    cells: int
    best: str  # the best entry that is no baseline, with its accuracy
    regressions: list[str]

    @classmethod
    def of(cls, record: Record) -> Line:
        """The line of a record."""
        (found,) = entries([record])
        own = {key: group for key, group in found.items() if key.method.split()[0] not in BASELINES} or found
        best = max(own, key=lambda key: own[key].mean, default=None)
        return cls(
            run=record.run,
            experiment=record.experiment,
            schedule=record.schedule,
            finished=record.finished,
            seconds=record.seconds,
            status=record.status,
            failed=sum(cell.failure is not None for cell in record.cells),
            cells=len(record.cells),
            best=f"{best.method} IPC {best.ipc} {best.student}: {own[best].mean:.2f} %" if best else "",
            regressions=[regression.text for regression in record.regressions],
        )


def listing(place: str, wanted: str = "", as_json: bool = False) -> str:
    """The runs in a store's history, oldest first.

    Args:
        place: folder or URI.
        wanted: only runs of this experiment; "" = all.
        as_json: for programs.

    Raises:
        StoreError, UserError: the store does not answer, or refuses.
    """
    past: History[Line] = History(place, Line.of)
    lines = [line for line in past.read() if wanted in ("", line.experiment)]
    if as_json:
        return json.dumps({"runs": [vars(line) for line in lines], "unreadable": past.unreadable}, indent=1)
    said = f"{past.uri}: {len(lines)} run{'s' * (len(lines) != 1)}" + (f" of {wanted}" if wanted else "")
    said += f"; {past.unreadable} objects are no records of this version" if past.unreadable else ""
    head = ("finished (UTC)", "experiment", "status", "best", "worse", "run")
    return "\n".join([*columns([head, *map(_row, lines)]), said] if lines else [said])


def _row(line: Line) -> tuple[str, ...]:
    status = line.status if not line.failed else f"{line.failed} of {line.cells} failed"
    worse = str(len(line.regressions)) if line.regressions else ABSENT
    return (_moment(line.finished), line.experiment, status, line.best or ABSENT, worse, line.run)
