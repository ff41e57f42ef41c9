"""The command line: check, plan, run, inspect, compare, history, methods, export, publish.

Exit status 0 done, 1 failed, 2 the user's mistake.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from distillery.errors import DistilleryError, UserError

if TYPE_CHECKING:
    from distillery.artifact import Manifest

app = typer.Typer(
    help="Dataset distillation: real images in, a few synthetic images per class with soft labels out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
Source = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="YAML file, file:// or s3:// URI, or a shipped name.")
]


Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, for example dataset.root=data/cifar10."),
]


class Log(enum.StrEnum):
    """How progress is written to standard error."""

    plain = "plain"
    quiet = "quiet"
    json = "json"


@app.command()
def check(source: Source, changes: Changes = None) -> None:
    """Validate an experiment: every key, name and value, before anything is started."""
    from distillery import experiment

    cells = experiment.check(experiment.override(source, changes or []))
    typer.echo(f"{cells[0].name}: valid; {len(cells)} cells, {len(cells[0].students)} students each")


@app.command()
def plan(
    source: Source,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as the pipeline receives them.")] = False,
    tflops: Annotated[float, typer.Option(min=0.0, help="Assume so many TFLOP/s instead of measuring.")] = 0.0,
) -> None:
    """Print the cells, an estimate of time, memory and bytes (of this machine, or --tflops), and what pods ask for."""
    from distillery import estimate, experiment, steps

    source = experiment.override(source, changes or [])
    cells = steps.plan(source, pods={})
    typer.echo(json.dumps(cells, indent=1) if as_json else f"{estimate.table(source, tflops)}\n{estimate.pods(source)}")


@app.command()
def run(
    source: Source,
    out: Annotated[str, typer.Option(help="Output folder, or file:// or s3:// URI; an earlier run there continues.")],
    changes: Changes = None,
    log: Annotated[Log | None, typer.Option(help="plain (default), quiet, or json lines for pods.")] = None,
    history: Annotated[
        str, typer.Option(metavar="PLACE", help="Folder or URI whose history/ receives a record of the run [OUT].")
    ] = "",
) -> None:
    """Run an experiment to its report; start it again after any interruption and it continues."""
    from distillery import experiment, steps
    from distillery import run as runner

    if log is not None:
        os.environ["DISTILLERY_LOG"] = log.value
    done = runner.run(experiment.override(source, changes or []), out, history)
    typer.echo((done.report / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"report: {done.uri}/report.html")
    steps.verdict(done.failures)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="An artifact folder, or its file:// or s3:// URI.")],
) -> None:
    """Check an artifact's files against its manifest and say what it is."""
    from distillery import inspection

    typer.echo(inspection.describe(folder))


@app.command(hidden=True)
def probe(
    uri: Annotated[str, typer.Argument(help="A place to write to, read, list and delete.")] = "",
) -> None:
    """Say in one line of JSON what this process has, and whether a store may be used from it."""
    from distillery import probe as surroundings

    typer.echo(json.dumps(surroundings.probe(uri)))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two or more: run folders, reports, records.")],
    place: Annotated[
        str, typer.Option("--history", metavar="PLACE", help="Store in whose history/ RUN may be an id.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Print what differs between runs: configuration, code, hardware, and results with a test over seeds."""
    from distillery import compare as comparing

    found = comparing.compare([comparing.find(run, place) for run in runs])
    typer.echo(json.dumps(found, indent=1) if as_json else comparing.text(found))


@app.command()
def history(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="Folder or URI with a history/ below it.")],
    experiment: Annotated[str, typer.Option(help="Only runs of this experiment.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the runs of a store, oldest first: when, how they ended, their best result, and what got worse."""
    from distillery import compare as comparing

    typer.echo(comparing.listing(place, experiment, as_json))


@app.command()
def exporter(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="Folder or URI with a history/ below it.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 chooses one.")] = 9185,
    address: Annotated[str, typer.Option(help="Of this machine; :: for IPv6.")] = "0.0.0.0",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the store.")] = 30.0,
    days: Annotated[float, typer.Option(min=0, help="Leave out what had no run for so long.")] = 90.0,
    experiments: Annotated[int, typer.Option(min=1, help="How many are served; those with the newest runs.")] = 100,
    capacity: Annotated[
        str, typer.Option(metavar="SIZE", help="What a bucket may hold, such as 2Ti; its objects are counted hourly.")
    ] = "",
) -> None:
    """Serve a store's history to Prometheus (docs/monitoring.md); ends with SIGTERM or Ctrl-C."""
    from distillery.data.limits import size_of

    try:
        from distillery import exporter as serving
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise UserError(f"exporter needs {error.name}: pip install 'distillery[metrics]'") from error
    room = size_of(capacity, "--capacity")
    served = serving.Exporter(place, days=days, experiments=experiments, capacity=room)
    serving.serve(served, port=port, address=address, every=every)


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="One method, with its options.")] = "",
) -> None:
    """List the methods, or one method's options with their defaults."""
    from distillery import inspection

    typer.echo(inspection.method(name) if name else inspection.methods())


