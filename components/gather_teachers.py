"""All teachers -> one artifact."""

from typing import List

from kfp.dsl import Dataset, Input, Model, Output

from components._step import connect, facts, step


@step
def gather_teachers(
    experiment: str,
    data: Input[Dataset],
    models: Input[List[Model]],
    teachers: Output[Model],
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """Put the teachers side by side, with the statistics of the data that methods ask for."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    folders = {model.metadata["teacher"]: model.path for model in models}
    teachers.metadata.update(facts(steps.gather_teachers(experiment, data.path, folders, teachers.path, checkpoints)))
