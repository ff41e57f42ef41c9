"""The in-process runner: resumes, refuses foreign folders, survives kills, records failures, works through S3."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distillery import artifact, run, steps
from distillery.errors import DistilleryError, StoreError, StoreRefused, UserError

TEXT = """
name: toy
dataset: {name: digits, per_class: 30}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 3, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: rded, ipc: [1], options: {mipc: 20, num_crop: 2}}
  - {method: random, ipc: [1]}
students:
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: rded, epochs: 8}}
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: fair-hard, epochs: 8}}
labels: {mode: stored}
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")


def prints(out: Path) -> dict[str, str]:
    """Fingerprint of every finished artifact but the report, by folder."""
    found = sorted(out.glob("[1-5]-*/*/manifest.json"))
    return {path.parent.relative_to(out).as_posix(): artifact.read(path.parent).fingerprint for path in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    done = run.run(TEXT, str(out))
    assert done.failures == []
    return out


def test_a_run_leaves_every_artifact_and_a_report(finished: Path) -> None:
    kinds = [artifact.read(path.parent).kind for path in finished.glob("[1-5]-*/*/manifest.json")]
    assert sorted(kinds) == sorted(["dataset", "teacher", "teachers", *["synthetic", "labels", "result"] * 2])
    assert {"results.csv", "report.md", "report.html"} <= {p.name for p in (finished / "6-report").iterdir()}


def test_a_second_run_keeps_what_is_finished(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.glob("[1-5]-*/*/manifest.json")}
    run.run(TEXT, str(finished))
    assert {p: p.stat().st_mtime_ns for p in finished.glob("[1-5]-*/*/manifest.json")} == before


def test_another_student_keeps_teacher_and_images(finished: Path) -> None:
    before = set(prints(finished))
    run.run(TEXT.replace("preset: fair-hard, epochs: 8", "preset: fair-hard, epochs: 3"), str(finished))
    new = sorted(name.split("/")[0] for name in set(prints(finished)) - before)
    assert new == ["4-labels", "4-labels", "5-students", "5-students"]


def test_another_experiment_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="'toy'.*'other'"):
        run.run(TEXT.replace("name: toy", "name: other"), str(finished))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1-data" / "x").mkdir(parents=True)
    (tmp_path / "1-data" / "x" / "f").write_text("x")
    with pytest.raises(UserError, match="experiment.name"):
        run.run(TEXT, str(tmp_path))


@contextlib.contextmanager
def started(out: Path, text: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in another process, which does not outlive the block."""
    env = os.environ | {"DISTILLERY_CHECKPOINT_SECONDS": "0.05", "DISTILLERY_LOG": "quiet"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the bits of sums depend on it
    command = [sys.executable, "-m", "distillery", "run", str(text), "--out", str(out)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.timeout(600)
def test_a_killed_run_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of the work, then once to the end."""
    wanted, text, out = prints(finished), tmp_path / "toy.yaml", tmp_path / "out"
    text.write_text(TEXT)
    rng = random.Random(time.time_ns())
    for _ in range(3):
        with started(out, text) as process:
            while not (out / "1-data").exists() and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0.1, 2.5))
            process.send_signal(signal.SIGKILL)
    with started(out, text) as last:
        _, said = last.communicate()
    assert last.returncode == 0, said.decode()
    found = prints(out)
    assert found and all(wanted[name] == print_ for name, print_ in found.items()), (wanted, found)


def test_a_second_process_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    from distillery.store import open_store

    with open_store(str(tmp_path)).hold("run"):
        text = tmp_path / "toy.yaml"
        text.write_text(TEXT)
        with started(tmp_path, text) as second:
            _, said = second.communicate()
    assert second.returncode == 2
    assert b"in use by process" in said, said.decode()
    assert b"Traceback" not in said, said.decode()


def test_a_failed_cell_leaves_the_others_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.replace("labels: {mode: stored}", "")
    broken = steps.methods.find("rded")
    works = broken.synthesize
    monkeypatch.setattr(broken, "synthesize", lambda *_, **__: (_ for _ in ()).throw(DistilleryError("no more luck")))
    done = run.run(text, str(tmp_path))
    assert len(done.failures) == 1
    assert "no more luck" in done.failures[0]
    with pytest.raises(DistilleryError, match="no more luck"):
        steps.verdict(done.failures)
    results = (done.report / "results.csv").read_text()
    assert "random" in results
    monkeypatch.setattr(broken, "synthesize", works)
    assert run.run(text, str(tmp_path)).failures == []


@pytest.mark.parametrize("kind", [StoreError, StoreRefused, torch.AcceleratorError])
def test_what_a_store_or_the_gpu_did_is_not_the_cells_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    text = TEXT.replace("labels: {mode: stored}", "")
    broken = steps.methods.find("rded")
    with monkeypatch.context() as patch:
        patch.setattr(broken, "synthesize", lambda *_, **__: (_ for _ in ()).throw(kind("no answer")))
        with pytest.raises(kind, match="no answer"):
            run.run(text, str(tmp_path))
    assert not list(tmp_path.rglob("failure.json")), "Kubeflow would keep it in its cache"
    assert run.run(text, str(tmp_path)).failures == []


