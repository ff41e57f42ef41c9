"""`python -m pipelines status | logs | cancel`: look at runs, read what their pods print, end one."""

import json
import re
import time
from typing import Any, Dict, List, Optional

import click

from distillery.console import duration
from distillery.errors import UserError
from pipelines.api import ApiError, Client, NotFound, Run, age, equals
from pipelines.follow import seconds
from pipelines.options import connected
from pipelines.progress import Step, log_of, steps

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NEWEST = 100  # runs among which the beginning of an id is looked for
DONE = ("SUCCEEDED", "FAILED", "CACHED")


@click.command()
@click.argument("run", required=False)
@click.option("-e", "--experiment-name", default="", help="Only runs of this KFP experiment.")
@click.option("--last", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connected
def status(client: Client, run: Optional[str], experiment_name: str, last: int, as_json: bool) -> int:
    """The newest runs, or the steps of RUN (an id, the beginning of one, a name, or `latest`)."""
    if run:
        return one(client, find(client, run, experiment_name), as_json)
    known = experiment_name and client.experiment(experiment_name)
    found = [each for each, _ in zip(client.runs(experiment_id=known), range(last), strict=False)]
    if as_json:
        click.echo(json.dumps([summary(each) for each in found], indent=1))
        return 0
    for each in found:
        took = duration(max(0.0, age(each.created) - age(each.finished)))
        click.echo(f"{each.id}  {each.state:<10} {each.created:<20} {took:>9}  {each.name}")
    if not found:
        click.echo("no runs")
    return 0


def one(client: Client, run: Run, as_json: bool) -> int:
    """A run and its steps."""
    known = steps(client, run)
    if as_json:
        click.echo(
            json.dumps({**summary(run), "link": client.link(run.id), "steps": [vars(s) for s in known]}, indent=1)
        )
        return 0
    click.echo(f"{run.name}: {run.state}\n  run {run.id}, created {run.created}\n  {client.link(run.id)}")
    for step in known:
        took = duration(seconds(step)) if step.started else ""
        note = step.message if step.state in ("FAILED", "PENDING") else ""
        click.echo(f"  {step.path:<40} {step.state or 'not reached':<11} {took:>9}  {note}".rstrip())
    return 0


def summary(run: Run) -> Dict[str, Any]:
    """A run for JSON."""
    times = {"created": run.created, "finished": run.finished}
    return {"id": run.id, "name": run.name, "state": run.state, **times, "failures": run.failures}


@click.command()
@click.argument("run")
@click.argument("step", required=False)
@click.option("-f", "--follow", is_flag=True, help="Stay until the step has ended.")
@click.option("--interval", type=click.FloatRange(min=0.01), default=3.0, help="Seconds between two looks.")
@connected
def logs(client: Client, run: str, step: Optional[str], follow: bool, interval: float) -> int:
    """What the pods of RUN print: of STEP (`plan`, `cell/3/synthesize`, or `synthesize` for all turns of the loop).

    Without STEP: of the steps that failed, or of those that run now.
    """
    found = find(client, run)
    shown: Dict[str, int] = {}
    while True:
        chosen = select(steps(client, found), step)
        for each in chosen:
            show(client, found, each, shown, alone=len(chosen) == 1 and not shown.keys() - {each.path})
        waiting = not chosen or any(each.state not in DONE for each in chosen)
        if not follow or (found.ended and not waiting) or (step and not waiting):
            break
        if found.ended:
            break
        time.sleep(interval)
        found = client.run(found.id)
    if not chosen and not shown:
        names = ", ".join(each.path for each in steps(client, found)) or "none yet"
        raise UserError(
            f"logs of {found.id}: nothing to show for {step or 'failed or running steps'!r}; steps: {names}"
        )
    return 0


def select(known: List[Step], asked: Optional[str]) -> List[Step]:
    """The steps that somebody means."""
    if not asked:
        failed = [step for step in known if step.state == "FAILED"]
        return failed or [step for step in known if step.state in ("RUNNING", "PENDING")]
    name = asked.replace("-", "_")
    exact = [step for step in known if step.path == name]
    return exact or [step for step in known if step.path.split("/")[-1] == name or step.path.startswith(f"{name}/")]


def show(client: Client, run: Run, step: Step, shown: Dict[str, int], alone: bool) -> None:
    """Print what is new in a step's log."""
    try:
        text = log_of(client, run, step)
    except ApiError as error:
        if step.state in DONE and step.path not in shown:
            shown[step.path] = 0
            why = "KFP reused what an earlier run left" if step.state == "CACHED" else str(error)
            click.echo(f"== {step.path} == no log: {why}", err=True)
        return
    start = shown.get(step.path, 0)
    if len(text) > start:
        if not alone:
            click.echo(f"== {step.path} ==")
        click.echo(text[start:], nl=not text.endswith("\n"))
    shown[step.path] = len(text)


@click.command()
@click.argument("run")
@connected
def cancel(client: Client, run: str) -> int:
    """End RUN; what its steps have finished stays."""
    found = find(client, run)
    if found.ended:
        click.echo(f"{found.name}: has ended already ({found.state})")
        return 0
    client.terminate(found.id)
    click.echo(f"{found.name}: canceled\n  run {found.id}")
    return 0


def find(client: Client, asked: str, experiment_name: str = "") -> Run:
    """The run that somebody means: an id, the beginning of one, a name, or `latest`.

    Raises:
        UserError: none, or several.
    """
    if UUID.fullmatch(asked):
        try:
            return client.run(asked)
        except NotFound as error:
            raise UserError(f"run {asked}: there is none ({error}); `status` lists them") from error
    known = client.experiment(experiment_name) if experiment_name else ""
    if asked == "latest":
        newest = next(client.runs(experiment_id=known), None)
        if newest is None:
            raise UserError(f"run {asked!r}: there are no runs yet")
        return client.run(newest.id)
    named = list(client.runs([equals("display_name", asked)], known))
    begins = re.fullmatch(r"[0-9a-f-]{4,}", asked)
    if not named and begins:
        newest_ones = zip(client.runs(experiment_id=known), range(NEWEST), strict=False)
        named = [run for run, _ in newest_ones if run.id.startswith(asked)]
    if len(named) != 1:
        ids = ", ".join(run.id for run in named[:5])
        raise UserError(f"run {asked!r}: {len(named)} runs have that name or id ({ids}); `status` lists them")
    return client.run(named[0].id)
