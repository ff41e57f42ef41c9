"""Wait for a run: a line when a step starts and one when it ends, and what to know if it fails."""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, TypeVar

from distillery.console import duration
from pipelines.api import ApiError, Client, NotFound, Run, Unreachable, age
from pipelines.progress import Step, last_lines, log_of, steps
from pipelines.retry import Limits, Past, judge, retry

OUTAGE = 900.0  # seconds without an answer after which waiting makes no sense
VANISHED = 3  # answers in a row that there is no such run
LOOK = 30.0  # seconds after which the workflow is read again, though no state has changed: reasons for waiting change
STUCK = 60.0  # seconds a pod may wait to be started before somebody is told
SETTLING = 60.0  # seconds after a retry in which the old end may still be reported
WORDS = {"SUCCEEDED": "done", "CACHED": "cached", "FAILED": "FAILED", "PENDING": "waiting", "RUNNING": "started"}

T = TypeVar("T")


@dataclass
class Follower:
    """Waits for one run and says what happens.

    Args:
        client: the API.
        say: receives each line.
        interval: seconds between two looks.
        limits: when a failed run is retried.
    """

    client: Client
    say: Callable[[str], None]
    interval: float = 5.0
    limits: Limits = field(default_factory=Limits)
    _said: Dict[str, str] = field(default_factory=dict)
    _seen: Any = None
    _looked: float = 0.0

    def wait(self, run_id: str, timeout: float = 0.0) -> Run:
        """The run when it has ended, or as it is after `timeout` seconds (0 = however long it takes).

        Raises:
            NotFound: the run vanished. Unreachable: nobody has answered for a long time.
        """
        until = time.monotonic() + timeout if timeout else float("inf")
        past, retried, settled = Past(), "", 0.0
        while True:
            run = self.patiently(lambda: self._look(run_id), until)
            stale = run.finished == retried and time.monotonic() < settled
            if not run.ended or stale:
                if time.monotonic() >= until:
                    return run
                time.sleep(min(self.interval, max(0.0, until - time.monotonic())))
                continue
            if run.state != "FAILED" or not self.limits.retries:
                return run
            verdict = self.patiently(functools.partial(judge, self.client, run, self.limits, past), until)
            self.say(f"{clock()}  {verdict.said}")
            if not verdict.retry or time.monotonic() + verdict.pause > until:
                return run
            time.sleep(verdict.pause)
            self.patiently(functools.partial(retry, self.client, run), until)
            retried, settled = run.finished, time.monotonic() + SETTLING
            self._said = {path: said for path, said in self._said.items() if said != "FAILED"}
            self._seen = None

    def patiently(self, action: Callable[[], T], until: float = float("inf")) -> T:
        """What an action gives, however often nobody answers it in between.

        Args:
            action: may be repeated without harm.
            until: monotonic time after which it is not repeated.
        """
        began = time.monotonic()
        while True:
            try:
                return action()
            except Unreachable as error:
                if time.monotonic() - began > OUTAGE or time.monotonic() > until:
                    raise
                self._once("api", f"no answer, still trying: {error}", "silent")
            time.sleep(self.interval)

    def _look(self, run_id: str) -> Run:
        """The run as it is now; says what is new."""
        for chance in range(VANISHED):
            try:
                run = self.client.run(run_id)
            except NotFound as error:
                if chance == VANISHED - 1:
                    raise NotFound(f"run {run_id}: it was there and is gone; somebody deleted it ({error})") from error
                time.sleep(self.interval)
            else:
                break
        self._show(run)
        return run

    def _show(self, run: Run) -> None:
        """Say what is new."""
        self._said.pop("api", None)
        details = ((run.raw.get("run_details") or {}).get("task_details")) or []
        seen = (run.state, [(task.get("task_id"), task.get("state")) for task in details])
        if seen == self._seen and time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        for step in steps(self.client, run):
            self._tell(step)
        self._seen = seen

    def _tell(self, step: Step) -> None:
        if step.state == "PENDING":
            waits = age(step.started)
            if waits > STUCK and step.message:
                self._once(step.path, f"{step.path:<40} waiting for {duration(waits)}: {step.message}", step.message)
        elif step.state == "RUNNING":
            self._once(step.path, f"{step.path:<40} started", "started")
        elif step.state:
            took = f" in {duration(seconds(step))}" if step.state != "CACHED" and step.ended else ""
            why = f": {step.message}" if step.state == "FAILED" and step.message else ""
            self._once(step.path, f"{step.path:<40} {WORDS[step.state]}{took}{why}", step.state)

    def _once(self, what: str, line: str, key: str = "") -> None:
        if self._said.get(what) != (key or line):
            self._said[what] = key or line
            self.say(f"{clock()}  {line}")


def explain(client: Client, run: Run) -> List[str]:
    """Why a run failed: each failed step, the end of what it printed, and where to look further."""
    failed = [step for step in steps(client, run) if step.state == "FAILED"]
    lines = []
    for step in failed:
        lines.append(f"FAILED: {step.path}" + (f" ({step.message})" if step.message else ""))
        try:
            said = last_lines(log_of(client, run, step))
            lines += [f"    {line}" for line in said] or ["    (it printed nothing)"]
        except ApiError as error:
            lines.append(f"    its log is gone: {error}")
    if not failed:
        reason = (run.raw.get("error") or {}).get("message") or "the API says no more"
        lines.append(f"{run.state}: no step of it is marked as failed; {reason}")
    return [*lines, f"see {client.link(run.id)}"]


def seconds(step: Step) -> float:
    """How long a step took."""
    return max(0.0, age(step.started) - age(step.ended))


def clock() -> str:
    """The time of day, for a line."""
    return time.strftime("%H:%M:%S")
