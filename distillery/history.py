"""The history of a store: one immutable JSON record of every finished run, under `history/`.

    <store>/history/20261121T164500Z-<run id>.json

Names sort by time, so the newest stands last. A record is never changed; a run whose report is made again after a retry
adds another one, and of several records of one run the newest counts. What cannot be read (half written, of another
program, or of a newer schema) is left alone and counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from distillery import __version__, artifact, experiment
from distillery.config import Cell, Experiment, plain
from distillery.errors import CorruptArtifact, DistilleryError
from distillery.report.load import SHARED, Outcome, Row, canonical, load, shared_seconds
from distillery.report.table import leaderboard
from distillery.store import MissingKey, Store, open_store

SCHEMA = 1
FOLDER = "history"
FILE = "record.json"  # the copy inside the report artifact
READERS = 16  # objects read at once
BRIEF = 60.0  # seconds to try: a run that is done does not wait longer for its place in the history
STAMP = "%Y%m%dT%H%M%SZ"
OWN = ("finished", "previous", "regressions")  # what may differ between two records of one and the same end

T = TypeVar("T")


@dataclass(frozen=True)
class Reached:
    """One student of a cell. Accuracies are fractions; None where they were no finite numbers."""

    net: str  # as on the leaderboard: with the options that tell it from others of the run
    recipe: str  # likewise
    regime: str
    acc_last: float | None
    acc_best: float | None


@dataclass(frozen=True)
class Fault:
    """Why a cell has no result."""

    step: str
    error: str


@dataclass(frozen=True)
class CellRecord:
    """One cell of a run."""

    id: str
    dataset: str
    method: str
    options: dict[str, Any]  # resolved
    ipc: int
    seed: int
    images_sha256: str  # of the file with the images; "" = not known
    seconds: dict[str, float]  # by step, the shared ones before it included
    image_bytes: int | None
    label_bytes: int | None  # of all its students
    students: tuple[Reached, ...]
    failure: Fault | None = None
    entry: str = ""  # the method as on the leaderboard: with the options that tell it from others of the run
    teacher: str = ""  # names of its teachers, joined with " + "
    hardware: str = ""


@dataclass(frozen=True)
class Taught:
    """A teacher, or several that label together; the accuracy is then the mean of theirs."""

    name: str
    net: str
    accuracy: float


@dataclass(frozen=True)
class Regression:
    """Something that is worse than in the run before, or that changed without a reason in the configuration.

    `before` and `after` are fractions for accuracy, seconds for slower, and for images the number of sets compared and
    of those that changed.
    """

    kind: str  # accuracy | slower | images
    entry: str  # what it is about, in words
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Record:
    """What a finished run leaves for those who come later. Keys that a reader does not know are ignored."""

    run: str
    experiment: str
    schedule: str  # name of the recurring run; "" = started by hand
    finished: str  # ISO, UTC
    seconds: float  # sum of all steps
    status: str  # succeeded | failed (some cell did)
    code_version: str
    hardware: tuple[str, ...]
    config: str  # the experiment as its author wrote it
    config_sha256: str  # of all that can change a number, resolved; names, places and pods are left out
    teachers: tuple[Taught, ...]
    cells: tuple[CellRecord, ...]
    previous: str = ""  # id of the run it was compared with
    regressions: tuple[Regression, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)  # seconds by step; what cells share counts once
    data: str = ""  # fingerprint of the real images
    schema: int = SCHEMA

    @property
    def ended(self) -> datetime:
        """When it finished."""
        return datetime.fromisoformat(self.finished).astimezone(UTC)

    def json(self) -> bytes:
        """The content of its file."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


_RECORD = TypeAdapter(Record)


