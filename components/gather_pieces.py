"""Pieces -> synthetic artifact of one cell."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components._step import facts, step


@step
def gather_pieces(
    cell: dict,
    data: Input[Dataset],
    teachers: Input[Model],
    pieces: Input[Artifact],
    synthetic: Output[Dataset],
    attempt: str = "1",
    checkpoints: str = "",
    s3_endpoint: str = "",
) -> None:
    """The same set that synthesize makes at once. `attempt` changes nothing but KFP's cache key."""
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    own = [entry.path for entry in os.scandir(os.path.join(pieces.path, cell["id"]))]
    found = steps.gather_pieces(cell, data.path, teachers.path, own, synthetic.path, checkpoints)
    synthetic.metadata.update(facts(found))
