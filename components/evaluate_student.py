"""Everything of one cell -> result artifact, and what the KFP UI shows of it."""

import functools
from typing import Any, Dict

from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components._step import connect, facts, step


def scores(folder: str, run: Dict[str, Any]) -> Dict[str, float]:
    """A result's numbers under names that people read: `accuracy rded ipc10 convnet3 fair-soft`, in percent.

    `failed` is 1 for the artifact of a failed cell. Seeds share names, so that the compare page sets them side by side.
    `run` is the part of the manifest that says what was spent.
    """
    import json
    import math
    import pathlib
    import re

    path = pathlib.Path(folder, "result.json")
    if not path.exists():
        return {"failed": 1.0}
    found = json.loads(path.read_text(encoding="utf-8"))
    cell, named = found["cell"], {"failed": 0.0, "seed": float(found["cell"]["seed"])}
    seen: Dict[str, int] = {}
    for student in found["students"]:
        words = f"{cell['method']} ipc{cell['ipc']} {student['net']} {student['recipe']}"
        words = " ".join(re.sub(r"[^A-Za-z0-9_.-]+", " ", words).split())  # what MLflow takes in a name
        seen[words] = seen.get(words, 0) + 1
        words += f" no{seen[words]}" if seen[words] > 1 else ""
        named[f"accuracy {words}"] = round(100 * student["acc_last"], 2)
        named[f"best accuracy {words}"] = round(100 * student["acc_best"], 2)
    if found["students"]:
        named["image bytes"] = float(found["students"][0]["image_bytes"])
        named["label bytes"] = float(max(s["label_bytes"] for s in found["students"]))
    for name in ("synthesize", "relabel", "evaluate_student"):
        named[f"seconds {name}"] = float(run.get("steps", {}).get(name, math.nan))
        for kind, held in run.get("peaks", {}).get(name, {}).items():
            named[f"{kind} bytes {name}"] = float(held)
    return {name: value for name, value in named.items() if math.isfinite(value)}


@functools.partial(step, additional_funcs=[facts, connect, scores])
def evaluate_student(
    cell: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    synthetic: Input[Dataset],
    labels: Input[Artifact],
    result: Output[Artifact],
    metrics: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """Train every student of the cell from scratch and test it. `attempt` changes nothing but KFP's cache key."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    made = steps.evaluate_student(cell, data.path, teachers.path, synthetic.path, labels.path, result.path, checkpoints)
    result.metadata.update(facts(made))
    metrics.metadata.update(scores(result.path, made.run))
    for names, counts in steps.mistakes(result.path):
        confusion.log_confusion_matrix(names, counts)
