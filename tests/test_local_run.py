"""The compiled package through kfp.local, as `make demo` runs it: the library's own artifacts and a truthful end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kfp import dsl
from rich.console import Console

import components
from distillery import artifact, run
from distillery.console import emit
from distillery.data import real
from distillery.history import History, whole
from pipelines import demo, local_run
from pipelines.compile import SHARDED

MADE = ("prepare_data", "train_teacher", "gather_teachers", "synthesize", "relabel", "evaluate_student")
EXPERIMENT = """
name: small
dataset: {name: digits, per_class: 12}
teacher: {net: convnet1, net_options: {width: 8}, epochs: 2, batch: 32}
methods:
  - {method: rded, ipc: [2], options: {mipc: 12}}
students:
  - {net: convnet1, net_options: {width: 8}, recipe: {preset: fair-soft, epochs: 3}}
  - {net: convnet1, net_options: {width: 8}, recipe: {preset: fair-hard, epochs: 3}}
labels: {mode: stored}
device: cpu
"""
# Forty images of each class are asked for where there are twelve: known only when the data is seen.
TOO_MANY = "  - {method: random, ipc: [40]}\n"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums of floats depend on the number of threads; so do hashes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def events(path: Path, status: str = "finished") -> dict[str, Path]:
    """Step -> folder of the artifact it said it made."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {e["step"]: Path(e["path"]) for e in found if e["event"] == "step" and e["status"] == status}


def prints(folders: dict[str, Path]) -> dict[str, str]:
    """Step -> fingerprint of its artifact, checked."""
    return {step: artifact.read(folders[step]).fingerprint for step in MADE}


def by_hand(folder: Path) -> dict[str, Path]:
    """The components' Python functions, called one after the other as anybody could."""
    at = {step: folder / step for step in MADE}
    folder.mkdir()
    names = ("upstream", "gathering", "prepare_cpu", "prepare_memory", "gather_cpu", "gather_memory", "gather_gpus")
    (cell,) = components.plan.python_func(EXPERIMENT, *(str(folder / name) for name in names))
    gathering = (folder / "gathering").read_text()
    (wanted,) = components.plan_teachers.python_func(gathering)
    data, teacher = dsl.Dataset(uri=str(at["prepare_data"])), dsl.Model(uri=str(at["train_teacher"]))
    teachers = dsl.Model(uri=str(at["gather_teachers"]))
    made, labels = dsl.Dataset(uri=str(at["synthesize"])), dsl.Artifact(uri=str(at["relabel"]))
    result, metrics = dsl.Artifact(uri=str(at["evaluate_student"])), dsl.Metrics()
    confusion = dsl.ClassificationMetrics()
    components.prepare_data.python_func((folder / "upstream").read_text(), data)
    components.train_teacher.python_func(wanted, data, teacher)
    components.gather_teachers.python_func(gathering, data, [teacher], teachers)
    components.synthesize.python_func(cell, data, teachers, made)
    components.relabel.python_func(cell, made, teachers, labels)
    components.evaluate_student.python_func(cell, data, teachers, made, labels, result, metrics, confusion)
    assert metrics.metadata["accuracy rded ipc2 convnet1 fair-soft epochs 3"] > 0
    assert metrics.metadata["ram bytes synthesize"] > 1e6
    matrix = confusion.metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == [str(digit) for digit in range(10)]
    assert sum(sum(row["row"]) for row in matrix["rows"]) == sum(real.load(at["prepare_data"]).counts("val"))
    return at


