"""Experiment -> its cells, the list that the pipeline loops over."""

from typing import List

from kfp import dsl

from components._step import step


@step
def plan(
    experiment: str,
    upstream: dsl.OutputPath(str),  # type: ignore[valid-type]
    gathering: dsl.OutputPath(str),  # type: ignore[valid-type]
    code_version: str = "",
    s3_endpoint: str = "",
    checkpoints: str = "",
) -> List[dict]:
    """Check the experiment and the store of checkpoints before anything is spent, and expand the experiment.

    `upstream` and `gathering` are what data and teachers depend on: KFP's cache compares these texts, so another method
    or student makes neither again.
    """
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    texts = steps.upstream(experiment, code_version)
    for name, path in (("prepare_data", upstream), ("gather_teachers", gathering)):
        with open(path, "w", encoding="utf-8") as file:
            file.write(texts[name])
    return steps.plan(experiment, code_version, checkpoints)
