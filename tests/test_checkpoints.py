"""Checkpoints in a store: they come back elsewhere, two pods cannot mix theirs, and trouble is said, not fatal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _servers import Server, available, running

from distillery import checkpoints, steps
from distillery.checkpoints import Mirror, Place, Vault
from distillery.errors import UserError
from distillery.store import open_store
from distillery.track import Track

PLACE = "work/step-0123"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, MinIO where it is."""
    name = available()[-1]
    with running(name, tmp_path_factory.mktemp(name)) as found:
        yield found


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    """One step's place in a new bucket."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    return Place.below(f"s3://{bucket}/checkpoints/", "step-0123")


class Pod:
    """An attempt in this process: a folder of its own, and what it said."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.said: list[str] = []
        self.mirror: Mirror = Vault(place, self._say).open(folder, lambda: None)
        self.track = Track(self._say, folder, 0.0, self.mirror)

    def _say(self, event: dict[str, Any]) -> None:
        self.said.append(str(event.get("text")))

    def settle(self) -> None:
        """Wait until all that was saved has arrived, then end."""
        self.mirror.close(30)


def step_of(track: Track) -> int:
    """The number in a checkpoint, or -1."""
    kept = track.load(quiet=True)
    return -1 if kept is None else int(kept[1]["step"])


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def keys(place: Place) -> list[str]:
    """What lies in the store of a step's work."""
    return [entry.key for entry in open_store(place.work).list()]


def test_a_checkpoint_and_its_parts_come_back_on_another_machine(place: Place, tmp_path: Path) -> None:
    first = Pod(place, tmp_path / "a")
    first.track.child("finished0").save({"images": torch.arange(6)}, {})
    first.track.child("chunk").send({"rows": torch.ones(4)}, {})
    first.track.child("gone").save({}, {})
    first.track.child("gone").clear()
    for step in range(20):
        first.track.save({"net/x": torch.full((100,), float(step))}, {"step": step})
    first.settle()
    second = Pod(place, tmp_path / "b")
    assert step_of(second.track) == 19
    tensors, _ = second.track.load() or ({}, {})
    assert tensors["net/x"].tolist() == [19.0] * 100
    assert (second.track.child("finished0").load() or ({}, {}))[0]["images"].tolist() == list(range(6))
    assert (second.track.child("chunk").load(last=True) or ({}, {}))[0]["rows"].tolist() == [1.0] * 4
    assert second.track.child("gone").load() is None
    second.track.save({}, {"step": 20})
    second.settle()
    third = Pod(place, tmp_path / "c")
    third.settle()
    assert step_of(third.track) == 20
    assert third.track.child("chunk").load() is not None, "what the second took over was lost to the third"


def test_what_lies_here_is_kept_when_it_is_as_new_as_the_store(place: Place, tmp_path: Path) -> None:
    """A process on the same machine continues from its own files, and one on a machine left behind from the store."""
    first = Pod(place, tmp_path / "a")
    first.track.save({}, {"step": 1})
    first.settle()
    first.track._remote = None  # the store was not reached any more
    first.track.save({}, {"step": 2})
    second = Pod(place, tmp_path / "a")
    assert step_of(second.track) == 2
    second.settle()
    other = Pod(place, tmp_path / "b")
    assert step_of(other.track) == 2
    other.track.save({}, {"step": 3})
    other.settle()
    third = Pod(place, tmp_path / "a")
    third.settle()
    assert step_of(third.track) == 3


CHILD = """
import sys, time
from pathlib import Path
from distillery.checkpoints import Place, Vault
from distillery.track import Track
say = lambda event: print(event.get("text", ""), flush=True)
mirror = Vault(Place(sys.argv[1], sys.argv[1] + "-finished"), say).open(Path(sys.argv[2]), lambda: None)
track = Track(say, Path(sys.argv[2]), 0.0, mirror)
kept = track.load(quiet=True)
print("starts at", kept[1]["step"] if kept else 0, flush=True)
for step in range((kept[1]["step"] if kept else 0) + 1, 100000):
    track.save({"x": __import__("torch").full((50000,), float(step))}, {"step": step, "by": sys.argv[3]})
    time.sleep(0.01)
"""


def lines(path: Path) -> list[str]:
    """What a child has said so far."""
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.timeout(300)
def test_a_zombie_stops_writing_and_spoils_nothing(place: Place, tmp_path: Path) -> None:
    """Two real processes of one step: the replacement takes over, the other one says so and works on."""
    pods = []

    def start(name: str) -> Path:
        out = tmp_path / f"{name}.txt"
        with out.open("wb") as file:
            command = [sys.executable, "-c", CHILD, place.work, str(tmp_path / name), name]
            pods.append(subprocess.Popen(command, stdout=file, stderr=file))
        return out

    try:
        zombie = start("zombie")
        until(lambda: any("index.json" in key for key in keys(place)), 120)
        replacement = start("replacement")
        until(lambda: any("starts at" in line for line in lines(replacement)), 120)
        until(lambda: any("has taken this step over" in line for line in lines(zombie)))
        assert pods[0].poll() is None, "the zombie must work on: it may be another run's own pod"
        owners = sorted(key for key in keys(place) if key.startswith("owners/"))
        assert [key.split("/")[1][:6] for key in owners] == ["00001-", "00002-"]
        old, new = (key.split("/")[1] for key in owners)
        until(lambda: f"{new}/index.json" in keys(place))
        still = {key for key in keys(place) if key.startswith(old)}
        time.sleep(1.0)
        assert {key for key in keys(place) if key.startswith(old)} <= still, "the zombie went on writing"
        pods[1].kill()
        pods[1].wait()
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    (said,) = (line for line in lines(replacement) if line.startswith("starts at"))
    third = Pod(place, tmp_path / "third")
    third.settle()
    tensors, values = third.track.load(quiet=True) or ({}, {})
    assert values["by"] == "replacement"
    assert values["step"] > int(said.split()[-1]) > 0
    assert tensors["x"].tolist() == [float(values["step"])] * 50000, "half of one state and half of another"