def run_demo(out: Path, experiment: str) -> "subprocess.CompletedProcess[str]":
    """`python -m pipelines.demo` as a person starts it, from another folder."""
    out.mkdir()
    (out / "experiment.yaml").write_text(experiment)
    command = [sys.executable, "-m", "pipelines.demo", "--experiment", "experiment.yaml", "--out", "."]
    path = {**os.environ, "PYTHONPATH": str(local_run.ROOT)}
    return subprocess.run(command, cwd=out, env=path, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.timeout(900)
def test_kfp_the_runner_and_plain_calls_make_equal_artifacts(tmp_path: Path, one_thread: None) -> None:
    shown = run_demo(tmp_path / "kfp", EXPERIMENT)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    with_kfp = prints(events(tmp_path / "kfp" / "events.jsonl"))
    assert run.run(EXPERIMENT, str(tmp_path / "run")).failures == []
    assert prints(events(tmp_path / "run" / "log.jsonl")) == with_kfp
    assert prints(by_hand(tmp_path / "hand")) == with_kfp
    lines = [line.split() for line in shown.stdout.splitlines()]
    starts = [line[0] for line in lines if line]
    assert [word for word in starts if word in ("plan", *MADE, "report")] == ["plan", *MADE, "report"], shown.stdout
    assert "20 images" in shown.stdout
    assert "accuracy" in shown.stdout
    assert "Leaderboard" in shown.stdout
    assert f"report: {tmp_path / 'kfp' / 'report.html'}" in shown.stdout
    assert "<html" in (tmp_path / "kfp" / "report.html").read_text()
    assert "Traceback" not in shown.stdout + shown.stderr
    assert not shown.stderr


SHARDS = """
name: small
dataset: {name: digits, per_class: 12}
teachers:
  - {net: convnet1, net_options: {width: 8}, epochs: 2, batch: 32}
  - {name: other, net: convnet1, net_options: {width: 4}, epochs: 1, batch: 32}
methods:
  - {method: rded, ipc: [2], options: {mipc: 12}, shards: 3, teachers: [other]}
  - {method: random, ipc: [1], teachers: [other, convnet1]}
students:
  - {net: convnet1, net_options: {width: 8}, recipe: {preset: fair-soft, epochs: 2}}
device: cpu
"""


def all_prints(path: Path) -> set[tuple[str, str, str]]:
    """(step, cell, fingerprint) of everything that was finished, but the pieces, which exist only with shards."""
    found = [e for e in map(json.loads, path.read_text().splitlines()) if e.get("status") == "finished"]
    made = [e for e in found if e["step"] in MADE]
    return {(e["step"], e.get("cell", ""), artifact.read(Path(e["path"])).fingerprint) for e in made}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_through_kfp_equal_the_runner_with_and_without(tmp_path: Path, one_thread: None) -> None:
    log, said = tmp_path / "log", tmp_path / "events"
    given = {"experiment": SHARDS, "history": str(tmp_path / "store"), "schedule": "nightly"}
    child = local_run.start(SHARDED, tmp_path / "kfp", given, said, log)
    assert child.wait(timeout=850) == 0, log.read_text()[-3000:]
    (record,) = History(str(tmp_path / "store"), whole).read()
    assert (record.schedule, record.status, len(record.cells)) == ("nightly", "succeeded", 2)
    assert "{" not in record.run, "KFP's id of the run, filled in"
    with_kfp = all_prints(said)
    assert sum(1 for step, _, _ in with_kfp if step == "train_teacher") == 2
    assert sum(1 for step, _, _ in with_kfp if step == "synthesize") == 2
    assert log.read_text().count("piece 3 of 3: ") == 1
    for name, text in (("sharded", SHARDS), ("whole", SHARDS.replace("shards: 3, ", ""))):
        assert run.run(text, str(tmp_path / name)).failures == []
        assert all_prints(tmp_path / name / "log.jsonl") == with_kfp


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_failed_cell_fails_the_run_and_leaves_the_others_report(tmp_path: Path, one_thread: None) -> None:
    shown = run_demo(tmp_path / "kfp", EXPERIMENT.replace("students:", f"{TOO_MANY}students:"))
    assert shown.returncode == 1, shown.stdout
    assert "report: " in shown.stdout
    assert "FAILED  " in shown.stdout
    assert "random" in shown.stdout.partition("FAILED  ")[2]
    page = (tmp_path / "kfp" / "report.html").read_text()
    assert "rded" in page
    assert "passed on" in shown.stdout, "later steps of the failed cell hand its failure on"


@pytest.mark.timeout(300)
def test_faulty_experiment_ends_at_plan_with_its_own_words(tmp_path: Path, one_thread: None) -> None:
    shown = run_demo(tmp_path / "kfp", EXPERIMENT.replace("epochs: 2", "epoch: 2"))
    assert shown.returncode == 1
    assert "FAILED: plan" in shown.stdout
    assert "unknown key; did you mean 'epochs'?" in shown.stdout
    assert f"log: {tmp_path / 'kfp' / 'log.txt'}" in shown.stdout
    assert not (tmp_path / "kfp" / "report.html").exists()
    assert not shown.stderr


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Replace the run by a script of a few lines that plays it: `pretend(code)` -> (exit status, screen)."""

    def play(code: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        def start(package: Path, out: Path, parameters: Any, events: Path, log: Path) -> "subprocess.Popen[bytes]":
            script = "import json, os, sys, time\n" + textwrap.dedent(code)
            with log.open("wb") as file:
                given = [sys.executable, "-c", script, str(events), str(out)]
                return subprocess.Popen(given, stdout=file, stderr=file, start_new_session=True)

        monkeypatch.setattr(local_run, "start", start)
        status = demo.main(["--out", str(tmp_path / "out")])
        return status, capsys.readouterr().out

    return play


def test_report_without_success_is_a_failure(pretend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.html").write_text("<html></html>")
    row = {"ipc": 10, "student": "convnet3", "recipe": "fair-soft", "method": "rded", "acc_last": 61.25, "seeds": 1}
    row |= {"acc_last_std": None, "acc_best": 62.0, "to_random": 3.5, "to_teacher": -20.0, "tie_with_random": True}
    summary = {"leaderboard": [row], "failures": ["dm ipc 1 seed 0: synthesize: NonFiniteLoss: loss is nan"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    code = f"""
    event = {{"event": "step", "step": "report", "status": "finished", "seconds": 2.5, "path": {str(folder)!r}}}
    open(sys.argv[1], "w").write(json.dumps(event | {{"summary": "2 cells, 1 failed"}}) + "\\n")
    sys.exit(STATUS)
    """
    status, text = pretend(code.replace("STATUS", "1"), capsys)
    assert status == 1
    assert "FAILED  dm ipc 1 seed 0: synthesize: NonFiniteLoss" in text
    assert "61.25" in text
    assert "+3.50 (tie)" in text
    assert "report: " in text
    (folder / "summary.json").write_text(json.dumps(summary | {"failures": []}))
    assert pretend(code.replace("STATUS", "0"), capsys)[0] == 0


def test_end_without_a_report_is_a_failure_even_with_status_zero(
    pretend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = pretend("print('nothing ran')", capsys)
    assert status == 1
    assert "nothing ran" in text


def test_failing_step_is_named_with_its_last_lines(pretend: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
    print("    early line")
    for i in range(40):
        print(f"        line {i}\\n        ^^^^^^^")
    print("10:00:00.000 - ERROR - Task \\033[96m'train-teacher'\\033[0m finished with status \\033[91mFAILURE\\033[0m")
    print("RuntimeError: Pipeline failed")
    sys.exit(1)
    """
    status, text = pretend(code, capsys)
    assert status == 1
    assert "FAILED: train_teacher" in text
    assert "line 39" in text
    assert "early line" not in text
    assert "Pipeline failed" not in text
    assert "^^^" not in text


def test_out_that_cannot_be_a_folder_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        demo.main(["--out", str(tmp_path / "file" / "out")])
    assert ended.value.code == 2
    assert f"--out {tmp_path / 'file' / 'out'}: " in capsys.readouterr().err


def test_half_written_events_wait_for_their_end(tmp_path: Path) -> None:
    path = tmp_path / "events"
    code = f"""
import time
with open({str(path)!r}, "w") as file:
    file.write('{{"event": "progress", "step": "a", "do')
    file.flush()
    time.sleep(0.5)
    file.write('ne": 1, "total": 2}}\\n')
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    assert list(demo.follow(child, path)) == [{"event": "progress", "step": "a", "done": 1, "total": 2}]


def test_kept_and_failed_steps_are_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, screen = tmp_path / "events", Console(record=True, width=120)
    monkeypatch.setenv("DISTILLERY_EVENTS", str(path))
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")
    said = {"event": "step", "step": "synthesize", "cell": "rded-ipc1-seed0", "seconds": 65.0, "path": str(tmp_path)}
    emit(said | {"status": "started"})
    emit({"event": "progress", "step": "synthesize", "cell": "rded-ipc1-seed0", "done": 1, "total": 2})
    emit({"event": "note", "step": "synthesize", "text": "something"})
    emit(said | {"status": "failed", "summary": "UserError: [no] room"})
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert demo.watch(child, path, screen) is None
    assert "synthesize rded-ipc1-seed0" in screen.export_text(clear=False)
    assert "1m 05s   failed: UserError: [no] room" in screen.export_text()


def test_interrupting_the_demo_ends_its_steps(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import subprocess, sys
        from pathlib import Path
        from pipelines import demo, local_run
        follow = demo.follow
        def following(child, events):
            Path({str(tmp_path / "watched")!r}).touch()
            return follow(child, events)
        demo.follow = following
        def start(package, out, parameters, events, log):
            inner = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(100)"
            return subprocess.Popen(["sh", "-c", f'"{{sys.executable}}" -c "{{inner}}"; true'], start_new_session=True)
        local_run.start = start
        demo.main(["--out", {str(tmp_path / "out")!r}])
    """)
    path = {**os.environ, "PYTHONPATH": str(local_run.ROOT)}
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", script], env=path, **quiet)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text() and (tmp_path / "watched").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    step, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 50  # by itself it would end later
    while alive(step):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(process: int) -> bool:
    """Whether a process runs (one that ended and waits for its parent does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
