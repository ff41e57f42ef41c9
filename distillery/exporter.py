"""Prometheus metrics of a store's history: `distillery exporter PLACE`, where docs/monitoring.md lists them.

A thread looks at the store every so often and reads only records that it has not seen; scrapes are answered from
memory. While the store does not answer, the last values stand and `distillery_store_up` is 0.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from sys import intern
from typing import NamedTuple
from urllib.request import url2pathname

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distillery.errors import DistilleryError, StoreError, UserError
from distillery.history import History
from distillery.history.record import Record
from distillery.regress import entries
from distillery.store import open_store

PATIENCE = 20.0  # seconds to try while the store does not answer: the next look comes anyway
RESULTS = 1000  # served in all: each is five series, and a scrape should stay below 200 ms
TEACHERS = 20  # of one experiment that are served
GAPS = 10  # runs of a schedule from which its interval is taken
MEASURE_EVERY = 3600.0  # seconds; the size of a bucket is a listing of all of it
RESULT = ("experiment", "dataset", "method", "ipc", "student", "recipe", "teacher")
SET = ("experiment", "dataset", "method", "ipc")


class Seen(NamedTuple):
    """What is kept in memory of every run."""

    run: str
    experiment: str
    schedule: str
    status: str
    ended: float  # seconds since 1970


class Exporter(Collector):
    """The metrics of one store.

    Args:
        place: folder or URI with `history/` below it.
        days: experiments and schedules without a run for so long are left out.
        experiments: how many experiments are served, those with the newest runs first.
        capacity: bytes that the store may hold, 0 = not known. A folder's is that of its disk.

    Raises:
        UserError: not a place, or settings in the environment that cannot be.
    """

    def __init__(self, place: str, *, days: float = 90, experiments: int = 100, capacity: float = 0) -> None:
        self.place = place
        self._days, self._experiments, self._capacity = days, experiments, capacity
        self._history, self._newest = self._start()
        self._families: list[Metric] = []
        self._size: tuple[float, float] | None = None  # bytes used, and of how many
        self._measured = float("-inf")
        self._up, self._took, self._looked = 0, 0.0, 0.0
        self._said, self._was_there = "", False

    def look(self) -> bool:
        """Read what is new in the store; False, with one line on standard error, when that was not possible."""
        start, problem = time.monotonic(), ""
        try:
            self._families = self._made(self._read())
            self._measure()
            self._looked = time.time()
        except (DistilleryError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
        self._up, self._took = int(not problem), time.monotonic() - start
        if problem != self._said:  # a store that is down for a night is one line
            print(problem or f"{self.place} answers again", file=sys.stderr, flush=True)
            self._said = problem
        return not problem

    def collect(self) -> Iterable[Metric]:
        """What a scrape gets; the store is not asked."""
        yield _gauge("store_up", "1 if the last look at the store succeeded.", self._up)
        yield _gauge("scrape_seconds", "Seconds that the last look at the store took.", self._took)
        yield _gauge("refresh_timestamp_seconds", "When the store was last read; 0 = not yet.", self._looked)
        if self._size is not None:
            yield _gauge("store_used_bytes", "Bytes that the store holds.", self._size[0])
            yield _gauge("store_capacity_bytes", "Bytes that the store may hold.", self._size[1])
        yield from self._families

    def _start(self) -> tuple[History[Seen], dict[str, Record]]:
        newest: dict[str, Record] = {}  # by experiment: its last run with results

        def keep(record: Record) -> Seen:
            known = newest.get(record.experiment)
            if any(cell.students for cell in record.cells) and (known is None or record.ended >= known.ended):
                newest[record.experiment] = record
                if len(newest) > 2 * self._experiments:  # records come oldest first
                    for name in sorted(newest, key=lambda name: newest[name].ended)[: -self._experiments]:
                        del newest[name]
            names = intern(record.experiment), intern(record.schedule), intern(record.status)
            return Seen(record.run, *names, record.ended.timestamp())

        return History(self.place, keep, PATIENCE), newest

    def _read(self) -> list[Seen]:
        self._check_there()
        runs = self._history.read()
        if {record.run for record in self._newest.values()} <= {run.run for run in runs}:
            return runs
        self._history, self._newest = self._start()  # somebody deleted a run whose results are shown
        return self._history.read()

    def _check_there(self) -> None:
        """A folder that lost its history is a volume that is not mounted, and not a store without runs.

        Raises:
            StoreError: it was there at the last look, and is not now.
        """
        folder = _folder(self._history.uri)
        if folder is None:
            return
        there = folder.is_dir()
        if self._was_there and not there:
            raise StoreError(f"{folder} is gone: is its volume mounted? If you deleted it, restart the exporter")
        self._was_there = there

    def _measure(self) -> None:
        """A folder's disk at every look; a bucket once an hour, and only if somebody said how much it may hold."""
        store = open_store(self.place, PATIENCE)
        if folder := _folder(store.uri):
            there = next(path for path in (folder, *folder.parents) if path.exists())
            disk = shutil.disk_usage(there)
            self._size = float(disk.used), float(disk.used + disk.free)  # what is reserved for root is nobody's
        elif self._capacity and time.monotonic() - self._measured > MEASURE_EVERY:
            self._size = float(sum(entry.bytes for entry in store.list())), self._capacity
            self._measured = time.monotonic()

    def _made(self, runs: Sequence[Seen]) -> list[Metric]:
        """All families whose values come from records."""
        since = datetime.now(UTC).timestamp() - self._days * 86400
        last = {run.experiment: run.ended for run in sorted(runs, key=lambda run: run.ended)}
        recent = sorted((name for name in last if last[name] >= since), key=lambda name: -last[name])
        shown = dict.fromkeys(recent[: self._experiments])
        results, dropped = _results({name: self._newest[name] for name in shown if name in self._newest})
        left_out = {"experiments": len(last) - len(shown), "results": dropped}
        return [
            _gauge("history_records", "Runs in the history.", len(runs)),
            _gauge("history_unreadable", "Objects below history/ that are no records.", self._history.unreadable),
            _family("dropped", "What the bounds leave out.", ("what",), {(k,): v for k, v in left_out.items()}),
            *_of_runs([run for run in runs if run.experiment in shown], since),
            *results,
        ]


