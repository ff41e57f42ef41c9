"""Pieces of all cells -> one artifact."""

from typing import List

from kfp.dsl import Artifact, Input, Output

from components._step import facts, step


@step
def bundle_pieces(made: Input[List[Artifact]], pieces: Output[Artifact]) -> None:
    """Put all pieces side by side: KFP hands one artifact on to the loop over cells, but no list of them."""
    from distillery import steps

    pieces.metadata.update(facts(steps.bundle_pieces([each.path for each in made], pieces.path)))
