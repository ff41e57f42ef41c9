"""The history of a store: records of real runs, cheap reading, damage, odd clocks, and stores that are down."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from _records import TEXT, cell, failed, record, seeds
from _servers import available, free_port, running

from distillery import artifact, history, run, steps
from distillery.errors import CorruptArtifact, UserError
from distillery.history import History, enter, of_run, whole
from distillery.history.record import RECORD, Record, Regression, identifier, parse
from distillery.store.local import LocalStore


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a toy experiment: `out`, with its record in `store`."""
    folder = tmp_path_factory.mktemp("run")
    assert run.run(TEXT, str(folder / "out"), str(folder / "store")).failures == []
    return folder


def only(place: Path) -> Record:
    """The one record of a history."""
    (found,) = History(str(place), whole).read()
    return found


def results(finished: Path) -> list[str | Path]:
    """The result artifacts of a run."""
    return sorted((finished / "out" / "5-students").glob("*"))


def put(place: Path, name: str, data: bytes) -> None:
    """Put a file into a history."""
    (place / "history").mkdir(exist_ok=True)
    (place / "history" / name).write_bytes(data)


def nothing(before: Record, now: Record) -> list[Regression]:
    """Judges nothing."""
    return []


def test_a_run_leaves_a_record_of_what_it_made(finished: Path) -> None:
    found = only(finished / "store")
    assert (found.experiment, found.status, found.config, found.previous) == ("toy", "succeeded", TEXT, "")
    (made,) = found.cells
    with (finished / "out" / "6-report" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert f"{100 * made.students[0].acc_last:.2f}" == row["acc_last"]
    assert (made.id, made.method, str(made.image_bytes)) == (row["cell"], row["method"], row["image_bytes"])
    (images,) = (finished / "out" / "3-synthetic").glob("*/images.safetensors")
    assert made.images_sha256 == hashlib.sha256(images.read_bytes()).hexdigest()
    (data,) = (finished / "out" / "1-data").iterdir()
    assert found.data == artifact.read(data).fingerprint
    assert set(made.seconds) == {"prepare_data", "train_teacher", "synthesize", "relabel", "evaluate_student"}
    assert found.seconds == pytest.approx(sum(found.steps.values()))
    assert found.teachers[0].name == "convnet1"
    (file,) = (finished / "store" / "history").iterdir()
    assert file.name == f"{found.ended.strftime('%Y%m%dT%H%M%SZ')}-{found.run}.json"
    assert (finished / "out" / "6-report" / RECORD).read_bytes() == file.read_bytes()


def test_a_run_started_again_is_the_same_run(finished: Path) -> None:
    before = only(finished / "store")
    run.run(TEXT, str(finished / "out"), str(finished / "store"))
    assert only(finished / "store") == before
    assert "run before" not in (finished / "out" / "6-report" / "report.md").read_text()


def test_without_another_place_the_history_is_the_outputs(finished: Path, tmp_path: Path) -> None:
    steps.report(TEXT, results(finished), tmp_path / "report", history=str(tmp_path))
    assert only(tmp_path).run == only(finished / "store").run


def test_results_that_never_finished_are_failures_of_a_report_that_is_there(finished: Path, tmp_path: Path) -> None:
    (half := tmp_path / "half").mkdir()
    (half / "result.json").write_text("{")
    (torn := tmp_path / "torn").mkdir()
    (torn / artifact.MANIFEST).write_text('{"schema"')
    place, found = tmp_path / "report", [*results(finished), half, torn, tmp_path / "absent"]
    failures = steps.report(TEXT, found, place, history=str(tmp_path))
    assert [line.partition(":")[0] for line in failures] == ["absent", "half", "torn"]
    assert "has no manifest.json" in failures[1]
    assert list(artifact.read(place, "report").inputs) == ["result-000"]
    assert "3 of 4 cells failed" in (place / "report.html").read_text()
    assert only(tmp_path).status == "failed"


def test_a_worse_run_says_so_in_report_and_metrics(finished: Path, tmp_path: Path) -> None:
    now = only(finished / "store")
    (made,) = now.cells
    lower = replace(made.students[0], acc_last=made.students[0].acc_last + 0.05)
    before = replace(now, run="before", cells=(replace(made, students=(lower,), images_sha256="others"),))
    put(tmp_path, "20200101T000000Z-before.json", before.json())
    steps.report(TEXT, results(finished), tmp_path / "report", history=str(tmp_path), run="now")
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [found["kind"] for found in summary["regressions"]] == ["accuracy", "images"]
    assert summary["previous"] == "before"
    assert summary["metrics"]["regressions"] == 2
    assert summary["metrics"]["accuracy_drop_max"] == pytest.approx(5.0)
    for page in ("report.md", "report.html"):
        assert "Worse than the run before it (before)" in (tmp_path / "report" / page).read_text()
        assert "5.00 points lower" in (tmp_path / "report" / page).read_text()
    kept = History(str(tmp_path), whole).read()[-1]
    assert (kept.run, kept.previous) == ("now", "before")
    assert [asdict(found) for found in kept.regressions] == summary["regressions"]


def test_an_equal_run_is_no_worse(finished: Path, tmp_path: Path) -> None:
    put(tmp_path, "20200101T000000Z-before.json", replace(only(finished / "store"), run="before").json())
    steps.report(TEXT, results(finished), tmp_path / "report", history=str(tmp_path), run="now")
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert (summary["previous"], summary["regressions"]) == ("before", [])
    assert (summary["metrics"]["regressions"], summary["metrics"]["accuracy_drop_max"]) == (0, 0)


def test_a_store_that_is_down_costs_no_report(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "plain")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(history, "BRIEF", 0.5)
    assert steps.report(TEXT, results(finished), tmp_path, history="s3://bucket/runs") == []
    artifact.read(tmp_path, "report")
    assert "WARNING: not entered into the history of s3://bucket/runs" in capsys.readouterr().err
    assert "nor entered into the history: not entered into" in (tmp_path / "report.md").read_text()
    assert parse((tmp_path / RECORD).read_bytes(), "").experiment == "toy"


def test_a_place_that_cannot_be_a_store_shows_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gs://bucket"):
        run.run(TEXT, str(tmp_path / "out"), "gs://bucket/history")
    assert not (tmp_path / "out").exists()


def test_failed_and_damaged_cells_are_recorded_as_such(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    folders = [*map(Path, results(finished)), tmp_path / "broken"]
    made = of_run.record(steps.experiment.load(TEXT), TEXT, folders, code="x")
    found, _ = enter(str(tmp_path), made, nothing)
    assert only(tmp_path) == found
    assert found.status == "failed"
    broken, good = sorted(found.cells, key=lambda c: c.failure is None)
    assert broken.failure is not None
    assert "manifest.json" in broken.failure.error
    assert good.students


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every key that is read from a local store."""
    found: list[str] = []
    read = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, key: (found.append(key), read(self, key))[1])
    return found


def test_a_thousand_records_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    template = record().json()
    for number in range(1000):
        made = template.replace(b'"run": "one"', f'"run": "r{number}"'.encode())
        put(tmp_path, f"20261121T{number // 60:04d}{number % 60:02d}Z-r{number}.json", made)
    past = History(str(tmp_path), lambda found: found.run)
    assert past.read() == [f"r{number}" for number in range(1000)]
    assert len(reads) == 1000
    assert len(past.read()) == 1000
    enter(str(tmp_path), record("new", 80_000), nothing)
    reads.clear()
    assert past.read()[-1] == "new"
    assert [key[-8:] for key in reads] == ["new.json"]
    (tmp_path / "history" / "20261121T000005Z-r5.json").unlink()
    assert "r5" not in past.read()


def test_the_run_before_is_found_without_reading_everything(tmp_path: Path, reads: list[str]) -> None:
    for number in range(200):
        put(tmp_path, f"20261121T{number:06d}Z-r{number}.json", record(f"r{number}", number).json())
    made, before = enter(str(tmp_path), record("now", 4000), nothing)
    assert before is not None
    assert (before.run, made.previous) == ("r199", "r199")
    assert len(reads) <= history.READERS


NO_RECORDS = {
    "half": record().json()[:200],
    "empty": b"",
    "foreign": b'{"schema": 1, "some": "thing"}',
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "newer": json.dumps(json.loads(record().json()) | {"schema": 2}).encode(),
    "time": json.dumps(json.loads(record().json()) | {"finished": "yesterday"}).encode(),
    "bytes": b"\xff\xfe",
}


def test_what_is_no_record_is_counted_and_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "20261121T000000Z-one.json", record().json())
    for name, data in NO_RECORDS.items():
        put(tmp_path, f"20261121T000001Z-{name}.json", data)
    put(tmp_path, "README.txt", b"not counted")
    past = History(str(tmp_path), whole)
    assert past.read() == [record()]
    assert past.unreadable == len(NO_RECORDS)
    _, before = enter(str(tmp_path), record("two", 2), nothing)
    assert before == record()
    put(tmp_path, "20261121T000001Z-half.json", record("half", 1).json())
    assert [found.run for found in past.read()] == ["one", "half", "two"], "read again when it was completed"
    assert past.unreadable == len(NO_RECORDS) - 1


def test_cut_anywhere_a_record_is_refused_and_never_half_believed() -> None:
    data = record().json()
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(CorruptArtifact):
            parse(data[:length], "x")
    assert parse(data, "x") == record()
    more = json.loads(data) | {"unknown": 1}
    assert parse(json.dumps(more).encode(), "x") == record(), "keys of later versions are no fault"


def test_a_clock_that_goes_backwards_loses_nothing(tmp_path: Path) -> None:
    for run_, second in (("a", 3000), ("b", 5), ("c", 7)):
        made, before = enter(str(tmp_path), record(run_, second), nothing)
        assert made.run == run_
        assert before is None or before.run != run_
    assert sorted(found.run for found in History(str(tmp_path), whole).read()) == ["a", "b", "c"]


def test_a_retried_run_adds_a_record_and_the_newest_counts(tmp_path: Path) -> None:
    first, _ = enter(str(tmp_path), record("one", 0, [*seeds("rded", 0.5), failed("random")]), nothing)
    second, before = enter(str(tmp_path), record("one", 0), nothing)
    assert before is None, "a run is not compared with itself"
    assert second.finished > first.finished, "the first record stays as it is"
    assert len(list((tmp_path / "history").iterdir())) == 2
    assert [found.status for found in History(str(tmp_path), whole).read()] == ["succeeded"]
    assert enter(str(tmp_path), record("one", 50), nothing)[0] == second, "the same end, told again"


def test_the_run_before_is_of_the_same_experiment_and_schedule_and_has_a_result(tmp_path: Path) -> None:
    place = str(tmp_path)
    enter(place, record("a", 1, schedule="nightly"), nothing)
    enter(place, record("b", 2), nothing)
    enter(place, record("c", 3, experiment="other"), nothing)
    enter(place, record("d", 4, [failed()], schedule="nightly"), nothing)
    assert enter(place, record("e", 5, schedule="nightly"), nothing)[0].previous == "a"
    assert enter(place, record("f", 6, schedule="weekly"), nothing)[0].previous == ""
    assert enter(place, record("g", 7), nothing)[0].previous == "f", "by hand: whatever ran last"


def test_a_run_before_that_vanished_is_no_fault(tmp_path: Path) -> None:
    enter(str(tmp_path), record("a", 1), nothing)
    first, _ = enter(str(tmp_path), record("b", 2), nothing)
    next((tmp_path / "history").glob("*-a.json")).unlink()
    again, before = enter(str(tmp_path), record("b", 9), nothing)
    assert again == first
    assert before is None


def test_writers_at_the_same_time_all_arrive(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: enter(str(tmp_path), record(f"r{n}", 0), nothing), range(64)))
    past = History(str(tmp_path), whole)
    assert {found.run for found in past.read()} == {f"r{number}" for number in range(64)}
    assert past.unreadable == 0


@pytest.mark.parametrize(("said", "kept"), [("a/b c", "a-b-c"), ("../x", "x"), ("0b1e-4", "0b1e-4"), ("", "")])
def test_ids_are_plain_names(said: str, kept: str) -> None:
    assert identifier(said) == kept


def test_a_place_may_name_the_history_itself() -> None:
    assert history.folder_of("s3://b/runs/") == "s3://b/runs/history"
    assert history.folder_of("s3://b/runs/history") == "s3://b/runs/history"


def test_configurations_are_equal_if_they_can_change_no_number() -> None:
    def told(text: str) -> str:
        return of_run.resolved(steps.experiment.load(text))

    plain = told(TEXT)
    assert told(TEXT.replace("name: toy", "name: another")) == plain
    assert told(TEXT.replace("ipc: [2]", "ipc: [2], shards: 2")) == plain
    assert told(f"{TEXT}profile: a100\n") == plain
    assert told(TEXT.replace("epochs: 3", "epochs: 4")) != plain
    assert told(TEXT.replace("mipc: 12", "mipc: 11")) != plain
    assert told(TEXT.replace("epochs: 2", "epochs: 3")) != plain
    assert (
        told(TEXT.replace("preset: fair-soft, epochs: 3", "preset: fair-soft, epochs: 3, bn_momentum: 0.1")) == plain
    ), "a default, written out"


def test_numbers_that_are_none_stay_out(tmp_path: Path) -> None:
    odd = replace(cell(), students=(replace(cell().students[0], acc_last=None),))
    made, _ = enter(str(tmp_path), record("a", 1, [odd, *seeds("random", 0.4)]), nothing)
    assert only(tmp_path) == made


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server."""
    with running(available()[-1], tmp_path / "server") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.make_bucket("runs")
        yield "s3://runs/team"


def test_a_history_in_an_object_store(bucket: str, finished: Path, tmp_path: Path) -> None:
    for number in range(20):
        enter(bucket, record(f"r{number}", number), nothing)
    past = History(bucket, whole)
    assert [found.run for found in past.read()] == [f"r{number}" for number in range(20)]
    steps.report(TEXT, results(finished), tmp_path / "report", history=f"{bucket}/", run="kfp-id", schedule="nightly")
    newest = past.read()[-1]
    assert (newest.run, newest.schedule, newest.previous) == ("kfp-id", "nightly", "")
    assert newest.json() == (tmp_path / "report" / RECORD).read_bytes()
