"""Cells -> their pieces, the list of the sharded pipeline's second loop."""

from typing import List

from components._step import step


@step
def plan_pieces(cells: list) -> List[dict]:
    """Each cell's shards: parts of its images that are made alone."""
    from distillery import steps

    return steps.plan_pieces(cells)
