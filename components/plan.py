"""Experiment -> its cells, the list that the pipeline loops over."""

import functools
from typing import Any, Dict, List

from kfp import dsl

from components._step import step


def shared(cell: Dict[str, Any]) -> str:
    """An experiment's text reduced to what data and teacher depend on; its first line names the code.

    KFP's cache compares this text: adding a method neither makes the data again nor trains the teacher again, while
    another dataset, another teacher or changed code does. The method and the student only make it a whole experiment.
    """
    import json

    kept = {key: cell[key] for key in ("dataset", "teacher", "device", "precision")}
    student = {"net": cell["teacher"]["net"], "net_options": cell["teacher"]["net_options"]}
    whole = {"name": "upstream", **kept, "methods": [{"method": "random", "ipc": [1]}], "students": [student]}
    return f"# distillery {cell['code_version']}\n{json.dumps(whole, sort_keys=True)}\n"


@functools.partial(step, additional_funcs=[shared])
def plan(
    experiment: str,
    upstream: dsl.OutputPath(str),  # type: ignore[valid-type]
    code_version: str = "",
    s3_endpoint: str = "",
) -> List[dict]:
    """Check the experiment before anything is spent and expand it; `upstream` is the text for data and teacher."""
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    cells = steps.plan(experiment, code_version)
    with open(upstream, "w", encoding="utf-8") as file:
        file.write(shared(cells[0]))
    return cells
