"""Pods are lost at random moments of every step, with all that lay in them; the artifacts end up the same."""

from __future__ import annotations

import random
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pods import Cluster, jobs
from _servers import Server, available, running

from distillery import artifact
from distillery.store import open_store

TEXT = """
name: toy
dataset: {name: digits, per_class: 40}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 40, batch: 40, flip: 0.0, lr: 0.02}
methods:
  - {method: rded, ipc: [2], options: {mipc: 40, num_crop: 5}}
  - {method: sre2l, ipc: [2], shards: 2, options: {iterations: 300, batch: 5}}
students:
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: rded, epochs: 60}}
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: fair-soft, epochs: 60}}
labels: {mode: stored}
"""
SHORT = """
name: toy
dataset: {name: digits, per_class: 20}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 20, batch: 40, flip: 0.0, lr: 0.02}
methods:
  - {method: sre2l, ipc: [1], options: {iterations: 100, batch: 5}}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: rded, epochs: 30}}
labels: {mode: stored}
"""
INTERVAL = 0.1  # seconds between checkpoints
MOST = 60.0  # seconds of work that one kill may cost


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, MinIO where it is."""
    name = available()[-1]
    with running(name, tmp_path_factory.mktemp(name)) as found:
        yield found


def disturb(
    server: Server, folder: Path, text: str, kills: int, without: tuple[str, ...] = ()
) -> tuple[Cluster, list[str]]:
    """Run an experiment undisturbed, then with kills spread over its steps; compare the artifacts.

    Args:
        server: keeps the checkpoints.
        folder: for both runs.
        text: the experiment.
        kills: how many pods are lost.
        without: artifacts whose pods are left alone.

    Returns:
        The disturbed cluster, and the keys that its store has in the end.
    """
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    calm_env = {"DISTILLERY_LOG": "plain", "OMP_NUM_THREADS": "1"}
    env = calm_env | server.environment() | {"DISTILLERY_CHECKPOINT_SECONDS": str(INTERVAL)}
    names = []
    with Cluster(folder / "calm", "", calm_env) as calm:
        for job in jobs(text, calm.artifact):
            calm.run(job)
            names.append(job.name)
    rng, left = random.Random(time.time_ns()), kills
    struck = [name for name in names if name not in without]
    sure = next(name for name in names if name.startswith("teacher-"))  # its first loss leaves work to take up

    def kept() -> bool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            return any(entry.key.endswith("/index.json") for entry in open_store(wild.checkpoints).list("work/"))

    with Cluster(folder / "wild", f"s3://{bucket}/checkpoints", env) as wild:
        for job in jobs(text, wild.artifact):
            quota = round(left / len(struck)) if job.name in struck else 0
            left -= quota
            struck = [name for name in struck if name != job.name]
            for number in range(quota):
                kill_after = rng.randint(0, len(calm.records[job.name][0]))
                if job.name == sure and not number:
                    wild.run(job, max(kill_after, 2), kept)
                else:
                    wild.run(job, kill_after)
            assert wild.run(job)
    wanted = {name: artifact.read(calm.artifact(name)).fingerprint for name in names}
    assert {name: artifact.read(wild.artifact(name)).fingerprint for name in names} == wanted
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        return wild, [entry.key for entry in open_store(wild.checkpoints).list()]


def check(wild: Cluster, keys: list[str], kills: int) -> None:
    """Every kill cost little, work came back, and nothing unfinished lies in the store."""
    assert len(wild.killed) == kills
    worst = max(wild.killed, key=lambda kill: kill[1])
    again = defaultdict(float)
    for name, seconds, worked in wild.killed:
        again[name] += seconds
        print(f"{name}: killed after {worked:.1f} s of work, {seconds:.2f} s lost")
    print("lost in all:", {name: round(seconds, 1) for name, seconds in again.items()}, "worst:", worst)
    assert worst[1] <= MOST
    assert any(kill[1] < kill[2] for kill in wild.killed), "no pod took up another one's work"
    assert keys
    assert not [key for key in keys if not key.startswith("finished/")]


@pytest.mark.timeout(600)
def test_a_few_lost_pods_change_nothing(server: Server, tmp_path: Path) -> None:
    check(*disturb(server, tmp_path, SHORT, 5, ("data", "teachers")), 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_lost_pods_change_nothing(server: Server, tmp_path: Path) -> None:
    check(*disturb(server, tmp_path, TEXT, 50), 50)
