"""The command, and the checks in their order."""

import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from distillery.errors import DistilleryError, UserError
from pipelines.compiled import DISTILL, load
from pipelines.doctor import asks, kubeflow, limits, nodes, pod, secrets, settings, store
from pipelines.doctor.case import Case, Place
from pipelines.doctor.cluster import ClusterError
from pipelines.doctor.finding import Finding, Status, as_json, hide, line, ok, skipped, summary, told, wrong
from pipelines.options import OPTIONS


@dataclass(frozen=True)
class Check:
    """One step of the examination."""

    name: str
    look: Callable[[Case], Iterable[Finding]]
    needs: str = ""  # "cluster", "namespace"


def package(case: Case) -> Iterable[Finding]:
    """What each step of the package asks, for the parameters given."""
    quickly = {"DISTILLERY_STORE_TIMEOUT": "10"}  # for an experiment that lies in a store
    own = Place("experiment", "", case.parameter("s3_endpoint"), case.secret, region=case.parameter("s3_region"))
    with store.variables(store.settings(case, own) | quickly), store.quiet():
        case.asks = asks.asks(case.package, case.parameters)
    count = len({step for steps in case.asks.steps.values() for step in steps})
    yield ok("package", f"{case.package.path.name}: {count} steps, experiment {_short(case.parameter('experiment'))!r}")
    for why in sorted(set(case.asks.unknown.values())):
        steps = [step for step, cause in case.asks.unknown.items() if cause == why]
        yield skipped("package", f"{', '.join(steps)}: what they need is not known here: {why}")


CHECKS = (
    Check("kubernetes", settings.connect),
    Check("endpoint", kubeflow.check),
    Check("namespace", settings.namespace, "cluster"),
    Check("rights", settings.rights, "namespace"),
    Check("service account", settings.account, "namespace"),
    Check("secret", secrets.own, "namespace"),
    Check("kfp-launcher", secrets.launcher, "namespace"),
    Check("pull secret", secrets.pull, "namespace"),
    Check("queue", settings.queue, "namespace"),
    Check("retries", settings.retries, "cluster"),
    Check("package", package),
    Check("shared memory", limits.shm),
    Check("quota", limits.quota, "namespace"),
    Check("nodes", nodes.check, "cluster"),
    Check("store", store.check),
    Check("pod", pod.check, "namespace"),
)


def examine(case: Case, show: Callable[[Finding], None]) -> list[Finding]:
    """Every check in order; what one needs and is not there makes it skipped.

    Args:
        case: the questions; filled with what is learned.
        show: receives each finding as it comes.
    """
    found: list[Finding] = []

    def keep(many: Iterable[Finding]) -> None:
        for one in many:
            found.append(hide(one, case.known()))
            show(found[-1])

    left: list[str] = []
    for check in CHECKS:
        if (check.needs and case.cluster is None) or (check.needs == "namespace" and not case.has_namespace):
            left.append(check.name)
            continue
        try:
            keep(check.look(case))
        except ClusterError as error:
            do = "repeat; if it stays, see the API server's log"
            keep([skipped(check.name, str(error)) if error.status == 403 else wrong(check.name, str(error), do)])
        except DistilleryError as error:
            keep([told(check.name, error)])
    if left:
        what = f"namespace {case.namespace}" if case.cluster else "Kubernetes"
        keep([skipped("not looked at", f"without {what}: {', '.join(left)}")])
    return found


@click.command()
@click.option("--package", type=click.Path(path_type=Path), default=DISTILL, help="Compiled pipeline; default distill.")
@click.option("--param", "parameters", metavar="NAME=VALUE", multiple=True, help="A pipeline parameter of the run.")
@click.option("--profile", default="", help="Hardware profile, as for submit.")
@click.option("-x", "--experiment-yaml", metavar="FILE", default="", help="The experiment: a file, or a shipped name.")
@click.option("--secret", default="", help="The run's S3 secret; default as in the package (distillery-s3).")
@click.option("--queue", default="", help="Kueue LocalQueue of the pods; default as in the package.")
@click.option("--pull-secret", default="", help="The image registry's secret; default as in the package.")
@click.option("--service-account", default="", help="Kubernetes account of the pods; default KFP's own.")
@click.option("--store", "place", metavar="s3://BUCKET/PREFIX", default="", help="A place that the run will use.")
@click.option("--pod/--no-pod", default=True, help="Try image and store from a pod, which is deleted again.")
@click.option("--pod-timeout", default=120.0, show_default=True, help="Seconds that the pod may take.")
@click.option("--json", "structured", is_flag=True, help="One JSON object instead of lines.")
def doctor(
    package: Path,
    parameters: tuple[str, ...],
    profile: str,
    experiment_yaml: str,
    secret: str,
    queue: str,
    pull_secret: str,
    service_account: str,
    place: str,
    pod: bool,
    pod_timeout: float,
    structured: bool,
    **options: Any,
) -> int:
    """Look at everything a run needs, and say what is wrong and what to do.

    Exit status 0 when nothing is wrong, 1 when something is, 2 for a mistake in the command itself.
    """
    if place and not place.startswith("s3://"):
        raise UserError(f"--store {place!r}: pods do not share this machine's folders; give s3://bucket/prefix")
    given = _pairs(parameters) | ({"profile": profile} if profile else {}) | ({"s3_secret": secret} if secret else {})
    given |= {"experiment": _experiment(experiment_yaml)} if experiment_yaml else {}
    read = load(package)
    case = Case(read, options, asks.values(read, given), store=place, pod=pod, pod_seconds=pod_timeout)
    case.secret, case.account = case.parameter("s3_secret"), service_account
    case.queue = queue or asks.queue(read)
    case.pull_secret = pull_secret or asks.pull_secret(read, case.parameters)
    case.places = list(secrets.own_places(case))
    warnings.simplefilter("ignore")  # of kfp and of the client, about Python and TLS
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pod is deleted then too
    try:
        found = examine(case, (lambda _: None) if structured else (lambda one: click.echo(line(one))))
    finally:
        signal.signal(signal.SIGTERM, before)
    click.echo(as_json(found) if structured else f"\n{summary(found)}")
    return int(any(one.status == Status.wrong for one in found))


for _option in reversed(OPTIONS):
    doctor = _option(doctor)


def _pairs(given: tuple[str, ...]) -> dict[str, Any]:
    for pair in given:
        if "=" not in pair:
            raise UserError(f"--param {pair!r}: write NAME=VALUE")
    return dict(pair.split("=", 1) for pair in given)


def _experiment(given: str) -> str:
    """The text of the file of that name, or the name of a shipped experiment."""
    path = Path(given)
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--experiment-yaml {given!r}: {error}; give a YAML file") from error


def _short(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0][:40] + ("..." if len(lines) > 1 else "")
