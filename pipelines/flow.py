"""What both pipelines share: everything before the cells, and everything after them."""

from typing import Any, Dict, Tuple

from kfp import dsl

from components import gather_teachers, plan, plan_teachers, prepare_data, report, train_teacher, verdict
from pipelines.resources import CELLS_AT_ONCE, Pods, fit


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
    s3_ca: str,
    s3_endpoint: str,
    s3_region: str,
    checkpoints: str,
    data: dsl.Input[dsl.Dataset],
) -> dsl.Model:
    """One teacher: an inner pipeline, because only its parameters can carry resources into a loop."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret, s3_ca)
    store = {"s3_endpoint": s3_endpoint, "s3_region": s3_region, "checkpoints": checkpoints}
    return fit(train_teacher(wanted=wanted, data=data, **store), pods, cpu, memory, gpus).outputs["teacher"]


def before_cells(
    experiment: Any, pods: Pods, code: Dict[str, Any], store: Dict[str, Any], asked: Dict[str, Any], history: Any
) -> Tuple[Any, Any, Any]:
    """Plan, data and teachers.

    Args:
        experiment: the pipeline's parameter.
        pods: what all pods have in common.
        code: code version, and where the store is.
        store: where the store is, and checkpoints.
        asked: profile, and what was given by hand for data_, teacher_ and cell_.
        history: where the run will be entered; plan tries it.

    Returns:
        The cells, the data, and the teachers side by side.
    """
    places = {"checkpoints": store["checkpoints"], "history": history}
    planned = fit(plan(experiment=experiment, **places, **asked, **code), pods)
    said, cells = planned.outputs, planned.outputs["Output"]
    made = prepare_data(experiment=said["upstream"], **store)
    data = fit(made, pods, said["prepare_cpu"], said["prepare_memory"]).outputs["data"]
    own = {name: value for name, value in asked.items() if name.startswith("teacher_")}
    version = {"code_version": code["code_version"]}
    wanted = fit(plan_teachers(experiment=said["gathering"], **own, **version), pods)
    with dsl.ParallelFor(wanted.output, parallelism=CELLS_AT_ONCE) as t:
        one = teacher(wanted=t, data=data, cpu=t.cpu, memory=t.memory, gpus=t.gpus, **vars(pods), **store)
    gathered = gather_teachers(experiment=said["gathering"], data=data, models=dsl.Collected(one.output), **store)
    teachers = fit(gathered, pods, said["gather_cpu"], said["gather_memory"], said["gather_gpus"])
    return cells, data, teachers.outputs["teachers"]


def after_cells(experiment: Any, results: Any, pods: Pods, code: Dict[str, Any], past: Dict[str, Any]) -> None:
    """Report, then the verdict; `past` says into which history the run is entered, and under which schedule."""
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    found = fit(report(experiment=experiment, results=results, run=run, **past, **code), pods)
    fit(verdict(failures=found.outputs["Output"]), pods)
