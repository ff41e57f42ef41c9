"""Dataset and teachers -> synthetic artifact of one cell."""

from kfp.dsl import Dataset, Input, Model, Output

from components._step import connect, facts, step


@step
def synthesize(
    cell: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    synthetic: Output[Dataset],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """A few images per class by the cell's method. `attempt` changes nothing but KFP's cache key."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    synthetic.metadata.update(facts(steps.synthesize(cell, data.path, teachers.path, synthetic.path, checkpoints)))
