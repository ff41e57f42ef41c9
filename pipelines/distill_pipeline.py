"""The DAG: plan, data, for each teacher (teacher.py), gather, for each cell (cell.py), report, verdict."""

from kfp import dsl

from components import IMAGE, gather_teachers, plan, plan_teachers, prepare_data, report, verdict
from pipelines.cell import cell
from pipelines.resources import ANY_NODE, CELLS_AT_ONCE, NEEDS, NO_TOLERATIONS, Pods, fit
from pipelines.teacher import teacher


@dsl.pipeline(name="distill", description="Real images in; a few synthetic images per class with soft labels out.")
def distill(
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
    place = {"image": image, "gpu_type": gpu_type, "tolerations": tolerations, "node_selector": node_selector}
    store = {"s3_endpoint": s3_endpoint, "checkpoints": checkpoints}
    code = {"code_version": code_version, "s3_endpoint": s3_endpoint}
    pods = Pods(**place, s3_secret=s3_secret)
    cells = fit(plan(experiment=experiment, **code), pods)
    data = fit(prepare_data(experiment=cells.outputs["upstream"], **store), pods, data_cpu, data_memory).outputs["data"]
    wanted = fit(plan_teachers(experiment=cells.outputs["gathering"], code_version=code_version), pods)
    with dsl.ParallelFor(wanted.output, parallelism=CELLS_AT_ONCE) as t:
        own = {"cpu": teacher_cpu, "memory": teacher_memory, "gpus": teacher_gpus, "s3_secret": s3_secret}
        taught = teacher(wanted=t, data=data, **own, **place, **store)
    all_ = gather_teachers(
        experiment=cells.outputs["gathering"], data=data, models=dsl.Collected(taught.output), **store
    )
    teachers = fit(all_, pods, teacher_cpu, teacher_memory, teacher_gpus).outputs["teachers"]
    with dsl.ParallelFor(cells.outputs["Output"], parallelism=CELLS_AT_ONCE) as c:
        own = {"cell": c, "cpu": c.cpu, "memory": c.memory, "gpus": c.gpus, "attempt": attempt, "s3_secret": s3_secret}
        one = cell(data=data, teachers=teachers, **own, **place, **store)
    found = fit(report(experiment=experiment, results=dsl.Collected(one.output), **code), pods)
    fit(verdict(failures=found.outputs["Output"]), pods)
