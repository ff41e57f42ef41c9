"""`python -m pipelines schedule apply | diff | list | pause | resume | run-now | delete`: runs at set times."""

import json
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from distillery.errors import UserError, choices, nearest
from pipelines import submit
from pipelines.api import Client, NotFound, Run, contains
from pipelines.options import connected
from pipelines.retry import Limits
from pipelines.schedule_apply import Change, Known, converge, ours, plan, remove
from pipelines.schedule_file import MARK, kind, next_time, read, set_time, written

SIGNS = {"new": "+", "changed": "~", "unchanged": "=", "half done": "!", "gone": "-"}
YES = click.option("--yes", is_flag=True, help="Ask nothing.")
PRUNE = click.option("--prune", is_flag=True, help="Delete our schedules that the file does not name.")
TARGET = click.argument("target", metavar="NAME|FILE")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def schedule() -> None:
    """Runs at set times: a file says which, Kubeflow starts them."""


@schedule.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything, show what would change, change nothing.")
@PRUNE
@YES
@connected
def apply(client: Client, file: Path, dry_run: bool, prune: bool, yes: bool) -> int:
    """Make the schedules on the server those of FILE.

    Everything in it is checked first, as `submit` checks. Schedules that it does not name stay, unless --prune.
    """
    changes = plan(client, read(file))
    todo = _show(changes, prune)
    if not todo:
        click.echo("nothing to change")
        return 0
    if dry_run:
        click.echo(f"dry run: {choices(change.name for change in todo)} would change; nothing was sent")
        return 0
    _agree(yes, f"change {len(todo)} on {client.to.endpoint}?")
    for change in todo:
        if change.wanted:
            converge(client, change.wanted, click.echo)
            state = "on" if change.wanted.enabled else "paused"
            click.echo(f"{change.name}: {state}, {change.wanted.timing}")
        else:
            _delete(client, change.found)
    return 0


@schedule.command()
@click.argument("file", type=click.Path(path_type=Path))
@PRUNE
@click.option("--exit-code", is_flag=True, help="Exit status 1 if something differs.")
@connected
def diff(client: Client, file: Path, prune: bool, exit_code: bool) -> int:
    """Show how FILE differs from the server."""
    todo = _show(plan(client, read(file)), prune)
    return int(bool(todo) and exit_code)


def _show(changes: List[Change], prune: bool) -> List[Change]:
    """Print the changes; returns those that have to be made."""
    for change in changes:
        note = " (on the server, not in the file; --prune deletes it)" if change.what == "gone" and not prune else ""
        click.echo(f"{SIGNS[change.what]} {change.name}: {change.what}{note}")
        for line in change.lines:
            click.echo(f"  {line}")
    return [change for change in changes if change.what != "unchanged" and (prune or change.what != "gone")]


def _agree(yes: bool, question: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} nobody is there to answer (no terminal); give --yes")
    click.confirm(question, abort=True)


