"""One teacher of the pipeline's first loop."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model

from components import train_teacher
from pipelines.resources import Pods, fit


@dsl.pipeline(name="teacher")
def teacher(
    wanted: dict,
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
    data: Input[Dataset],
) -> Model:
    """An inner pipeline, because KFP takes a task's resources inside a loop from parameters of such a one alone."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    task = train_teacher(wanted=wanted, data=data, s3_endpoint=s3_endpoint, checkpoints=checkpoints)
    return fit(task, pods, cpu, memory, gpus).outputs["teacher"]