def parse(data: bytes, where: str) -> Record:
    """A record from its bytes; `where` names it in errors.

    Raises:
        CorruptArtifact: half written, something else, or newer than this program.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{where}: no record of a run ({error}); delete it") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise CorruptArtifact(
            f"{where}: a record of schema {schema!r}; distillery {__version__} reads schema {SCHEMA}: upgrade it, or "
            "delete what is no record"
        )
    try:
        record = _RECORD.validate_python(raw)
        assert record.ended
    except (ValidationError, ValueError) as error:
        raise CorruptArtifact(f"{where}: no record of a run ({' '.join(str(error).split())[:300]})") from error
    return record


def of(
    wanted: Experiment, text: str, results: Iterable[Path], *, code: str, run: str = "", schedule: str = ""
) -> Record:
    """The record of a run that ends now.

    Args:
        wanted: the experiment.
        text: the same as its author wrote it.
        results: its artifacts of kind result or failure.
        code: the code's version.
        run: the run's id; "" makes one from the artifacts, the same for the same artifacts.
        schedule: name of the recurring run.
    """
    folders, cells = list(results), {cell.id: cell for cell in experiment.cells(wanted)}
    outcomes = [load(folder, experiment.taught(wanted)) for folder in folders]
    shared = shared_seconds(outcomes)
    steps = shared | _own_seconds(outcomes)
    nets = {teacher.name: teacher.net for teacher in wanted.every_teacher}
    named = _entries(outcomes)
    made = [_cell(outcome, cells, named, _images(folder)) for outcome, folder in zip(outcomes, folders, strict=True)]
    rows = [(row.cell, row.teacher_acc) for outcome in outcomes for row in outcome.rows if row.teacher_acc is not None]
    taught = {(_teacher(cells, cell), round(accuracy / 100, 8)) for cell, accuracy in rows if math.isfinite(accuracy)}
    return Record(
        run=identifier(run) or _derived(wanted.name, folders),
        experiment=wanted.name,
        schedule=schedule,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(sum(steps.values()), 3),
        status="failed" if any(outcome.failure for outcome in outcomes) else "succeeded",
        code_version=code,
        hardware=tuple(sorted({outcome.hardware for outcome in outcomes} - {""})),
        config=text,
        config_sha256=resolved(wanted),
        teachers=tuple(Taught(name, _nets(name, nets), accuracy) for name, accuracy in sorted(taught)),
        cells=tuple(sorted(made, key=lambda cell: cell.id)),
        steps={step: round(seconds, 3) for step, seconds in sorted(steps.items())},
        data=next((print_ for folder in folders if (print_ := _inputs(folder).get("data"))), ""),
    )


def resolved(wanted: Experiment) -> str:
    """sha256 of everything in an experiment that can change a number, with defaults and recipes filled in."""
    free = {"id", "name", "shards", "code_version", "stop_on_failure"}  # what a cell has that changes none
    pods = {name for name in Cell.model_fields if name.endswith(("_cpu", "_memory", "_gpus"))}
    cells = [plain(cell) for cell in experiment.cells(wanted)]
    kept = [{name: value for name, value in cell.items() if name not in free | pods} for cell in cells]
    for cell in kept:
        cell["dataset"] = {k: v for k, v in cell["dataset"].items() if k not in ("root", "download", "store")}
        for student in cell["students"]:
            student["recipe"] = {k: v for k, v in student["recipe"].items() if k != "name"}
    teachers = [plain(teacher) for teacher in wanted.every_teacher]
    return hashlib.sha256(canonical([teachers, kept]).encode()).hexdigest()


def identifier(run: str) -> str:
    """A run's id as it can stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")[:100]


def folder_of(place: str) -> str:
    """Where the records of a store lie: `history` below the place, or the place itself if it ends so."""
    place = place.rstrip("/")
    return place if place.rpartition("/")[2] == FOLDER else f"{place}/{FOLDER}"


class History(Generic[T]):
    """The records of a store, read once: asking again lists the store, and reads only what is new.

    Args:
        place: a folder or URI; the records lie in `history` below it.
        keep: what to keep of each record in memory (`whole` keeps all of it).
        patience: seconds to try while the store does not answer; 0 means its default.
    """

    def __init__(self, place: str, keep: Callable[[Record], T], patience: float = 0.0) -> None:
        self._store, self._keep = open_store(folder_of(place), patience), keep
        self.uri = self._store.uri
        self.unreadable = 0  # objects that are no records, at the last `read`
        self._known: dict[str, tuple[str, tuple[str, T] | None]] = {}  # key -> etag, and (run, what is kept of it)

    def read(self) -> list[T]:
        """What is kept of each run, oldest first; of several records of one run the newest.

        Raises:
            StoreError, UserError: the store does not answer, or refuses; what was read before stays known.
        """
        there = {entry.key: entry.etag for entry in self._store.list() if entry.key.endswith(".json")}
        self._known = {key: value for key, value in self._known.items() if there.get(key) == value[0]}
        for key, record in _each(self._store, [key for key in there if key not in self._known]):
            self._known[key] = there[key], (record.run, self._keep(record)) if record else None
        found: dict[str, T] = {}
        for key in sorted(self._known):
            if (kept := self._known[key][1]) is not None:
                found.pop(kept[0], None)
                found[kept[0]] = kept[1]
        self.unreadable = sum(value[1] is None for value in self._known.values())
        return list(found.values())


def whole(record: Record) -> Record:
    """The record itself: for a `History` that keeps everything."""
    return record


def enter(
    place: str, record: Record, judge: Callable[[Record, Record], Sequence[Regression]]
) -> tuple[Record, Record | None]:
    """Add a run to the history of a store, compared with the run before it.

    The run before is the newest other one of the same experiment, and of the same schedule where it has one, of which a
    cell finished. The same end of the same run is entered once: a report that is made again changes nothing.

    Args:
        place: a folder or URI.
        record: see `of`.
        judge: (the run before, this one) -> what is worse.

    Returns:
        The record as it stands in the history, and the run before it, if there is one.

    Raises:
        StoreError, UserError: the store does not answer within a minute, or refuses.
    """
    store = open_store(folder_of(place), BRIEF)
    keys = sorted((entry.key for entry in store.list() if entry.key.endswith(".json")), reverse=True)
    same = [key for key in keys if key.endswith(f"Z-{record.run}.json")]
    own = next((found for _, found in _each(store, same[:1]) if found), None)
    if own is not None and own.run == record.run and _end(own) == _end(record):
        earlier = [key for key in keys if own.previous and key.endswith(f"Z-{own.previous}.json")]
        return own, next((found for _, found in _each(store, earlier[:1]) if found), None)
    before = next((found for found in _newest(store, keys) if _precedes(found, record)), None)
    if before is not None:
        record = replace(record, previous=before.run, regressions=tuple(judge(before, record)))
    moment = record.ended
    while (key := f"{moment.strftime(STAMP)}-{record.run}.json") in keys:  # a record is never changed
        moment += timedelta(seconds=1)
    record = replace(record, finished=moment.isoformat(timespec="seconds"))
    store.write(key, record.json())
    return record, before


