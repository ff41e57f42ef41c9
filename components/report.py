"""Results of all cells -> report artifact and what the KFP UI shows of it."""

import functools
from typing import Dict, List

from kfp.dsl import HTML, Artifact, Input, Markdown, Metrics, Output

from components._step import connect, step


def show(folder: str, page: str, table: str) -> Dict[str, float]:
    """Copy the report's page and table to where the UI looks for them; return its named numbers."""
    import json
    import pathlib
    import shutil

    made = pathlib.Path(folder)
    shutil.copyfile(made / "report.html", page)
    shutil.copyfile(made / "report.md", table)
    numbers: Dict[str, float] = json.loads((made / "summary.json").read_text(encoding="utf-8"))["metrics"]
    return numbers


@functools.partial(step, additional_funcs=[connect, show])
def report(
    experiment: str,
    results: Input[List[Artifact]],
    summary: Output[Artifact],
    page: Output[HTML],
    table: Output[Markdown],
    metrics: Output[Metrics],
    code_version: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
    history: str = "",
    schedule: str = "",
    run: str = "",
) -> List[str]:
    """Leaderboard, curves and image grids of the cells that worked; returns what failed, one line per cell.

    The run is entered into the store's history and compared with the one before it, where `history` names a store.
    """
    from distillery import steps

    connect(s3_endpoint, s3_region)
    folders = [result.path for result in results]
    failures = steps.report(experiment, folders, summary.path, code_version, history, schedule, run)
    metrics.metadata.update(show(summary.path, page.path, table.path))
    return failures
