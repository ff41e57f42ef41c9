"""One cell of the pipeline's loop: synthesize -> relabel -> evaluate_student."""

from typing import Any, Dict, Tuple

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from components import evaluate_student, relabel, synthesize
from pipelines.resources import Pods, fit

Own = Tuple[Any, Any, Any]  # cpu, memory and GPUs of one pod


def pods_of(cell: Any, *steps: str) -> Dict[str, Any]:
    """The requests that a cell, the item of a loop, carries for its steps."""
    names = [f"{step}_{what}" for step in steps for what in ("cpu", "memory", "gpus")]
    return {name: getattr(cell, name) for name in names}


def judge(synthetic: Any, data: Any, known: Dict[str, Any], pods: Pods, labelling: Own, judging: Own) -> Any:
    """The result of a cell whose images are made: relabel -> evaluate_student."""
    labels = fit(relabel(synthetic=synthetic, **known), pods, *labelling).outputs["labels"]
    result = fit(evaluate_student(data=data, synthetic=synthetic, labels=labels, **known), pods, *judging)
    return result.outputs["result"]


@dsl.pipeline(name="cell")
def cell(
    cell: dict,
    synthesize_cpu: str,
    synthesize_memory: str,
    synthesize_gpus: str,
    relabel_cpu: str,
    relabel_memory: str,
    relabel_gpus: str,
    evaluate_student_cpu: str,
    evaluate_student_memory: str,
    evaluate_student_gpus: str,
    image: str,
    gpu_type: str,
    tolerations: list,
    node_selector: dict,
    s3_secret: str,
    s3_ca: str,
    s3_endpoint: str,
    s3_region: str,
    checkpoints: str,
    attempt: str,
    data: Input[Dataset],
    teachers: Input[Model],
) -> Artifact:
    """An inner pipeline, because only its parameters can carry each cell's own CPU, memory and GPUs."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret, s3_ca)
    store = {"s3_endpoint": s3_endpoint, "s3_region": s3_region, "checkpoints": checkpoints}
    known = {"cell": cell, "teachers": teachers, "attempt": attempt, **store}
    made = fit(synthesize(data=data, **known), pods, synthesize_cpu, synthesize_memory, synthesize_gpus)
    labelling = (relabel_cpu, relabel_memory, relabel_gpus)
    judging = (evaluate_student_cpu, evaluate_student_memory, evaluate_student_gpus)
    return judge(made.outputs["synthetic"], data, known, pods, labelling, judging)
