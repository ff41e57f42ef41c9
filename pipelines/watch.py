"""`python -m pipelines watch`: retry failed runs, for a terminal, a pod, or a CronJob (`--once`).

It keeps nothing itself: how often a run has failed is what KFP remembers. It needs neither kfp nor torch.
"""

import json
import time
from typing import Dict, List, Tuple

import click

from distillery.errors import DistilleryError
from pipelines.api import Client, NotFound, Run, Unreachable, age
from pipelines.options import connected
from pipelines.retry import Limits, Past, Verdict, judge, retry
from pipelines.submit import default_experiment

DAY = 86400.0


@click.command()
@click.option("-e", "--experiment-name", default="", help="KFP's experiment whose runs are watched; default: distill.")
@click.option("--retries", type=click.IntRange(1, 100), default=3, show_default=True, help="Of one run, in all.")
@click.option("--backoff", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds, then doubled.")
@click.option("--within", type=click.FloatRange(min=0), default=7.0, show_default=True, help="Days: older runs rest.")
@click.option("--interval", type=click.FloatRange(min=0.01), default=60.0, show_default=True, help="Seconds to sleep.")
@click.option("--once", is_flag=True, help="Look once and end, as a CronJob wants it.")
@connected
def watch(
    client: Client, experiment_name: str, retries: int, backoff: float, within: float, interval: float, once: bool
) -> int:
    """Retry failed runs, but never for ever: with a bound, a growing pause, and not twice at the same place."""
    watcher = Watcher(client, experiment_name or default_experiment(), Limits(retries, backoff), within)
    while True:
        try:
            watcher.look()
        except Unreachable as error:
            if once:
                raise
            click.echo(f"{stamp()}  {error}", err=True)
        if once:
            return 0
        time.sleep(interval)


class Watcher:
    """Looks after the runs of one experiment."""

    def __init__(self, client: Client, experiment: str, limits: Limits, within: float) -> None:
        self.client, self.experiment, self.limits, self.within = client, experiment, limits, within
        self.past = Past()
        self._judged: Dict[str, Tuple[str, Verdict]] = {}

    def look(self) -> None:
        """Go through all runs once, and retry those whose time has come."""
        for run in self.failed():
            if self._judged.get(run.id, ("",))[0] != run.finished:
                self._judged[run.id] = (run.finished, judge(self.client, run, self.limits, self.past))
                click.echo(f"{stamp()}  {run.name} ({run.id}): {self._judged[run.id][1].said}")
            verdict = self._judged[run.id][1]
            if not verdict.retry or max(0.0, age(run.finished)) < self.limits.wait(self.past.retries[run.id] - 1):
                continue
            try:
                retry(self.client, run)
                self._judged[run.id] = (run.finished, Verdict(False, "retried"))  # its old end may be told once more
                click.echo(f"{stamp()}  {run.name} ({run.id}): retried")
            except DistilleryError as error:  # one run's trouble is not the others'
                click.echo(f"{stamp()}  {run.name} ({run.id}): the retry was refused: {error}", err=True)

    def failed(self) -> List[Run]:
        """Failed runs that are young enough and have no successor: a later run with the same parameters."""
        try:
            known = self.client.experiment(self.experiment)
        except NotFound:  # made with its first run
            return []
        seen, found = set(), []
        for run in self.client.runs(experiment_id=known):  # newest first
            if age(run.created) > self.within * DAY:
                break
            what = json.dumps((run.raw.get("runtime_config") or {}).get("parameters") or {}, sort_keys=True)
            if run.state == "FAILED" and what not in seen:
                found.append(run)
            seen.add(what)
        return found


def stamp() -> str:
    """Now, for a log."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
