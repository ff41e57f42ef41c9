"""Synthetic images and teachers -> labels artifact of one cell."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components._step import connect, facts, step


@step
def relabel(
    cell: dict,
    synthetic: Input[Dataset],
    teachers: Input[Model],
    labels: Output[Artifact],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """The teachers' soft labels of every view, or a reference. `attempt` changes nothing but KFP's cache key."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    labels.metadata.update(facts(steps.relabel(cell, synthetic.path, teachers.path, labels.path, checkpoints)))
