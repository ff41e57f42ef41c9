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
    synthesize_cpu: str,
    synthesize_memory: str,
    synthesize_gpus: str,
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
    """One shard of a cell's images."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret, s3_ca)
    known = {"s3_endpoint": s3_endpoint, "s3_region": s3_region, "checkpoints": checkpoints, "attempt": attempt}
    task = synthesize_piece(piece=piece, data=data, teachers=teachers, **known)
    return fit(task, pods, synthesize_cpu, synthesize_memory, synthesize_gpus).outputs["made"]


@dsl.pipeline(name="sharded-cell")
def sharded_cell(
    cell: dict,
    gather_pieces_cpu: str,
    gather_pieces_memory: str,
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
    pieces: Input[Artifact],
) -> Artifact:
    """gather_pieces -> relabel -> evaluate_student."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret, s3_ca)
    store = {"s3_endpoint": s3_endpoint, "s3_region": s3_region, "checkpoints": checkpoints}
    known = {"cell": cell, "teachers": teachers, "attempt": attempt, **store}
    made = fit(gather_pieces(data=data, pieces=pieces, **known), pods, gather_pieces_cpu, gather_pieces_memory)
    labelling = (relabel_cpu, relabel_memory, relabel_gpus)
    judging = (evaluate_student_cpu, evaluate_student_memory, evaluate_student_gpus)
    return judge(made.outputs["synthetic"], data, known, pods, labelling, judging)
