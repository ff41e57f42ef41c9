"""Pieces -> synthetic artifact of one cell."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components._step import connect, facts, step


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
    s3_region: str = "",
) -> None:
    """The same set that synthesize makes at once. `attempt` changes nothing but KFP's cache key."""
    import os

    from distillery import steps

    connect(s3_endpoint, s3_region)
    own = [entry.path for entry in os.scandir(os.path.join(pieces.path, cell["id"]))]
    found = steps.gather_pieces(cell, data.path, teachers.path, own, synthetic.path, checkpoints)
    synthetic.metadata.update(facts(found))
