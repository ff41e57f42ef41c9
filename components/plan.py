"""Experiment -> its cells, the list that the pipeline loops over."""

import functools
from typing import Dict, List

from kfp import dsl

from components._step import connect, step


def keep(texts: Dict[str, str]) -> None:
    """Write each text to its path: a step's further outputs."""
    for path, text in texts.items():
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


@functools.partial(step, additional_funcs=[connect, keep])
def plan(
    experiment: str,
    upstream: dsl.OutputPath(str),  # type: ignore[valid-type]
    gathering: dsl.OutputPath(str),  # type: ignore[valid-type]
    prepare_cpu: dsl.OutputPath(str),  # type: ignore[valid-type]
    prepare_memory: dsl.OutputPath(str),  # type: ignore[valid-type]
    gather_cpu: dsl.OutputPath(str),  # type: ignore[valid-type]
    gather_memory: dsl.OutputPath(str),  # type: ignore[valid-type]
    gather_gpus: dsl.OutputPath(str),  # type: ignore[valid-type]
    code_version: str = "",
    profile: str = "",
    data_cpu: str = "",
    data_memory: str = "",
    teacher_cpu: str = "",
    teacher_memory: str = "",
    teacher_gpus: str = "",
    cell_cpu: str = "",
    cell_memory: str = "",
    cell_gpus: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
    checkpoints: str = "",
    history: str = "",
) -> List[dict]:
    """Check the experiment and its stores before anything is spent, and resolve what each pod asks for.

    `upstream` and `gathering` are what data and teachers depend on: KFP's cache compares these texts, so another method
    or student makes neither again. A loop's pods find their requests in the cells; the others are outputs.
    """
    from distillery import steps

    connect(s3_endpoint, s3_region)
    asked = {
        "profile": profile,
        "data_cpu": data_cpu,
        "data_memory": data_memory,
        "teacher_cpu": teacher_cpu,
        "teacher_memory": teacher_memory,
        "teacher_gpus": teacher_gpus,
        "cell_cpu": cell_cpu,
        "cell_memory": cell_memory,
        "cell_gpus": cell_gpus,
    }
    data, teachers = steps.upstream(experiment, code_version, asked).values()
    keep(
        {
            upstream: data["experiment"],
            prepare_cpu: data["cpu"],
            prepare_memory: data["memory"],
            gathering: teachers["experiment"],
            gather_cpu: teachers["cpu"],
            gather_memory: teachers["memory"],
            gather_gpus: teachers["gpus"],
        }
    )
    return steps.plan(experiment, code_version, asked, checkpoints, history)
