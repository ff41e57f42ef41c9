"""The DAG for cells too large for one pod: as distill_pipeline.py, with a loop over pieces before the one over cells.

A cell has as many pieces as its `shards` in the experiment. Images, labels and results are those of the other pipeline.
"""

from kfp import dsl

from components import IMAGE, bundle_pieces, plan_pieces
from pipelines.cell import pods_of
from pipelines.flow import after_cells, before_cells
from pipelines.resources import ANY_NODE, CELLS_AT_ONCE, NO_TOLERATIONS, PIECES_AT_ONCE, Pods, fit
from pipelines.sharded_cell import piece, sharded_cell


@dsl.pipeline(name="distill-sharded", description="As distill, with each cell's images made in pieces, a pod for each.")
def distill_sharded(  # docs/resources.md says what each one is
    experiment: str = "demo", code_version: str = "", attempt: str = "1",
    profile: str = "", image: str = IMAGE, gpu_type: str = "nvidia.com/gpu",  # profile "": the experiment's
    data_cpu: str = "", data_memory: str = "",  # "": the profile's, as for all of these
    teacher_cpu: str = "", teacher_memory: str = "", teacher_gpus: str = "",
    cell_cpu: str = "", cell_memory: str = "", cell_gpus: str = "",
    tolerations: list = NO_TOLERATIONS, node_selector: dict = ANY_NODE,  # of every step's pod, as in a pod's spec
    s3_endpoint: str = "", s3_region: str = "", checkpoints: str = "",
    history: str = "", schedule: str = "",  # s3:// prefix that receives a record of the run; name of a recurring run
    s3_secret: str = "distillery-s3", s3_ca: str = "distillery-s3-ca",  # names; the secrets may be missing
) -> None:  # fmt: skip
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret, s3_ca)
    place = {"s3_endpoint": s3_endpoint, "s3_region": s3_region}
    store, code = {**place, "checkpoints": checkpoints}, {**place, "code_version": code_version}
    asked = {"profile": profile, "data_cpu": data_cpu, "data_memory": data_memory}
    asked.update(teacher_cpu=teacher_cpu, teacher_memory=teacher_memory, teacher_gpus=teacher_gpus)
    asked.update(cell_cpu=cell_cpu, cell_memory=cell_memory, cell_gpus=cell_gpus)
    cells, data, teachers = before_cells(experiment, pods, code, store, asked, history)
    known = {"data": data, "teachers": teachers, "attempt": attempt, **vars(pods), **store}
    pieces = fit(plan_pieces(cells=cells), pods)
    with dsl.ParallelFor(pieces.output, parallelism=PIECES_AT_ONCE) as p:
        made = piece(piece=p, **pods_of(p, "synthesize"), **known)
    bundle = fit(bundle_pieces(made=dsl.Collected(made.output)), pods).outputs["pieces"]
    with dsl.ParallelFor(cells, parallelism=CELLS_AT_ONCE) as c:
        own = pods_of(c, "relabel", "evaluate_student")
        own.update(gather_pieces_cpu=c.gather_pieces_cpu, gather_pieces_memory=c.gather_pieces_memory)  # and no GPU
        one = sharded_cell(cell=c, pieces=bundle, **own, **known)
    after_cells(experiment, dsl.Collected(one.output), pods, code, {"history": history, "schedule": schedule})
