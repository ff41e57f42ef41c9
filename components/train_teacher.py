"""Dataset -> teacher artifact."""

from kfp.dsl import Dataset, Input, Model, Output

from components._step import facts, step


@step
def train_teacher(
    wanted: dict, data: Input[Dataset], teacher: Output[Model], checkpoints: str = "", s3_endpoint: str = ""
) -> None:
    """Train one teacher, or take given weights, and stop here when its accuracy misses the gate."""
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    name = wanted["teacher"]
    made = steps.train_teacher(wanted["experiment"], name, data.path, teacher.path, checkpoints)
    teacher.metadata.update({**facts(made), "teacher": name})
