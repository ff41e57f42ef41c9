"""Steps as a cluster runs them: each in a process of its own, with an empty output folder, killed without warning.

As a script it is the node: it has imported everything once and forks a pod for each job that it is given, so that a
test does not wait for torch a hundred times.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillery import steps
from distillery.track import Track

# What steps import only when they need it: a fork has it at once.
LATER = (
    "distillery.data._arrays",
    "distillery.methods.rded",
    "distillery.methods.sre2l",
    "distillery.store.s3",
    "sklearn.datasets",
    "torch._dynamo",
    "torchvision",
)
Record = tuple[float, str, int]  # when, which part of the step, how much of it was done


@dataclass
class Job:
    """A task of the pipeline: a step, its arguments before `out`, and where its artifact will lie."""

    step: str
    args: list[Any]
    name: str


@dataclass
class Cluster:
    """Runs jobs; their artifacts lie in `folder`, their checkpoints in the store."""

    folder: Path
    checkpoints: str
    environment: dict[str, str] = field(default_factory=dict)
    records: dict[str, list[list[Record]]] = field(default_factory=dict)  # of every pod of a job
    killed: list[tuple[str, float, float]] = field(default_factory=list)  # job, seconds lost, seconds of work in it
    pods: int = 0

    def __enter__(self) -> Cluster:
        self._node = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._node.kill()
        self._node.communicate()

    def _tell(self, line: str) -> int:
        assert self._node.stdin is not None
        assert self._node.stdout is not None
        self._node.stdin.write(f"{line}\n")
        self._node.stdin.flush()
        return int(self._node.stdout.readline())

    def artifact(self, name: str) -> Path:
        """Where a job's artifact lies."""
        return self.folder / name

    def run(self, job: Job, kill_after: int = -1, kept: Callable[[], bool] = lambda: True) -> bool:
        """One pod of a job; with `kill_after` it is lost after so much progress (or its end), with all that it wrote.

        Args:
            job: which.
            kill_after: lines of progress.
            kept: it is not lost before this is so either.

        Returns:
            Whether its artifact arrived.
        """
        self.pods += 1
        pod = self.folder / "pods" / f"{self.pods:03d}-{job.name}"
        pod.mkdir(parents=True)
        out, log = pod / "out", pod / "progress"
        said = {"step": job.step, "args": job.args, "out": str(out), "log": str(log), "checkpoints": self.checkpoints}
        (pod / "job.json").write_text(json.dumps(said))
        pid = self._tell(str(pod / "job.json"))
        if kill_after >= 0:
            while _is_alive(pid) and (len(records(log)) < kill_after or not kept()):
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = self._tell("wait")
        now, earlier = time.time(), self.records.setdefault(job.name, [])
        earlier.append(records(log))
        if len(earlier) > 1 and self.killed and self.killed[-1][0] == job.name:
            self.killed[-1] = (job.name, *lost(earlier[-2], earlier[-1], self.killed[-1][1]))
        assert code in (0, -signal.SIGKILL), (pod / "stderr").read_text()[-3000:]
        if kill_after >= 0:
            self.killed.append((job.name, now, 0.0))
            return False
        out.rename(self.artifact(job.name))
        return True


def _is_alive(pid: int) -> bool:
    """Whether a pod still runs; one that has ended waits for its node to ask for it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def records(log: Path) -> list[Record]:
    """What a pod wrote down."""
    lines = log.read_text().splitlines() if log.exists() else []
    parts = [line.split(" ") for line in lines if line.count(" ") == 2]
    return [(float(when), name, int(done)) for when, name, done in parts]


def lost(before: list[Record], after: list[Record], killed: float) -> tuple[float, float]:
    """Seconds of a killed pod's work that its successor did again, and seconds that it had worked."""
    if not before:
        return 0.0, 0.0
    worked = killed - before[0][0]
    if not after:  # nothing was left to do
        return 0.0, worked
    _, name, done = after[0]
    told = [count for _, part, count in before if part == name]
    if told and done > max(told):  # it had kept all that it had told
        return 0.0, worked
    reached = [when for when, part, count in before if part == name and count >= done]
    return (killed - reached[0] if reached else worked), worked


def jobs(text: str, at: Callable[[str], Path]) -> Iterator[Job]:
    """The tasks of an experiment in order; each is asked for when those before it have their artifacts."""
    yield Job("prepare_data", [text], "data")
    taught = {}
    for each in steps.plan_teachers(text):
        name = each["teacher"]
        yield Job("train_teacher", [text, name, str(at("data"))], f"teacher-{name}")
        taught[name] = str(at(f"teacher-{name}"))
    yield Job("gather_teachers", [text, str(at("data")), taught], "teachers")
    both = [str(at("data")), str(at("teachers"))]
    for number, cell in enumerate(steps.plan(text)):
        synthetic, labels = f"synthetic-{number}", f"labels-{number}"
        if cell["shards"] > 1:
            pieces = steps.pieces(cell)
            for piece in pieces:
                yield Job("synthesize_piece", [piece, *both], f"piece-{number}-{piece['shard']}")
            made = [str(at(f"piece-{number}-{piece['shard']}")) for piece in pieces]
            yield Job("gather_pieces", [cell, *both, made], synthetic)
        else:
            yield Job("synthesize", [cell, *both], synthetic)
        yield Job("relabel", [cell, str(at(synthetic)), both[1]], labels)
        yield Job("evaluate_student", [cell, *both, str(at(synthetic)), str(at(labels))], f"result-{number}")


def pod(path: Path) -> None:
    """Run one job and write down its progress."""
    error = os.open(path.with_name("stderr"), os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    job = json.loads(path.read_text())
    with open(job["log"], "a", buffering=1) as log:
        say = Track.log

        def noted(self: Track, done: int, total: int, **values: float | str) -> None:
            log.write(f"{time.time():.3f} {self._name.replace(' ', '_')} {done}\n")
            say(self, done, total, **values)

        Track.log = noted  # type: ignore[method-assign]
        getattr(steps, job["step"])(*job["args"], job["out"], checkpoints=job["checkpoints"])


def main() -> None:
    """Be the node: fork a pod for each path read, answer its process number; after "wait" its exit code."""
    pid = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            try:
                pod(Path(line.strip()))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a fork must never return to the caller's code
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    for module in LATER:
        importlib.import_module(module)
    main()
