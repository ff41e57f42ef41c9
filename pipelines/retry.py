"""Whether a failed run is worth retrying: never more often than agreed, and not where it fails in the same way again.

KFP's retry runs the failed steps again and keeps the rest; a step resumes from its own checkpoints. How often a run has
failed stands in its `state_history`, so whoever watches may be restarted at any time. A server before 2.17 forgets that
history at each retry; there only the process that asked for a retry asks for another one.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Dict, List, Set

from pipelines.api import ApiError, BadRequest, Client, Run, Unreachable, age
from pipelines.progress import Step, last_lines, log_of, place, steps_of, stopped

LONGEST = 1800.0  # seconds between a failure and its retry, at most
MISTAKES = re.compile(r"\b(UserError|GateError|StoreRefused)\b")
VERDICT = "verdict"  # it only repeats what the report has found; a retry would run nothing else
ANOTHER = "submit again, with another value of the parameter attempt if the same cells shall run"  # they are cached


@dataclass(frozen=True)
class Limits:
    """How often, and how soon.

    Attributes:
        retries: of one run, over its whole life.
        backoff: seconds before the first one; they double each time.
    """

    retries: int = 0
    backoff: float = 30.0

    def wait(self, done: int) -> float:
        """Seconds between a failure and its retry, after so many retries."""
        return min(self.backoff * 2**done, LONGEST)


@dataclass
class Past:
    """What this process has seen: for each run, where it failed, and how often it was retried from here."""

    places: Dict[str, Set[str]] = field(default_factory=dict)
    retries: Dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What to do with a failed run: `pause` are seconds that must pass before, `said` tells people."""

    retry: bool
    said: str
    pause: float = 0.0


def judge(client: Client, run: Run, limits: Limits, past: Past) -> Verdict:
    """Decide about a failed run, and remember where it failed.

    Args:
        client: the API; logs are read through it.
        run: a run whose state is FAILED.
        limits: what was agreed.
        past: changed in place.
    """
    workflow = client.workflow(run.id)
    known = steps_of(workflow, run)
    failed = [step for step in known if step.state == "FAILED"]
    names = ", ".join(step.path for step in failed) or "an unknown step"
    ends = {step.path: ending(client, run, step) for step in failed}  # nothing after this line asks the API
    now = {place(step, ends[step.path]) for step in failed if not step.lost}
    before = past.places.get(run.id)
    past.places[run.id] = now
    done = max(run.failures - 1, past.retries.get(run.id, 0))
    if stopped(workflow):
        return Verdict(False, "not retried: somebody canceled it")
    if forgotten(run) and run.id not in past.retries:
        return Verdict(False, f"{names}: not retried: it was before, and this server does not say how often")
    if failed and all(step.path == VERDICT for step in failed):
        return Verdict(False, f"not retried: cells failed, and a retry would only repeat the verdict; {ANOTHER}")
    if mistake := next((end[-1] for end in ends.values() if end and MISTAKES.search(end[-1])), ""):
        return Verdict(False, f"{names}: not retried, since only a change helps: {mistake}")
    if done >= limits.retries:
        return Verdict(False, f"{names}: not retried any more: {done} of {limits.retries} retries are used up")
    if done and now and (now & before if before is not None else not progressed(run, known)):
        return Verdict(False, f"{names}: failed twice at the same place; not retried: {min(now)}")
    wait = limits.wait(done)
    pause = max(0.0, min(wait, wait - age(run.finished)))
    past.retries[run.id] = done + 1
    how = "its pod was lost" if failed and all(step.lost for step in failed) else "it failed"
    return Verdict(True, f"{names}: {how}; retry {done + 1} of {limits.retries} in {pause:.0f} s", pause)


def ending(client: Client, run: Run, step: Step) -> List[str]:
    """The last lines of a failed step, as far as anybody has them."""
    try:
        return last_lines(log_of(client, run, step))
    except Unreachable:
        raise
    except ApiError:
        return []


def forgotten(run: Run) -> bool:
    """Whether the server has dropped the history of a run that was retried: a full one begins with PENDING."""
    return bool(run.history) and run.history[0].get("state") != "PENDING"


def progressed(run: Run, known: List[Step]) -> bool:
    """Whether any step was finished after the last retry: then what failed now is not what failed before."""
    again = ""
    for before, after in zip(run.history, run.history[1:], strict=False):
        if before.get("state") == "FAILED" and after.get("state") != "FAILED":
            again = str(after.get("update_time") or "")
    return any(step.state == "SUCCEEDED" and step.ended > again for step in known)


def retry(client: Client, run: Run) -> None:
    """Ask for the retry, even if the first answer is lost or somebody else was quicker.

    Raises:
        ApiError, BadRequest: the run stays as it is.
    """
    for last in (False, False, True):
        try:
            client.retry(run.id)
        except (ApiError, BadRequest) as error:
            if client.run(run.id).state != "FAILED":
                return
            if last or isinstance(error, BadRequest):
                raise
            time.sleep(1.0)
        else:
            return
