"""The exporter: what it serves of a history, what it never does (crash, read twice, grow), and how it ends."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import _records
import pytest
from _records import seeds
from _servers import available, running
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from distillery import exporter as exporting
from distillery.__main__ import app
from distillery.errors import DistilleryError, UserError
from distillery.exporter import Exporter
from distillery.history import FOLDER, STAMP
from distillery.history.record import Record, Regression
from distillery.store.local import LocalStore

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
Labels = frozenset[tuple[str, str]]


def record(run: str, *, ago: timedelta = timedelta(), acc: float = 0.5, **changes: Any) -> Record:
    """A run of two methods with two seeds each that ended `ago`; random images reach 0.1 less than rded's `acc`."""
    cells = seeds("rded", acc, acc + 0.01) + seeds("random", acc - 0.1, acc - 0.09)
    given = {"experiment": "nightly", "finished": (NOW - ago).isoformat()} | changes
    return _records.record(run, cells=given.pop("cells", cells), **given)


def put(place: Path, *records: Record) -> None:
    """Write records below `place` as runs leave them."""
    (place / FOLDER).mkdir(parents=True, exist_ok=True)
    for one in records:
        (place / FOLDER / f"{one.ended.strftime(STAMP)}-{one.run}.json").write_bytes(one.json())


def scrape(exporter: Exporter) -> dict[str, dict[Labels, float]]:
    """What Prometheus would read: metric -> labels -> value."""
    registry = CollectorRegistry()
    registry.register(exporter)
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, dict[Labels, float]]:
    """The same from the text of an answer; labels without a value are none, as in Prometheus."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = frozenset((key, value) for key, value in sample.labels.items() if value)
            found.setdefault(sample.name.removeprefix("distillery_"), {})[labels] = sample.value
    return found


def by(**labels: str) -> Labels:
    return frozenset(labels.items())


def one(found: dict[Labels, float]) -> float:
    (value,) = found.values()
    return value


def test_the_newest_run_of_each_experiment_is_served(tmp_path: Path) -> None:
    put(tmp_path, record("a", ago=2 * DAY, acc=0.7), record("b", ago=DAY, acc=0.4), record("c", experiment="other"))
    exporter = Exporter(str(tmp_path))
    assert exporter.look()
    found = scrape(exporter)
    rded = {"dataset": "digits", "method": "rded", "ipc": "10", "student": "convnet1", "recipe": "fair-soft"}
    assert found["accuracy_last"][by(experiment="nightly", **rded)] == pytest.approx(0.405)
    assert found["accuracy_best"][by(experiment="nightly", **rded)] == pytest.approx(0.415)
    assert found["accuracy_seeds"][by(experiment="nightly", **rded)] == 2
    assert len(found["accuracy_last"]) == 4
    assert found["step_seconds"][by(experiment="nightly", step="synthesize")] == 60
    assert found["image_bytes"][by(experiment="nightly", dataset="digits", method="rded", ipc="10")] == 100
    assert found["label_bytes"][by(experiment="nightly", dataset="digits", method="random", ipc="10")] == 50
    assert found["teacher_accuracy"][by(experiment="nightly", teacher="convnet1")] == 0.9
    assert found["runs_total"][by(experiment="nightly", status="succeeded")] == 2
    assert found["last_run_timestamp_seconds"][by(experiment="nightly")] == (NOW - DAY).timestamp()
    assert found["newest_run"][by(experiment="nightly", run="b", code_version="0.1.0+a")] == 1
    assert one(found["store_up"]) == 1 and one(found["history_records"]) == 3
    assert 0 < one(found["store_used_bytes"]) < one(found["store_capacity_bytes"])


def test_a_run_without_results_counts_as_failed_and_hides_no_accuracy(tmp_path: Path) -> None:
    worse = Regression("accuracy", "rded", "rded is worse", 0.5, 0.4)
    put(
        tmp_path,
        record("a", ago=2 * DAY, schedule="s", regressions=(worse,)),
        record("b", ago=DAY, schedule="s", cells=(_records.failed(),)),
    )
    exporter = Exporter(str(tmp_path))
    exporter.look()
    found = scrape(exporter)
    key = by(experiment="nightly", schedule="s")
    assert found["last_run_failed"][key] == 1
    assert found["runs_total"][by(experiment="nightly", status="failed")] == 1
    assert found["last_success_timestamp_seconds"][key] == (NOW - 2 * DAY).timestamp()
    assert found["last_run_timestamp_seconds"][key] == (NOW - DAY).timestamp()
    assert found["schedule_interval_seconds"][key] == DAY.total_seconds()
    assert found["regressions"][by(experiment="nightly", kind="accuracy")] == 1
    assert found["regressions"][by(experiment="nightly", kind="slower")] == 0
    assert len(found["accuracy_last"]) == 2


def test_an_unfinished_record_is_counted_and_nothing_more(tmp_path: Path) -> None:
    put(tmp_path, record("a"))
    (tmp_path / "history" / "20261121T000000Z-b.json").write_bytes(record("b").json()[:100])
    (tmp_path / "history" / "20261121T000001Z-c.json").write_text('{"schema": 2}')
    exporter = Exporter(str(tmp_path))
    assert exporter.look()
    found = scrape(exporter)
    assert one(found["history_unreadable"]) == 2 and one(found["history_records"]) == 1


def test_nothing_is_read_twice_and_a_scrape_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    plain = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, key: reads.append(key) or plain(self, key))
    put(tmp_path, *(record(f"r{i}", ago=i * DAY) for i in range(40)))
    exporter = Exporter(str(tmp_path))
    exporter.look()
    assert len(reads) == 40
    exporter.look()
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix="": reads.append("listed") or [])
    scrape(exporter)
    assert len(reads) == 40
    monkeypatch.undo()
    put(tmp_path, record("new"))
    exporter.look()
    assert one(scrape(exporter)["history_records"]) == 41


def test_labels_are_bounded_and_what_is_left_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "RESULTS", 3)
    put(tmp_path, *(record(f"r{i}", ago=i * DAY, experiment=f"e{i}") for i in range(10)))
    put(tmp_path, record("old", ago=100 * DAY, experiment="old"))
    exporter = Exporter(str(tmp_path), experiments=3, days=90)
    exporter.look()
    found = scrape(exporter)
    assert {value for labels in found["runs_total"] for key, value in labels if key == "experiment"} == {
        "e0",
        "e1",
        "e2",
    }
    assert found["dropped"] == {by(what="experiments"): 8, by(what="results"): 3}
    assert len(found["accuracy_last"]) == 3 and len(found["image_bytes"]) == 3
    assert sum(by(experiment="e0") <= labels for labels in found["accuracy_last"]) == 2, "the newest come first"
    assert len(exporter._newest) <= 6, "memory grows with the history"


def test_a_run_that_is_deleted_is_no_longer_shown(tmp_path: Path) -> None:
    put(tmp_path, record("a", ago=DAY, acc=0.3), record("b", acc=0.9))
    exporter = Exporter(str(tmp_path))
    exporter.look()
    next((tmp_path / "history").glob("*-b.json")).unlink()
    exporter.look()
    found = scrape(exporter)
    assert {dict(labels)["run"] for labels in found["newest_run"]} == {"a"}
    assert max(found["accuracy_last"].values()) == pytest.approx(0.305)


def test_a_store_that_is_down_leaves_the_last_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(available()[-1], tmp_path / "server") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        server.make_bucket("runs")
        exporter = Exporter("s3://runs/nightly", capacity=1e6)
        assert exporter.look(), "an empty store is no error"
        put(tmp_path, record("a"))
        (path,) = (tmp_path / "history").iterdir()
        exporter._history._store.write(path.name, path.read_bytes())
        exporter._measured = float("-inf")
        assert exporter.look()
        before = scrape(exporter)
        assert one(before["store_used_bytes"]) == path.stat().st_size and one(before["store_capacity_bytes"]) == 1e6
        server.kill()
        exporter._history._store._http.patience = 1.0  # seconds: it stays away; one that is there may take its time
        assert not exporter.look() and not exporter.look()
        down = scrape(exporter)
        assert one(down["store_up"]) == 0
        assert down["accuracy_last"] == before["accuracy_last"]
        assert one(down["refresh_timestamp_seconds"]) == one(before["refresh_timestamp_seconds"])
        server.start()
        exporter._history._store._http.patience = exporting.PATIENCE
        assert exporter.look()
        assert one(scrape(exporter)["store_up"]) == 1
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert not Exporter("s3://runs/nightly").look()
    said = capfd.readouterr().err
    assert said.count("no answer from") == 1 and "answers again" in said
    assert "AWS_SECRET_ACCESS_KEY" in said or "SignatureDoesNotMatch" in said


def test_a_volume_that_is_not_mounted_leaves_the_last_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exporter = Exporter(str(tmp_path / "runs"))
    assert exporter.look(), "no run yet"
    put(tmp_path / "runs", record("a"))
    assert exporter.look()
    before = scrape(exporter)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    assert not exporter.look() and not exporter.look()
    found = scrape(exporter)
    assert one(found["store_up"]) == 0
    assert (found["history_records"], found["accuracy_last"]) == (before["history_records"], before["accuracy_last"])
    (tmp_path / "runs").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    assert exporter.look() and one(scrape(exporter)["store_up"]) == 1
    said = capfd.readouterr().err
    assert said.count("is gone: is its volume mounted?") == 1 and "answers again" in said


def test_without_credentials_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    exporter = Exporter("s3://runs/nightly")
    assert not exporter.look()
    assert one(scrape(exporter)["store_up"]) == 0
    said = capfd.readouterr().err
    assert "no credentials for S3" in said and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


@contextlib.contextmanager
def serving(place: str, log: Path) -> Iterator[int]:
    """The command on the port it chose; it has to end by SIGTERM."""
    command = [sys.executable, "-m", "distillery", "exporter", place, "--port=0", "--every=0.2", "--address=127.0.0.1"]
    with log.open("wb") as file:
        child = subprocess.Popen(command, stderr=file)
    try:
        yield int(until(lambda: re.search(r"serving http://127\.0\.0\.1:(\d+)/metrics", log.read_text()))[1])
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        child.kill()
        child.wait()


def until(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `look` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


def answer(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as found:
        return str(found.read().decode())


def test_the_command_serves_what_appears_and_ends_with_sigterm(tmp_path: Path) -> None:
    with serving(tmp_path.as_uri(), tmp_path / "log") as port:
        put(tmp_path, record("a"))
        until(lambda: "distillery_accuracy_last{" in answer(port))
        assert one(parsed(answer(port))["store_up"]) == 1


def test_mistakes_end_the_command_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["exporter", *arguments])
        assert isinstance(done.exception, UserError), done
        return str(done.exception)

    assert "--capacity is '2 cats'" in said(str(tmp_path), "--capacity", "2 cats")
    assert "is not a place" in said("gs://bucket/runs")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on port {port}" in said(str(tmp_path), "--address", "127.0.0.1", "--port", port)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "distillery.exporter")
    monkeypatch.delattr("distillery.exporter", raising=False)
    assert "pip install 'distillery[metrics]'" in said(str(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_ends_the_process_instead_of_serving_old_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Exporter, "look", lambda self: 1 / 0)
    with pytest.raises(DistilleryError, match="ended; its traceback"):
        exporting.serve(Exporter(str(tmp_path)), port=0, address="127.0.0.1")
