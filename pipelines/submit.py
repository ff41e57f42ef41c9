"""`python -m pipelines submit`: start a run of a compiled package, once, with everything checked before."""

import hashlib
import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import click

from distillery.errors import DistilleryError, StoreError, UserError
from pipelines import compiled
from pipelines.api import Client, NotFound, Run, Unreachable, contains
from pipelines.follow import Follower, explain
from pipelines.options import connected
from pipelines.retry import Limits

MARK = "distillery-key:"  # in the description of a run, so that it can be found again
MAX_TEXT = 100_000  # bytes of an experiment: KFP passes no more between steps
SETTLE = 1.2  # seconds after which two runs of the same second see each other: the API tells no finer time
SIZES = ("_cpu", "_memory", "_gpus")  # how parameters end that say what pods ask for
BLOCKING = ("PENDING", "RUNNING", "PAUSED", "SUCCEEDED")  # a run in one of these answers for its key


@click.command()
@click.argument("package", type=click.Path(path_type=Path), default=compiled.DISTILL, metavar="[PACKAGE]")
@click.option("-x", "--experiment-yaml", "experiment", metavar="EXPERIMENT", help="YAML file, URI or shipped name.")
@click.option("--set", "changes", metavar="KEY=VALUE", multiple=True, help="Replace a value of the experiment.")
@click.option("--param", "params", metavar="NAME=VALUE", multiple=True, help="A parameter of the pipeline.")
@click.option("--profile", default="", help="Hardware profile, instead of the experiment's.")
@click.option("--parallelism", type=click.IntRange(1, 1000), help="Turns of each loop that run at once.")
@click.option("--queue", default="", help="Kueue's LocalQueue that lets the pods in.")
@click.option("--pull-secret", default="", help="Secret with the image registry's credentials.")
@click.option("--name", default="", help="The run's name; default: the experiment's, and the time.")
@click.option("-e", "--experiment-name", default="", help="KFP's experiment that holds the run; default: distill.")
@click.option("--pipeline-root", default="", help="Where artifacts go, for example s3://bucket/prefix.")
@click.option("--no-cache", is_flag=True, help="Run every step, whatever KFP has cached.")
@click.option("--service-account", default="", help="Kubernetes account of the pods.")
@click.option("--key", default="", help="The same key starts no second run; default: what is sent, and the day (UTC).")
@click.option("--again", is_flag=True, help="Start a run even if there is one with this key.")
@click.option("--wait", is_flag=True, help="Stay until it has ended; exit status 0 only if it succeeded.")
@click.option("--timeout", type=click.FloatRange(min=0), default=0.0, help="Seconds to wait; the run goes on.")
@click.option("--retries", type=click.IntRange(0, 100), default=0, help="Retry a failed run so often (with --wait).")
@click.option("--backoff", type=click.FloatRange(min=0), default=30.0, help="Seconds before the first retry.")
@click.option("--interval", type=click.FloatRange(min=0.01), default=5.0, help="Seconds between two looks.")
@connected
def submit(
    client: Client,
    package: Path,
    experiment: Optional[str],
    changes: Tuple[str, ...],
    params: Tuple[str, ...],
    profile: str,
    parallelism: Optional[int],
    queue: str,
    pull_secret: str,
    name: str,
    experiment_name: str,
    pipeline_root: str,
    no_cache: bool,
    service_account: str,
    key: str,
    again: bool,
    wait: bool,
    timeout: float,
    retries: int,
    backoff: float,
    interval: float,
) -> int:
    """Start a run of PACKAGE (default: the pipeline that comes with Distillery).

    A run that waits, runs or has succeeded is not started a second time under the same key; a failed one is.
    """
    if retries and not wait:
        raise UserError(f"--retries {retries}: somebody has to watch; add --wait, or leave it to `watch`")
    chosen = compiled.load(package).changed(queue, pull_secret, parallelism or 0, not no_cache)
    parameters, title = arguments(chosen, experiment, list(changes), list(params), profile)
    body: Dict[str, Any] = {"pipeline_spec": chosen.document(), "runtime_config": {"parameters": parameters}}
    if pipeline_root:
        body["runtime_config"]["pipeline_root"] = pipeline_root
    if service_account:
        body["service_account"] = service_account
    group = experiment_name or default_experiment()
    mark = MARK + digest(key or [body, group, time.strftime("%Y-%m-%d", time.gmtime())])
    body["experiment_id"] = client.experiment(group, create=True)
    body["display_name"] = name or f"{title} {time.strftime('%Y-%m-%d %H:%M', time.gmtime())}"
    body["description"] = f"{title}, submitted by Distillery; {mark}"
    run, fresh = start(client, body, mark, again)
    how = "submitted" if fresh else f"is there already ({run.state}; --again starts another)"
    click.echo(f"{run.name}: {how}\n  run {run.id}\n  {client.link(run.id)}")
    return follow(client, run, timeout, Limits(retries, backoff), interval) if wait else 0


def arguments(
    chosen: compiled.Package, experiment: Optional[str], changes: List[str], params: List[str], profile: str
) -> Tuple[Dict[str, Any], str]:
    """The pipeline's parameters, checked, and a title for the run.

    Raises:
        UserError: an experiment that cannot work, or a parameter that the package does not have.
    """
    return typed(chosen, experiment, changes, pairs(params), profile)