FORMAT_HELP = "folder (.npy), imagefolder, webdataset, huggingface, or npz."
CELL = typer.Option(help="Which cell of a run, or the beginning of its name.")
STUDENT = typer.Option(min=0, help="Which student of the cell has its views recorded, from 0.")
VIEWS = typer.Option("--views/--no-views", help="Record every view of the student with its soft label.")
TEST = typer.Option("--with-test", help="Add the validation images, as test.npz.")
BESIDE = typer.Option(
    metavar="KIND=URI",
    help="For an artifact of a cluster's run: result=, labels=, teachers=, data= of the same cell; repeatable.",
)
Set = Annotated[str, typer.Argument(metavar="SOURCE", help="A run, or a synthetic artifact: folder or URI.")]


@app.command()
def export(
    source: Set,
    out: Annotated[str, typer.Option(help="Where to: a folder, or file:// or s3:// URI.")],
    form: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "folder",
    cell: Annotated[str, CELL] = "",
    student: Annotated[int, STUDENT] = 0,
    with_views: Annotated[bool, VIEWS] = True,
    with_test: Annotated[bool, TEST] = False,
    beside: Annotated[list[str] | None, BESIDE] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported set that is there.")] = False,
) -> None:
    """Write a distilled set for others: images, soft labels, recorded views and a card."""
    from distillery import export as exporting

    wanted = exporting.Wanted(form, cell, student, with_views, with_test, exporting.source.beside(beside or []))
    manifest = exporting.export(source, out, wanted, overwrite=overwrite)
    typer.echo(f"{out}: {_size(manifest)}, fingerprint {manifest.fingerprint[:16]}")


@app.command()
def publish(
    source: Set,
    to: Annotated[str, typer.Option(help="The set's place: TO/VERSION/ and TO/latest.json are written.")],
    version: Annotated[str, typer.Option(help="Its name; by default the next of v1, v2, ...")] = "",
    form: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "folder",
    cell: Annotated[str, CELL] = "",
    student: Annotated[int, STUDENT] = 0,
    with_views: Annotated[bool, VIEWS] = True,
    with_test: Annotated[bool, TEST] = False,
    beside: Annotated[list[str] | None, BESIDE] = None,
) -> None:
    """Export a distilled set as a new version, which never changes again; latest.json then points to it."""
    from distillery import export as exporting

    wanted = exporting.Wanted(form, cell, student, with_views, with_test, exporting.source.beside(beside or []))
    name, manifest = exporting.publish(source, to, wanted, version=version)
    typer.echo(f"{to.rstrip('/')}/{name}: {_size(manifest)}, fingerprint {manifest.fingerprint[:16]}")


def _size(manifest: Manifest) -> str:
    from distillery import console

    total = sum(facts["bytes"] for facts in manifest.files.values())
    return f"{manifest.meta['images']} images in {len(manifest.files)} files, {console.size(total)}"


def main() -> None:
    """Entry point: turns errors raised on purpose into one message and an exit status."""
    try:
        status = app(standalone_mode=False)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_code
    except typer.Abort:
        status = 130
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror or error}{place}; check that place and its disk, then start again",
            file=sys.stderr,
        )
        status = 1
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer brings a click of its own now
        if show is None:
            raise
        show()
        status = error.exit_code  # type: ignore[attr-defined]
    if status == 130:
        print("interrupted; start the same command again to continue where it stopped", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
