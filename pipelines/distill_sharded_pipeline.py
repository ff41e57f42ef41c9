"""The DAG for cells too large for one pod: as distill_pipeline.py, with a loop over pieces before the one over cells.

A cell has as many pieces as its `shards` in the experiment. Images, labels and results are those of the other pipeline.
"""

from kfp import dsl

from components import IMAGE, bundle_pieces, plan_pieces
from pipelines.flow import after_cells, before_cells
from pipelines.resources import ANY_NODE, CELLS_AT_ONCE, NEEDS, NO_TOLERATIONS, PIECES_AT_ONCE, Pods, fit
from pipelines.sharded_cell import piece, sharded_cell


@dsl.pipeline(name="distill-sharded", description="As distill, with each cell's images made in pieces, a pod for each.")
def distill_sharded(
    experiment: str = "demo",  # name of a shipped experiment, its YAML text, or a file:// or s3:// URI
    code_version: str = "",  # stamped on every cell; "" = the version inside the image
    attempt: str = "1",  # another value runs cells again whose failure KFP has cached
    image: str = IMAGE,
    gpu_type: str = "nvidia.com/gpu",
    data_cpu: str = NEEDS["prepare_data"].cpu,
    data_memory: str = NEEDS["prepare_data"].memory,
    teacher_cpu: str = NEEDS["train_teacher"].cpu,
    teacher_memory: str = NEEDS["train_teacher"].memory,
    teacher_gpus: str = NEEDS["train_teacher"].gpus,
    tolerations: list = NO_TOLERATIONS,  # of every step's pod, as in a pod's spec
    node_selector: dict = ANY_NODE,
    s3_endpoint: str = "",  # for example http://minio.storage:9000; "" = AWS
    s3_secret: str = "distillery-s3",  # keys accesskey, secretkey; it may be missing
    checkpoints: str = "",  # s3:// prefix where long loops save their state; "" = a lost pod starts its step again
) -> None:
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    store = {"s3_endpoint": s3_endpoint, "checkpoints": checkpoints}
    code = {"code_version": code_version, "s3_endpoint": s3_endpoint}
    for_data = {"cpu": data_cpu, "memory": data_memory}
    for_teachers = {"cpu": teacher_cpu, "memory": teacher_memory, "gpus": teacher_gpus}
    cells, data, teachers = before_cells(experiment, pods, code, store, for_data, for_teachers)
    known = {"data": data, "teachers": teachers, "attempt": attempt, **vars(pods), **store}
    pieces = fit(plan_pieces(cells=cells), pods)
    with dsl.ParallelFor(pieces.output, parallelism=PIECES_AT_ONCE) as p:
        made = piece(piece=p, cpu=p.cpu, memory=p.memory, gpus=p.gpus, **known)
    bundle = fit(bundle_pieces(made=dsl.Collected(made.output)), pods).outputs["pieces"]
    with dsl.ParallelFor(cells, parallelism=CELLS_AT_ONCE) as c:
        one = sharded_cell(cell=c, pieces=bundle, cpu=c.cpu, memory=c.memory, gpus=c.gpus, **known)
    after_cells(experiment, dsl.Collected(one.output), pods, code)