def pairs(params: List[str]) -> Dict[str, Any]:
    """`NAME=VALUE`, several times, as a mapping.

    Raises:
        UserError: not of that form.
    """
    texts: Dict[str, Any] = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals or not name:
            raise UserError(f"--param {param!r}: expected NAME=VALUE, for example gpu_type=amd.com/gpu")
        texts[name] = value
    return texts


def typed(
    chosen: compiled.Package, experiment: Optional[str], changes: List[str], given: Mapping[str, Any], profile: str
) -> Tuple[Dict[str, Any], str]:
    """What `arguments` does, with parameters as a mapping."""
    texts = dict(given)
    title = chosen.name
    if experiment is not None and "experiment" in texts:
        raise UserError(f"--param experiment={str(texts['experiment'])[:40]!r}: -x says it too; leave one of them out")
    source = texts.pop("experiment", None) if experiment is None else experiment
    if profile and "profile" in chosen.parameters:
        texts["profile"] = profile
    elif profile:
        changes = [*changes, f"profile={profile}"]
    if source is None and changes:
        raise UserError(f"--set {changes[0]!r}: there is no experiment to change; give -x EXPERIMENT")
    values = chosen.checked(texts)
    if source is None and not any(name == "profile" or name.endswith(SIZES) for name in values):
        return values, title
    from distillery.profiles import Wish  # imports torch, as the check of an experiment does

    known = {each.name for each in fields(Wish)}
    wish = Wish(**{name: text for name, text in values.items() if name in known})
    if source is None:
        return values, title
    values["experiment"], title = experiment_text(source, changes, wish)
    return chosen.checked(values), title


def experiment_text(source: str, changes: List[str], wish: Any) -> Tuple[str, str]:
    """What to send as the pipeline's parameter `experiment`, and the experiment's name, after every check.

    A file's text is sent, since the cluster cannot read it; a URI and a shipped name are sent as they are.

    Args:
        source, changes: see `experiment.override`.
        wish: what is asked for pods, a `profiles.Wish`.

    Raises:
        UserError: one line per fault of the experiment.
    """
    from distillery import experiment  # imports torch

    text = experiment.override(source, changes)
    try:
        name = experiment.check(text, wish=wish)[0].name
    except StoreError as error:
        if changes:
            raise
        click.echo(f"{source}: not checked, since it cannot be read from here ({error})", err=True)
        return source, source.rpartition("/")[2].removesuffix(".yaml")
    if not changes and (source in experiment.shipped() or source.startswith(("s3://",))):
        return source, name
    text = text if changes else experiment.read(source)[0]
    if len(text.encode()) > MAX_TEXT:
        raise UserError(
            f"experiment {name}: {len(text.encode())} bytes, and Kubeflow passes at most {MAX_TEXT} to a step; put "
            "the file into the store and give its s3:// URI"
        )
    return text, name


def start(client: Client, body: Dict[str, Any], mark: str, again: bool = False) -> Tuple[Run, bool]:
    """The run with that mark, and whether it was started here.

    The API has no way to create a run only if there is none, and an answer may be lost after it was. So: look, create,
    look again; of several the oldest one stays, and whoever started another one ends it.
    """
    if not again and (found := oldest(client, mark)):
        return found, False
    before = {run.id for run in client.runs([contains("description", mark)])}
    try:
        run = client.create_run(body)
    except Unreachable as error:
        if not error.sent:
            raise
        arrived = [run for run in client.runs([contains("description", mark)]) if run.id not in before]
        run = arrived[-1] if arrived else client.create_run(body)
    if again:
        return run, True
    time.sleep(SETTLE)
    first = oldest(client, mark) or run
    if first.id != run.id:
        client.terminate(run.id)
        client.delete_run(run.id)
    return first, first.id == run.id


def oldest(client: Client, mark: str) -> Optional[Run]:
    """The run that answers for a mark."""
    found = [run for run in client.runs([contains("description", mark)]) if run.state in BLOCKING]
    return min(found, key=lambda run: (run.created, run.id), default=None)


def follow(client: Client, run: Run, timeout: float, limits: Limits, interval: float) -> int:
    """Wait for a run and say how it went; the exit status."""
    follower = Follower(client, click.echo, interval, limits)
    try:
        ended = follower.wait(run.id, timeout)
    except (KeyboardInterrupt, DistilleryError) as error:
        if not isinstance(error, NotFound):
            click.echo(
                f"\nthe run goes on; `python -m pipelines status {run.id}` tells about it, `logs {run.id} --follow` "
                f"shows what it prints, `cancel {run.id}` ends it",
                err=True,
            )
        raise
    if ended.state == "SUCCEEDED":
        click.echo(f"{ended.name}: SUCCEEDED\n  {client.link(ended.id)}")
        return 0
    if not ended.ended:
        click.echo(f"{ended.name}: still {ended.state} after {timeout:.0f} s; it goes on, see {client.link(ended.id)}")
        return 1
    click.echo(f"{ended.name}: {ended.state}", err=True)
    for line in follower.patiently(lambda: explain(client, ended)):
        click.echo(line, err=True)
    return 1


def default_experiment() -> str:
    """KFP's experiment where nobody names one."""
    names = ("KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME", "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME")
    return next(filter(None, map(os.environ.get, names)), "distill")


def digest(what: Any) -> str:
    """A short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
