"""One cell of the pipeline's loop: synthesize -> relabel -> evaluate_student."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from components import evaluate_student, relabel, synthesize
from pipelines.resources import Pods, fit


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
    labels = fit(relabel(synthetic=made, **known), pods, *own).outputs["labels"]
    result = fit(evaluate_student(data=data, synthetic=made, labels=labels, **known), pods, *own)
    return result.outputs["result"]