def _folder(uri: str) -> Path | None:
    """The folder of a store on this machine, None for any other."""
    return Path(url2pathname(uri.removeprefix("file://"))) if uri.startswith("file:") else None


def serve(exporter: Exporter, *, port: int, address: str = "0.0.0.0", every: float = 30.0) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C.

    Raises:
        UserError: nobody can listen there.
        DistilleryError: a defect of the exporter.
    """
    registry, stop, asked = CollectorRegistry(auto_describe=False), threading.Event(), threading.Event()

    def end(*_: object) -> None:
        asked.set()
        stop.set()

    registry.register(exporter)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, address, registry)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on port {port} of {address}: {error}") from error
    for number in (signal.SIGTERM, signal.SIGINT):  # as the first process of a container it has no default for these
        signal.signal(number, end)
    print(f"serving http://{address}:{server.server_port}/metrics", file=sys.stderr, flush=True)
    looking = threading.Thread(target=_look_on, args=(exporter, stop, every), daemon=True)
    looking.start()
    while not stop.wait(1.0):  # seen once: a signal taken by another thread does not wake a wait without an end
        pass
    server.shutdown()
    server.server_close()
    thread.join()
    if not asked.is_set():  # old values that look like new ones would be worse than none
        raise DistilleryError(f"the thread that looks at {exporter.place} ended; its traceback stands above")


def _look_on(exporter: Exporter, stop: threading.Event, every: float) -> None:
    try:
        while not stop.is_set():
            exporter.look()
            stop.wait(every)
    finally:
        stop.set()


def _results(newest: Mapping[str, Record]) -> tuple[list[Metric], int]:
    """Families of each experiment's newest run with results, in that order; how many results are left out."""
    last: dict[tuple[str, ...], float] = {}
    best: dict[tuple[str, ...], float] = {}
    seeds: dict[tuple[str, ...], float] = {}
    steps: dict[tuple[str, ...], float] = {}
    sizes: dict[tuple[str, ...], list[tuple[int | None, int | None]]] = defaultdict(list)
    teachers: dict[tuple[str, ...], float] = {}
    info: dict[tuple[str, ...], float] = {}
    worse: Counter[tuple[str, ...]] = Counter()
    dropped = 0
    for name, record in newest.items():
        (found,) = entries([record])
        room = RESULTS - len(last)
        dropped += max(0, len(found) - room)
        for key, group in list(found.items())[:room]:
            labels = (name, key.dataset, key.method, str(key.ipc), key.student, key.recipe, key.teacher)
            last[labels], seeds[labels] = group.mean / 100, len(group.last)
            best[labels] = statistics.fmean(group.best) / 100
        for cell in record.cells:
            made = (name, cell.dataset, cell.entry or cell.method, str(cell.ipc))
            if len(sizes) < RESULTS or made in sizes:
                sizes[made].append((cell.image_bytes, cell.label_bytes))
        steps |= {(name, step): seconds for step, seconds in record.steps.items()}
        teachers |= {(name, teacher.name): teacher.accuracy for teacher in record.teachers[:TEACHERS]}
        info[(name, record.schedule, record.run, record.code_version)] = 1
        worse.update({(name, kind): 0 for kind in ("accuracy", "images", "slower")})
        worse.update((name, regression.kind) for regression in record.regressions)
    images = {key: mean for key, own in sizes.items() if (mean := _mean(image for image, _ in own)) is not None}
    labels_ = {key: mean for key, own in sizes.items() if (mean := _mean(label for _, label in own)) is not None}
    families = [
        _family("accuracy_last", "Accuracy after the last epoch, 0 to 1, mean over seeds.", RESULT, last),
        _family("accuracy_best", "Accuracy at the best evaluation, 0 to 1, mean over seeds.", RESULT, best),
        _family("accuracy_seeds", "Seeds behind an accuracy.", RESULT, seeds),
        _family("teacher_accuracy", "Accuracy of a teacher, 0 to 1.", ("experiment", "teacher"), teachers),
        _family("step_seconds", "Seconds of a step, all cells together.", ("experiment", "step"), steps),
        _family("image_bytes", "Bytes of a set's images.", SET, images),
        _family("label_bytes", "Bytes of a set's soft labels.", SET, labels_),
        _family("regressions", "What got worse than in the run before.", ("experiment", "kind"), worse),
        _family(
            "newest_run",
            "1; the run whose results stand here, as labels.",
            ("experiment", "schedule", "run", "code_version"),
            info,
        ),
    ]
    return families, dropped


