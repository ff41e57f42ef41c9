"""Experiment -> its teachers, the list of the pipeline's first loop."""

from typing import List

from components._step import step


@step
def plan_teachers(experiment: str, code_version: str = "") -> List[dict]:
    """Each teacher's name with all that its training depends on (KFP loops over a component's only result, so this
    is not one of plan's)."""
    from distillery import steps

    return steps.plan_teachers(experiment, code_version)