@schedule.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connected
def list_(client: Client, as_json: bool) -> int:
    """Every schedule: when it fires, whether it is on, its next and its last run."""
    rows = [_row(client, name, found) for name, found in ours(client).items()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        state = "on" if row["enabled"] else "paused"
        click.echo(f"{row['name']}: {state}, {row['timing']}")
        click.echo(f"  next {row['next'] or 'none'}; last {row['last'] or 'none'} {row['state']}".rstrip())
        if row["copies"] > 1:
            click.echo(f"  half done: {row['copies']} recurring runs have this name; `schedule apply FILE` repairs it")
    if not rows:
        click.echo("no schedules; `schedule apply FILE` makes some")
    return 0


def _row(client: Client, name: str, found: List[Known]) -> Dict[str, Any]:
    main = found[0]
    last = _last(client, name, found)
    upcoming = _next(main, last) if main.enabled else None
    return {
        "name": name,
        "timing": main.timing,
        "enabled": main.enabled,
        "next": f"{upcoming:%Y-%m-%dT%H:%M:%SZ}" if upcoming else "",
        "last": last.created if last else "",
        "state": last.state if last else "",
        "run": last.id if last else "",
        "id": main.id,
        "copies": len(found),
    }


def _last(client: Client, name: str, found: List[Known]) -> Optional[Run]:
    """The newest run that it started, or that was started by `run-now`."""
    where: List[Dict[str, Any]] = [
        {"operation": "EQUALS", "key": "recurring_run_id", "string_value": known.id} for known in found
    ]
    newest = [next(client.runs([predicate]), None) for predicate in [*where, contains("description", f"{MARK}{name};")]]
    return max(filter(None, newest), key=lambda run: run.created, default=None)


def _next(known: Known, last: Optional[Run]) -> Optional[datetime]:
    """When it fires next; a run started by hand does not move it."""
    by_itself = last is not None and last.raw.get("recurring_run_id") == known.id
    since = set_time(last.created if last and by_itself else known.created)
    try:
        return next_time(
            known.trigger, known.timezone, datetime.now(UTC), datetime.fromisoformat(since) if since else None
        )
    except UserError:  # not ours any more
        return None


@schedule.command()
@TARGET
@connected
def pause(client: Client, target: str) -> int:
    """Let a schedule start no more runs; those that it has started go on."""
    for name, found in _named(client, target):
        firing = [known for known in found if known.enabled]
        for known in firing:
            client.enable_recurring(known.id, False)
        click.echo(f"{name}: {'paused' if firing else 'was paused already'}")
    return 0


@schedule.command()
@TARGET
@connected
def resume(client: Client, target: str) -> int:
    """Let a paused schedule fire again."""
    for name, found in _named(client, target):
        if len(found) > 1:
            raise UserError(f"schedule {name}: {len(found)} recurring runs have this name; `schedule apply FILE` first")
        (known,) = found
        if known.enabled:
            click.echo(f"{name}: is on already, {known.timing}")
            continue
        client.enable_recurring(known.id)
        click.echo(f"{name}: on, {known.timing}")
        if _missed(known):
            several = "each time that it missed" if not known.raw.get("no_catchup") else "the time that it missed last"
            click.echo(f"  Kubeflow starts a run for {several}, now")
    return 0


def _missed(known: Known) -> bool:
    """Whether it would have fired since it was paused, as far as the server tells when that was."""
    since = set_time(known.raw.get("updated_at")) or set_time(known.created)
    if not since:
        return False
    paused = datetime.fromisoformat(since)
    name, _ = kind(known.trigger)
    due = next_time(known.trigger, known.timezone, paused, paused) if name else None
    return due is not None and due <= datetime.now(UTC)


@schedule.command("run-now")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Stay until it has ended; exit status 0 only if it succeeded.")
@click.option("--timeout", type=click.FloatRange(min=0), default=0.0, help="Seconds to wait; the run goes on.")
@click.option("--interval", type=click.FloatRange(min=0.01), default=5.0, help="Seconds between two looks.")
@connected
def run_now(client: Client, name: str, wait: bool, timeout: float, interval: float) -> int:
    """Start one run of a schedule at once, paused or not; the schedule goes on as before."""
    ((_, found),) = _named(client, name, files=False)
    known = found[0].raw
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    mark = submit.MARK + submit.digest([found[0].id, str(uuid.uuid4())])
    fields = ("pipeline_spec", "pipeline_version_reference", "runtime_config", "service_account", "experiment_id")
    body = {key: known[key] for key in fields if known.get(key)}
    body |= {"display_name": f"{name} {now}", "description": f"started by hand; {MARK}{name}; {mark}"}
    run, _ = submit.start(client, body, mark, again=True)
    click.echo(f"{run.name}: submitted\n  run {run.id}\n  {client.link(run.id)}")
    return submit.follow(client, run, timeout, Limits(0, 0.0), interval) if wait else 0


@schedule.command()
@TARGET
@YES
@connected
def delete(client: Client, target: str, yes: bool) -> int:
    """Delete a schedule, or all that a file names; runs stay, and go on."""
    chosen = _named(client, target)
    _agree(yes, f"delete {choices(name for name, _ in chosen)} on {client.to.endpoint}?")
    for _, found in chosen:
        _delete(client, found)
    return 0


def _delete(client: Client, found: List[Known]) -> None:
    for known in found:
        remove(client, known, click.echo)
    click.echo(f"{found[0].name}: deleted")


def _named(client: Client, target: str, files: bool = True) -> List[Tuple[str, List[Known]]]:
    """The schedules on the server that somebody means: by name, or all those in a file."""
    path = Path(target)
    in_file = files and (path.suffix in (".yaml", ".yml") or path.is_file())
    names = [each.name for each in written(path)] if in_file else [target]
    there = ours(client)
    missing = [name for name in names if name not in there]
    if missing:
        known = f"there are {choices(there)}" if there else "there are none of ours"
        raise NotFound(
            f"schedule {choices(missing)}: not on {client.to.endpoint}{nearest(missing[0], there)}; {known}; "
            "`schedule apply FILE` makes them"
        )
    return [(name, there[name]) for name in names]
