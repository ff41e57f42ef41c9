"""The loops of the sharded pipeline: a piece, and a cell that is gathered from its pieces.

Inner pipelines, as in cell.py, because only their parameters can carry each one's own CPU, memory and GPUs.
"""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model

from components import gather_pieces, synthesize_piece
from pipelines.cell import judge
from pipelines.resources import Pods, fit


@dsl.pipeline(name="piece")
def piece(
    piece: dict,
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
    """One shard of a cell's images."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    known = {"attempt": attempt, "s3_endpoint": s3_endpoint, "checkpoints": checkpoints}
    task = synthesize_piece(piece=piece, data=data, teachers=teachers, **known)
    return fit(task, pods, cpu, memory, gpus).outputs["made"]


@dsl.pipeline(name="sharded-cell")
def sharded_cell(
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
    pieces: Input[Artifact],
) -> Artifact:
    """gather_pieces -> relabel -> evaluate_student."""
    own, pods = (cpu, memory, gpus), Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    known = {"cell": cell, "teachers": teachers, "attempt": attempt}
    known |= {"s3_endpoint": s3_endpoint, "checkpoints": checkpoints}
    made = fit(gather_pieces(data=data, pieces=pieces, **known), pods, *own).outputs["synthetic"]
    return judge(made, data, known, pods, own)
