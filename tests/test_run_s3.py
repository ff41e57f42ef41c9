"""A run whose output is an object store: found again on another machine, and not stopped by a restarted server."""

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from _servers import Server, available, running

from distillery import artifact, inspection, run
from distillery.store import open_store

TEXT = """
name: toy
dataset: {name: digits, per_class: 30}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 2, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [1]}
students:
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: rded, epochs: 4}}
"""
KIND = available()[-1]  # MinIO where it is


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server."""
    with running(KIND, tmp_path_factory.mktemp(KIND)) as found:
        yield found


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A prefix in a new bucket; the local cache is a folder of the test."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    return f"s3://{bucket}/runs/toy"


def prints(folder: Path) -> dict[str, str]:
    """Fingerprints of the artifacts below a folder, by the last two parts of their path."""
    found = sorted(folder.rglob("[1-5]-*/*/manifest.json"))
    return {"/".join(path.parts[-3:-1]): artifact.read(path.parent).fingerprint for path in found}


def test_a_run_in_a_store_equals_a_local_one_and_is_found_again(place: str, tmp_path: Path) -> None:
    run.run(TEXT, str(tmp_path / "local"))
    done = run.run(TEXT, place)
    assert done.failures == []
    assert prints(tmp_path / "cache" / "runs") == prints(tmp_path / "local")
    store = open_store(place)
    assert {"experiment.yaml", "experiment.name", "log.jsonl", "6-report/report.html"} <= {e.key for e in store.list()}
    before = {e.key: e.etag for e in store.list() if e.key[0] in "12345"}
    shutil.rmtree(tmp_path / "cache")  # another machine
    run.run(TEXT, place)
    assert {e.key: e.etag for e in store.list() if e.key[0] in "12345"} == before
    (result,) = (e.key.removesuffix("/manifest.json") for e in store.list("5-students/") if "manifest" in e.key)
    assert "result, made by evaluate_student" in inspection.describe(f"{place}/{result}")


@pytest.mark.timeout(300)
def test_a_server_that_is_killed_and_restarted_does_not_stop_a_run(server: Server, place: str) -> None:
    def strike() -> None:
        for _ in range(2):
            time.sleep(0.7)
            server.kill()
            time.sleep(1.0)
            server.start()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        done = run.run(TEXT, place)
    finally:
        striker.join()
    assert done.failures == []
    keys = {entry.key.split("/")[0] for entry in open_store(place).list()}
    assert {"1-data", "2-teachers", "3-synthetic", "4-labels", "5-students", "6-report"} <= keys