def _of_runs(runs: Sequence[Seen], since: float) -> list[Metric]:
    """When runs ended and how, by experiment and schedule; schedules that ended before `since` are left out."""
    ends: dict[tuple[str, ...], list[Seen]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.ended):
        ends[(run.experiment, run.schedule)].append(run)
    ends = {key: own for key, own in ends.items() if own[-1].ended >= since}
    good = {key: [run.ended for run in own if run.status == "succeeded"] for key, own in ends.items()}
    both = ("experiment", "schedule")
    intervals = {key: gap for key, own in ends.items() if key[1] and (gap := _interval(own)) is not None}
    counts = Counter((run.experiment, run.status) for run in runs)
    total = CounterMetricFamily("distillery_runs", "Runs in the history.", labels=("experiment", "status"))
    for labels in sorted({(run.experiment, status) for run in runs for status in ("succeeded", "failed")}):
        total.add_metric(labels, counts[labels])
    return [
        total,
        _family(
            "last_run_timestamp_seconds", "When a run ended last.", both, {k: own[-1].ended for k, own in ends.items()}
        ),
        _family(
            "last_success_timestamp_seconds",
            "When a run ended last of which all cells finished.",
            both,
            {key: own[-1] for key, own in good.items() if own},
        ),
        _family(
            "last_run_failed",
            "1 if a cell of the last run failed.",
            both,
            {key: float(own[-1].status != "succeeded") for key, own in ends.items()},
        ),
        _family("schedule_interval_seconds", "Usual time between a schedule's runs.", both, intervals),
    ]


def _interval(runs: Sequence[Seen]) -> float | None:
    times = [run.ended for run in runs[-GAPS:]]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps) if gaps else None


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"distillery_{name}", text, value=value)


def _family(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(f"distillery_{name}", text, labels=labels)
    for own, value in values.items():
        family.add_metric(own, value)
    return family
