"""One cell of the pipeline's loop: synthesize -> relabel -> evaluate_student."""

from typing import Any, Dict, Tuple

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from components import evaluate_student, relabel, synthesize
from pipelines.resources import Pods, fit


def judge(synthetic: Any, data: Any, known: Dict[str, Any], pods: Pods, own: Tuple[Any, Any, Any]) -> Any:
    """The result of a cell whose images are made: relabel -> evaluate_student."""
    labels = fit(relabel(synthetic=synthetic, **known), pods, *own).outputs["labels"]
    result = fit(evaluate_student(data=data, synthetic=synthetic, labels=labels, **known), pods, *own)
    return result.outputs["result"]


@dsl.pipeline(name="cell")
def cell(
    cell: dict,
    cpu: str,
    memory: str,
    gpus: str,
    image: str,
    gpu_type: str,
    tolerations: list,
    node_selector: dict,
    s3_secret: str,
    s3_endpoint: str,
    checkpoints: str,
    attempt: str,
    data: Input[Dataset],
    teachers: Input[Model],
) -> Artifact:
    """An inner pipeline, because only its parameters can carry each cell's own CPU, memory and GPUs."""
    own, pods = (cpu, memory, gpus), Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    store = {"s3_endpoint": s3_endpoint, "checkpoints": checkpoints}
    known = {"cell": cell, "teachers": teachers, "attempt": attempt, **store}
    made = fit(synthesize(data=data, **known), pods, *own).outputs["synthetic"]
    return judge(made, data, known, pods, own)
