"""Experiment -> its teachers, the list of the pipeline's first loop."""

from typing import List

from components._step import step


@step
def plan_teachers(
    experiment: str, code_version: str = "", teacher_cpu: str = "", teacher_memory: str = "", teacher_gpus: str = ""
) -> List[dict]:
    """Each teacher's name with all that its training depends on and asks for (KFP loops over a component's only result,
    so this is not one of plan's). The experiment is what plan made of it: it names profile and device."""
    from distillery import steps

    asked = {"teacher_cpu": teacher_cpu, "teacher_memory": teacher_memory, "teacher_gpus": teacher_gpus}
    return steps.plan_teachers(experiment, code_version, asked)
