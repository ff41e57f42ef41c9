"""Dataset -> teacher artifact."""

from kfp.dsl import Dataset, Input, Model, Output

from components._step import connect, facts, step


@step
def train_teacher(
    wanted: dict,
    data: Input[Dataset],
    teacher: Output[Model],
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """Train one teacher, or take given weights, and stop here when its accuracy misses the gate."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    name = wanted["teacher"]
    made = steps.train_teacher(wanted["experiment"], name, data.path, teacher.path, checkpoints)
    teacher.metadata.update({**facts(made), "teacher": name})
