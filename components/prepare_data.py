"""Real images -> dataset artifact."""

from kfp.dsl import Dataset, Output

from components._step import connect, facts, step


@step
def prepare_data(
    experiment: str, data: Output[Dataset], checkpoints: str = "", s3_endpoint: str = "", s3_region: str = ""
) -> None:
    """Pack the experiment's real images into shards; photos may be published to a store and only referenced."""
    from distillery import steps

    connect(s3_endpoint, s3_region)
    data.metadata.update(facts(steps.prepare_data(experiment, data.path, checkpoints)))
