"""Everything of one cell -> result artifact."""

import functools
from typing import Dict

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components._step import connect, facts, step


def scores(folder: str) -> Dict[str, float]:
    """Accuracies of a result in percent, one name per student; `failed` is 1 for the artifact of a failed cell."""
    import json
    import pathlib
    import re

    path = pathlib.Path(folder, "result.json")
    found = json.loads(path.read_text(encoding="utf-8"))["students"] if path.exists() else []
    names = [re.sub(r"[^A-Za-z0-9]+", "_", f"{i}_{s['net']}_{s['recipe']}").strip("_") for i, s in enumerate(found)]
    values = {f"acc_{w}_{n}": 100 * s[f"acc_{w}"] for n, s in zip(names, found, strict=True) for w in ("last", "best")}
    return {"failed": float(not found), **values}


@functools.partial(step, additional_funcs=[facts, connect, scores])
def evaluate_student(
    cell: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    synthetic: Input[Dataset],
    labels: Input[Artifact],
    result: Output[Artifact],
    metrics: Output[Metrics],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """Train every student of the cell from scratch and test it. `attempt` changes nothing but KFP's cache key."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    inputs = (data.path, teachers.path, synthetic.path, labels.path)
    result.metadata.update(facts(steps.evaluate_student(cell, *inputs, result.path, checkpoints)))
    metrics.metadata.update(scores(result.path))