def _precedes(found: Record, record: Record) -> bool:
    same = found.experiment == record.experiment and (not record.schedule or found.schedule == record.schedule)
    return same and found.run != record.run and any(cell.students for cell in found.cells)


def _newest(store: Store, keys: Sequence[str]) -> Iterator[Record]:
    """Records from the newest on, read a few at a time."""
    for start in range(0, len(keys), READERS):
        yield from (record for _, record in _each(store, keys[start : start + READERS]) if record is not None)


def _each(store: Store, keys: Sequence[str]) -> Iterator[tuple[str, Record | None]]:
    """(key, record or None) in the order of the keys; what vanished meanwhile is left out."""

    def read(key: str) -> tuple[str, bytes | None]:
        try:
            return key, store.read(key)
        except MissingKey:
            return key, None

    if not keys:
        return
    with ThreadPoolExecutor(READERS) as pool:
        for key, data in pool.map(read, keys):
            if data is not None:
                yield key, _parsed(data, key)


def _parsed(data: bytes, key: str) -> Record | None:
    try:
        return parse(data, key)
    except CorruptArtifact:
        return None


def _end(record: Record) -> dict[str, Any]:
    return {name: value for name, value in json.loads(record.json()).items() if name not in OWN}


def _derived(name: str, folders: Sequence[Path]) -> str:
    """An id for a run that has none: another one as soon as anything was made anew."""
    manifests = [path.read_bytes() for folder in folders if (path := folder / artifact.MANIFEST).is_file()]
    return identifier(f"{name}-{hashlib.sha256(b''.join(sorted(manifests))).hexdigest()[:12]}")


def _cell(
    outcome: Outcome, cells: Mapping[str, Cell], named: Mapping[int, tuple[str, str, str]], images: str
) -> CellRecord:
    said, failure = outcome.cell, outcome.failure
    name = str(said.get("id", failure.cell if failure else ""))
    measured = [row for row in outcome.rows if not row.failure]
    sizes = [row.image_bytes for row in measured if row.image_bytes is not None]
    return CellRecord(
        id=name,
        dataset=str(said.get("dataset", "")),
        method=str(said.get("method", "")),
        options=dict(said.get("options", {})),
        ipc=int(said.get("ipc", 0)),
        seed=int(said.get("seed", 0)),
        images_sha256=images,
        seconds=outcome.seconds,
        image_bytes=max(sizes, default=None),
        label_bytes=sum(row.label_bytes or 0 for row in measured) if measured else None,
        students=tuple(_student(row, named.get(id(row))) for row in measured),
        failure=Fault(failure.step, " ".join(failure.error.split())[:500]) if failure else None,
        entry=next((named[id(row)][0] for row in measured if id(row) in named), str(said.get("method", ""))),
        teacher=_teacher(cells, name),
        hardware=outcome.hardware,
    )


def _student(row: Row, names: tuple[str, str, str] | None) -> Reached:
    _, net, recipe = names or ("", row.student, row.recipe)
    return Reached(net, recipe, row.regime, _fraction(row.acc_last), _fraction(row.acc_best))


def _fraction(percent: float | None) -> float | None:
    return None if percent is None or not math.isfinite(percent) else round(percent / 100, 8)


def _entries(outcomes: Sequence[Outcome]) -> dict[int, tuple[str, str, str]]:
    """The names that the leaderboard gives to each row's method, student and recipe."""
    entries = leaderboard([row for outcome in outcomes for row in outcome.rows])
    return {id(row): (e.method, e.setting.student, e.setting.recipe) for e in entries for row in e.rows}


def _teacher(cells: Mapping[str, Cell], name: str) -> str:
    return " + ".join(cells[name].teachers) if name in cells else ""


def _nets(name: str, nets: Mapping[str, str]) -> str:
    return " + ".join(nets.get(part, part) for part in name.split(" + "))


def _own_seconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    found: dict[str, float] = {}
    for outcome in outcomes:
        for step, seconds in outcome.seconds.items():
            if step not in SHARED:
                found[step] = found.get(step, 0.0) + seconds
    return found


def _images(folder: Path) -> str:
    try:
        return str(artifact.read(folder, verify=False).meta.get("images_sha256", ""))
    except DistilleryError:
        return ""


def _inputs(folder: Path) -> dict[str, str]:
    try:
        return artifact.read(folder, verify=False).inputs
    except DistilleryError:
        return {}
