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
    s3_endpoint: str,
    checkpoints: str,
    data: dsl.Input[dsl.Dataset],
) -> dsl.Model:
    """One teacher: an inner pipeline, because only its parameters can carry resources into a loop."""
    pods = Pods(image, gpu_type, tolerations, node_selector, s3_secret)
    task = train_teacher(wanted=wanted, data=data, s3_endpoint=s3_endpoint, checkpoints=checkpoints)
    return fit(task, pods, cpu, memory, gpus).outputs["teacher"]


def before_cells(
    experiment: Any,
    pods: Pods,
    code: Dict[str, Any],
    store: Dict[str, Any],
    for_data: Dict[str, Any],
    own: Dict[str, Any],
) -> Tuple[Any, Any, Any]:
    """Plan, data and teachers.

    Args:
        experiment: the pipeline's parameter.
        pods: what all pods have in common.
        code, store: code version and endpoint; endpoint and checkpoints.
        for_data, own: cpu and memory of the data's pod; cpu, memory and gpus of each teacher's.

    Returns:
        The cells, the data, and the teachers side by side.
    """
    planned = fit(plan(experiment=experiment, checkpoints=store["checkpoints"], **code), pods)
    data = fit(prepare_data(experiment=planned.outputs["upstream"], **store), pods, **for_data).outputs["data"]
    version = {"code_version": code["code_version"]}
    wanted = fit(plan_teachers(experiment=planned.outputs["gathering"], **version), pods)
    with dsl.ParallelFor(wanted.output, parallelism=CELLS_AT_ONCE) as t:
        one = teacher(wanted=t, data=data, **own, **vars(pods), **store)
    models, text = dsl.Collected(one.output), planned.outputs["gathering"]
    teachers = fit(gather_teachers(experiment=text, data=data, models=models, **store), pods, **own)
    return planned.outputs["Output"], data, teachers.outputs["teachers"]


def after_cells(experiment: Any, results: Any, pods: Pods, code: Dict[str, Any]) -> None:
    """Report, then the verdict."""
    found = fit(report(experiment=experiment, results=results, **code), pods)
    fit(verdict(failures=found.outputs["Output"]), pods)