def test_work_that_was_finished_elsewhere_is_not_written_again(place: Place, tmp_path: Path) -> None:
    late = Pod(place, tmp_path / "a")
    late.track.save({}, {"step": 1})
    until(lambda: any("index.json" in key for key in keys(place)))
    Vault(place, lambda _: None).forget()
    late.track.save({}, {"step": 2})
    until(lambda: any("this step is finished" in text for text in late.said))
    late.settle()
    assert keys(place) == []


@pytest.mark.timeout(300)
def test_a_store_that_goes_away_is_told_and_does_not_stop_the_work(
    server: Server, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PAUSE", 0.2)
    pod = Pod(place, tmp_path / "a")
    pod.track.save({}, {"step": 1})
    until(lambda: any("index.json" in key for key in keys(place)))
    server.kill()
    line = pod.mirror._store._http
    line.patience = 1.0  # seconds: nobody is there; a server that is may take its time
    try:
        began = time.monotonic()
        for step in range(2, 30):
            pod.track.save({}, {"step": step})
        assert time.monotonic() - began < 20, "the work waited for the store"
        until(lambda: any("did not reach the store" in text for text in pod.said))
    finally:
        line.patience = checkpoints.PATIENCE
        server.start()
    until(lambda: any("reach the store again" in text for text in pod.said))
    pod.settle()
    other = Pod(place, tmp_path / "b")
    other.settle()
    assert step_of(other.track) == 29
    assert sum("did not reach" in text for text in pod.said) == 1, pod.said


def test_keys_that_are_withdrawn_are_told_loudly(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = Pod(place, tmp_path / "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "withdrawn")
    pod.track.save({}, {"step": 1})
    until(lambda: any("WARNING" in text and "wrong credentials" in text for text in pod.said))
    assert step_of(pod.track) == 1
    assert "withdrawn" not in str(pod.said)


def spoil_bytes(data: dict[str, Any]) -> None:
    next(iter(data["files"].values()))["sha256"] = "0" * 64


def spoil_schema(data: dict[str, Any]) -> None:
    data["schema"] = 99


def spoil_name(data: dict[str, Any]) -> None:
    data["files"]["../../escaped"] = next(iter(data["files"].values()))


def spoil_type(data: dict[str, Any]) -> None:
    data["files"] = "none"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_bytes, "sha256"),
        (spoil_schema, "schema 99"),
        (spoil_name, "not a plain path"),
        (spoil_type, "not an ind"),
    ],
)
def test_a_spoilt_checkpoint_is_said_and_not_believed(
    place: Place, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], said: str
) -> None:
    first = Pod(place, tmp_path / "a")
    first.track.save({}, {"step": 1})
    first.settle()
    store = open_store(place.work)
    (key,) = (key for key in keys(place) if key.endswith("index.json"))
    data = json.loads(store.read(key))
    spoil(data)
    store.write(key, json.dumps(data).encode())
    second = Pod(place, tmp_path / "deep" / "b")
    second.settle()
    assert step_of(second.track) == -1
    assert any("WARNING" in text and said in text and "not believed" in text for text in second.said), second.said
    assert not (tmp_path / "escaped").exists()


TEXT = """
name: toy
dataset: {name: digits, per_class: 10}
teacher: {net: convnet1, net_options: {width: 4}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [1]}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: rded, epochs: 2}}
"""


def test_a_finished_step_costs_a_lost_pod_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = place.work.removesuffix(f"/{PLACE}")
    first = steps.prepare_data(TEXT, tmp_path / "a", uri)
    monkeypatch.setattr(steps.prepare, "prepare", lambda *_: pytest.fail("the work was done again"))
    assert steps.prepare_data(TEXT, tmp_path / "b", uri) == first
    found = [entry.key for entry in open_store(uri).list()]
    assert found
    assert all(key.startswith("finished/prepare_data-") for key in found), found


def test_a_spoilt_finished_artifact_is_made_again(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = place.work.removesuffix(f"/{PLACE}")
    first = steps.prepare_data(TEXT, tmp_path / "a", uri)
    (key,) = (entry.key for entry in open_store(uri).list() if entry.key.endswith("/data.json"))
    open_store(uri).write(key, b"{}")
    assert steps.prepare_data(TEXT, tmp_path / "b", uri).fingerprint == first.fingerprint
    assert "not believed, and made again" in capfd.readouterr().err


def test_wrong_keys_stop_a_step_before_its_work(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    monkeypatch.setattr(steps.prepare, "prepare", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError, match="wrong credentials"):
        steps.prepare_data(TEXT, tmp_path / "a", place.work)
    for name in ("checkpoints", "history"):
        with pytest.raises(UserError, match="wrong credentials"):
            steps.plan(TEXT, **{name: place.work})
    assert not os.listdir(tmp_path)