def test_stop_on_failure_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = steps.methods.find("rded")
    monkeypatch.setattr(broken, "synthesize", lambda *_, **__: (_ for _ in ()).throw(DistilleryError("no more luck")))
    with pytest.raises(DistilleryError, match="no more luck"):
        run.run(TEXT + "stop_on_failure: true\n", str(tmp_path))


def test_events_are_json_lines_with_every_step(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    ended = [e["step"] for e in events if e["event"] == "step" and e["status"] == "finished"]
    assert ended[:3] == ["prepare_data", "train_teacher", "gather_teachers"]
    assert ended.count("synthesize") == 2


TEACHERS = """
name: toy
dataset: {name: digits, per_class: 10}
teachers:
  - {net: convnet2, net_options: {width: 8}, epochs: 2, batch: 50, flip: 0.0, lr: 0.05}
  - {name: small, net: convnet1, net_options: {width: 4}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: median, ipc: [1]}
  - {method: random, ipc: [1], teachers: [small, convnet2]}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: sre2lpp, epochs: 2}}
"""
THIRD = TEACHERS.replace("teachers:\n", "teachers:\n  - {name: third, net: convnet1, epochs: 1, batch: 50}\n", 1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two teachers."""
    out = tmp_path_factory.mktemp("taught")
    assert run.run(TEACHERS, str(out)).failures == []
    return out


def gathered(out: Path) -> Path:
    """The two teachers side by side."""
    (found,) = (p.parent for p in out.glob("2-teachers/all-*/manifest.json") if "third" not in p.read_text())
    return found


def test_each_cell_uses_its_own_teachers(taught: Path) -> None:
    results = {path.parent.name[:6]: json.loads(path.read_text()) for path in taught.glob("5-students/*/result.json")}
    cards = {path.parent.name: json.loads(path.read_text()) for path in gathered(taught).glob("*/teacher.json")}
    accuracy = {name: card["accuracy"] for name, card in cards.items()}
    assert results["median"]["teacher"] == {
        "net": "convnet2",
        "net_options": cards["convnet2"]["net_options"],
        "accuracy": accuracy["convnet2"],
    }
    both = {"net": "convnet1+convnet2", "accuracy": (accuracy["small"] + accuracy["convnet2"]) / 2, "net_options": {}}
    assert results["random"]["teacher"] == both
    said = (taught / "6-report" / "report.md").read_text()
    average = 100 * (accuracy["small"] + accuracy["convnet2"]) / 2
    one = f"convnet2, {100 * accuracy['convnet2']:.2f} %"
    assert f"- Teachers: {one}; small (convnet1) + convnet2, {average:.2f} % on average" in said
    assert f"teachers small (convnet1) + convnet2 at {average:.2f} % on average" in said


def test_another_teacher_leaves_the_others_and_their_cells(taught: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in taught.glob("[1-5]-*/*/manifest.json")}
    assert run.run(THIRD.replace("method: median", "method: median, teachers: [small]"), str(taught)).failures == []
    after = {p: p.stat().st_mtime_ns for p in taught.glob("[1-5]-*/*/manifest.json")}
    assert {p: after[p] for p in before} == before
    new = sorted(path.parent.relative_to(taught).as_posix().split("-")[1] for path in after.keys() - before.keys())
    assert new == ["labels/median", "students/median", "synthetic/median", "teachers/all", "teachers/third"]


def test_statistics_are_gathered_for_the_teachers_of_methods_that_ask(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(taught.rglob("statistics.safetensors"))
    needs = steps.methods.Needs(teacher=True, gpu=False, several=True, statistics=("class_bn",))
    monkeypatch.setattr(steps.methods.find("median"), "NEEDS", needs)
    text = THIRD.replace("method: median", "method: median, teachers: [small, convnet2]")
    (data,) = taught.glob("1-data/*")
    folders = {name: gathered(taught) / name for name in ("small", "convnet2")} | {"third": tmp_path / "third"}
    steps.train_teacher(text, "third", data, folders["third"])
    made = steps.gather_teachers(text, data, folders, tmp_path / "all")
    assert made.config["statistics"] == {"teachers": ["convnet2", "small"], "kinds": ["class_bn"]}
    found = sorted(path.parent.name for path in (tmp_path / "all").rglob("statistics.safetensors"))
    assert found == ["convnet2", "small"]
    (cell, other) = steps.plan(text)
    assert cell["teachers"] == ["small", "convnet2"]
    assert steps.synthetic_spec(cell, data, tmp_path / "all").sources["teachers"].fingerprint == made.fingerprint
    assert set(steps.synthetic_spec(other, data, tmp_path / "all").inputs) == {"data", "teacher-0", "teacher-1"}


def test_a_teacher_under_anothers_name_is_refused(taught: Path, tmp_path: Path) -> None:
    (data,), right = taught.glob("1-data/*"), gathered(taught)
    wrong = {"small": right / "convnet2", "convnet2": right / "small"}
    with pytest.raises(UserError, match="holds another teacher than the experiment's 'small'"):
        steps.gather_teachers(TEACHERS, data, wrong, tmp_path / "out")
    with pytest.raises(UserError, match="expected the teachers convnet2, small, got small"):
        steps.gather_teachers(TEACHERS, data, {"small": right / "small"}, tmp_path / "out")
