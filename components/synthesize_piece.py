"""Dataset and teachers -> piece artifact: one shard of a cell."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components._step import connect, facts, step


@step
def synthesize_piece(
    piece: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    made: Output[Artifact],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
    s3_region: str = "",
) -> None:
    """A part of the cell's images. `attempt` changes nothing but KFP's cache key."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    made.metadata.update(facts(steps.synthesize_piece(piece, data.path, teachers.path, made.path, checkpoints)))
