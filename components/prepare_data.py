"""Real images -> dataset artifact."""

from kfp.dsl import Dataset, Output

from components._step import facts, step


@step
def prepare_data(experiment: str, data: Output[Dataset], checkpoints: str = "", s3_endpoint: str = "") -> None:
    """Pack the experiment's real images into shards; photos may be published to a store and only referenced."""
    import os

    from distillery import steps

    if s3_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = s3_endpoint
    data.metadata.update(facts(steps.prepare_data(experiment, data.path, checkpoints)))
