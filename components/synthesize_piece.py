"""Dataset and teachers -> piece artifact: one shard of a cell."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components._step import facts, step


@step
def synthesize_piece(
    piece: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    made: Output[Artifact],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
) -> None:
    """A part of the cell's images. `attempt` changes nothing but KFP's cache key."""
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    made.metadata.update(facts(steps.synthesize_piece(piece, data.path, teachers.path, made.path, checkpoints)))
