"""`python -m pipelines submit`: what is refused before anything is sent, what is sent, and how a run is waited for."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _kfp_api import Act, FakeKfp

from pipelines import compiled, follow
from pipelines import submit as submitting
from pipelines.__main__ import main
from pipelines.api import Client, Run, connection

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = """name: mine
dataset: {name: digits}
teacher: {net: convnet3, epochs: 1}
methods: [{method: random, ipc: [1]}]
students: [{net: convnet3, recipe: fair-soft}]
"""
PACKAGE = {
    "pipelineInfo": {"name": "tiny"},
    "root": {
        "dag": {
            "tasks": {
                "plan": {"cachingOptions": {"enableCache": True}, "componentRef": {"name": "comp-plan"}},
                "for-loop-1": {"iteratorPolicy": {"parallelismLimit": 8}, "parameterIterator": {"items": {}}},
            }
        },
        "inputDefinitions": {
            "parameters": {
                "experiment": {"parameterType": "STRING", "defaultValue": "demo", "isOptional": True},
                "count": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1.0, "isOptional": True},
                "rate": {"parameterType": "NUMBER_DOUBLE", "isOptional": True},
                "flag": {"parameterType": "BOOLEAN", "isOptional": True},
                "tolerations": {"parameterType": "LIST", "defaultValue": [], "isOptional": True},
                "node_selector": {"parameterType": "STRUCT", "defaultValue": {}, "isOptional": True},
            }
        },
    },
    "components": {"comp-cell": {"dag": {"tasks": {"relabel": {"cachingOptions": {"enableCache": True}}}}}},
    "schemaVersion": "2.1.0",
    "sdkVersion": "kfp-2.17.0",
}


PLATFORM = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-plan": {}}}}}}
SETTLE = submitting.SETTLE


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKfp]:
    """A server whose runs have a few quick steps; nobody else submits meanwhile."""
    monkeypatch.setattr(submitting, "SETTLE", 0.0)
    with FakeKfp() as server:
        yield server


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A small package."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump_all([PACKAGE, PLATFORM]))
    return str(path)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """An experiment in a file."""
    path = tmp_path / "mine.yaml"
    path.write_text(EXPERIMENT)
    return str(path)


def submit(kfp: FakeKfp, *words: str) -> int:
    """The exit status of a submission."""
    return main(
        ["submit", "--endpoint", kfp.endpoint, "--interval", "0.01", "--patience", "1", "--backoff", "0", *words]
    )


def sent(kfp: FakeKfp) -> list[dict[str, Any]]:
    """The runs that were asked for."""
    return [body for method, path, body in kfp.requests if (method, path) == ("POST", "/apis/v2beta1/runs")]


def once_running(kfp: FakeKfp, action: Callable[[], object]) -> None:
    """Do something as soon as a run is going, and somebody has looked at it."""

    def wait() -> None:
        while not any(told["state"] == "RUNNING" for told in kfp.runs.values()):
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


# What is sent


def test_a_file_is_sent_as_its_text_and_parameters_have_their_types(kfp: FakeKfp, tiny: str, mine: str) -> None:
    words = ["--param", "count=3", "--param", "rate=0.5", "--param", "flag=true", "--param", 'node_selector={"a": "b"}']
    assert submit(kfp, tiny, "-x", mine, *words, "--param", 'tolerations=[{"key": "gpu"}]') == 0
    (body,) = sent(kfp)
    assert body["runtime_config"] == {
        "parameters": {
            "experiment": EXPERIMENT,
            "count": 3,
            "rate": 0.5,
            "flag": True,
            "node_selector": {"a": "b"},
            "tolerations": [{"key": "gpu"}],
        }
    }
    assert body["pipeline_spec"]["pipeline_spec"] == PACKAGE
    assert body["display_name"].startswith("mine 20")
    assert next(iter(kfp.experiments.values()))["display_name"] == "distill"


def test_everything_else_that_can_be_asked_for(kfp: FakeKfp, tiny: str) -> None:
    words = ["--parallelism", "2", "--no-cache", "--name", "n", "-e", "group", "--service-account", "me"]
    words += ["--queue", "gpus", "--pull-secret", "registry"]
    assert submit(kfp, tiny, "-x", "demo", *words, "--pipeline-root", "s3://b/p") == 0
    (body,) = sent(kfp)
    pod = body["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-plan"]
    assert pod["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert pod["imagePullSecret"][0]["secretName"] == "registry"
    spec = body["pipeline_spec"]["pipeline_spec"]
    assert spec["root"]["dag"]["tasks"]["for-loop-1"]["iteratorPolicy"] == {"parallelismLimit": 2}
    assert "iteratorPolicy" not in spec["root"]["dag"]["tasks"]["plan"]
    assert spec["root"]["dag"]["tasks"]["plan"]["cachingOptions"] == {}
    assert spec["components"]["comp-cell"]["dag"]["tasks"]["relabel"]["cachingOptions"] == {}
    assert body["runtime_config"] == {"parameters": {"experiment": "demo"}, "pipeline_root": "s3://b/p"}
    assert (body["display_name"], body["service_account"]) == ("n", "me")


def test_changes_to_the_experiment_travel_in_its_text(kfp: FakeKfp, tiny: str, mine: str) -> None:
    assert submit(kfp, tiny, "-x", mine, "--set", "methods.0.ipc=[2]", "--profile", "a10") == 0
    text = yaml.safe_load(sent(kfp)[0]["runtime_config"]["parameters"]["experiment"])
    assert (text["methods"][0]["ipc"], text["profile"]) == ([2], "a10")


def test_a_profile_is_a_parameter_where_the_pipeline_has_one(kfp: FakeKfp, tmp_path: Path, mine: str) -> None:
    spec = json.loads(json.dumps(PACKAGE))
    spec["root"]["inputDefinitions"]["parameters"]["profile"] = {"parameterType": "STRING", "defaultValue": ""}
    path = tmp_path / "profiled.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert submit(kfp, str(path), "-x", mine, "--profile", "a10") == 0
    assert sent(kfp)[0]["runtime_config"]["parameters"] == {"experiment": EXPERIMENT, "profile": "a10"}
    before = len(kfp.requests)
    assert submit(kfp, str(path), "-x", mine, "--profile", "tpu") == 2
    assert submit(kfp, "-x", mine, "--param", "cell_memory=lots") == 2
    assert submit(kfp, "--param", "cell_gpus=two") == 2
    assert len(kfp.requests) == before


@pytest.mark.slow  # importing kfp takes 3 to 10 s
def test_the_plain_command_of_kfp_sends_the_same(kfp: FakeKfp, tmp_path: Path) -> None:
    path = str(compiled.DISTILL)
    assert submit(kfp, path, "-x", str(ROOT / "pipelines/experiments/demo.yaml"), "--param", "attempt=2") == 0
    text = (ROOT / "pipelines/experiments/demo.yaml").read_text()  # and attempt is quoted as docs/resources.md says
    command = [str(Path(sys.executable).with_name("kfp")), "--endpoint", kfp.endpoint, "run", "create"]
    plain = {name: value for name, value in os.environ.items() if name.lower() not in ("http_proxy", "https_proxy")}
    done = subprocess.run(
        [*command, "-e", "distill", "-f", path, f"experiment={text}", 'attempt="2"'],
        env={**plain, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = sent(kfp)
    assert theirs["pipeline_spec"] == ours["pipeline_spec"]
    assert theirs["runtime_config"] == ours["runtime_config"]
    assert theirs["experiment_id"] == ours["experiment_id"]


# What is refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--param", "cuont=3"], "did you mean 'count'"),
        (["--param", "count=three"], "count='three': the pipeline wants a whole number"),
        (["--param", "count=1.5"], "a whole number"),
        (["--param", "flag=1"], "true or false"),
        (["--param", "tolerations={}"], "a list as JSON"),
        (["--param", "count"], "NAME=VALUE"),
        (["-x", "nothing.yaml"], "no such file"),
        (["-x", "name: a\nmethod: random\n"], "method"),
        (["--set", "a=1"], "give -x"),
        (["--retries", "2"], "--wait"),
        (["--parallelism", "0"], "parallelism"),
        (["-x", "demo", "--param", "experiment=demo"], "leave one of them out"),
    ],
)
def test_mistakes_cost_nothing(
    kfp: FakeKfp, tiny: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(kfp, tiny, *words) == 2
    assert says in capsys.readouterr().err
    assert not kfp.requests


@pytest.mark.parametrize(
    ("given", "says"),
    [("s3_ca=", "leave s3_ca out"), ("s3_ca=store.ca", "no dots"), ("s3_secret=My_Keys", "s3_secret='My_Keys'")],
)
def test_secrets_that_no_pod_can_have_are_refused_here(
    kfp: FakeKfp, given: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(kfp, "--param", given) == 2
    assert says in capsys.readouterr().err
    assert not kfp.requests
    assert submit(kfp, "--param", "s3_ca=store-ca", "--param", "s3_secret=store.keys") == 0


@pytest.mark.parametrize("text", ["name: mine\n", "a: [", "\x00", ""])
def test_a_file_that_is_no_package_is_named(
    kfp: FakeKfp, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "not.yaml"
    path.write_text(text)
    assert submit(kfp, str(path)) == 2
    assert "not.yaml" in capsys.readouterr().err
    assert submit(kfp, str(tmp_path / "none.yaml")) == 2


def test_a_value_that_is_missing_is_named(kfp: FakeKfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = json.loads(json.dumps(PACKAGE))
    spec["root"]["inputDefinitions"]["parameters"]["needed"] = {"parameterType": "STRING"}
    path = tmp_path / "needy.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert submit(kfp, str(path)) == 2
    assert "no value for needed" in capsys.readouterr().err


def test_the_endpoint_is_the_users_business(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", tiny]) == 2
    assert "--endpoint" in capsys.readouterr().err
    assert main(["submit", tiny, "--endpoint", "http://127.0.0.1:9", "--patience", "0.2"]) == 1
    assert "no usable answer" in capsys.readouterr().err
    assert main(["submit", tiny, "--endpoint", "http://127.0.0.1:9", "--header", "secretcookie"]) == 2
    assert "secretcookie" not in capsys.readouterr().err


def test_a_wrong_token_is_said_without_showing_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(token="right") as kfp:
        assert submit(kfp, tiny, "--existing-token", "wrong-token") == 2
        said = capsys.readouterr().err
        assert "token was not accepted" in said
        assert "wrong-token" not in said
        assert submit(kfp, tiny, "--existing-token", "right") == 0


def test_a_kubeflow_with_many_users_wants_a_namespace(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(multi_user=True, namespaces=("me",)) as kfp:
        assert submit(kfp, tiny) == 2
        assert "give --namespace" in capsys.readouterr().err
        assert submit(kfp, tiny, "-n", "you") == 2
        assert "namespace 'you' must exist" in capsys.readouterr().err
        assert submit(kfp, tiny, "-n", "me", "--wait") == 0
        assert main(["status", "-n", "me", "--endpoint", kfp.endpoint]) == 0
        assert "SUCCEEDED" in capsys.readouterr().out


# Once


def test_the_same_submission_finds_its_run(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(kfp, tiny, "--param", "count=1") == 0
    assert submit(kfp, tiny, "--param", "count=1") == 0
    assert "is there already (PENDING" in capsys.readouterr().out
    assert len(kfp.runs) == 1
    assert submit(kfp, tiny, "--param", "count=2") == 0
    assert submit(kfp, tiny, "--param", "count=1", "--again") == 0
    assert len(kfp.runs) == 3


def test_a_key_says_what_is_the_same_but_a_failed_run_answers_for_nothing(kfp: FakeKfp, tiny: str) -> None:
    kfp.steps = [Act("plan", fails=9)]
    assert submit(kfp, tiny, "--key", "nightly 7", "--wait") == 1
    kfp.steps = [Act("plan")]
    assert submit(kfp, tiny, "--key", "nightly 7", "--param", "count=4", "--wait") == 0
    assert submit(kfp, tiny, "--key", "nightly 7", "--wait") == 0
    assert len(kfp.runs) == 2


@pytest.mark.parametrize("fault", ["drop", "drop after", "503"])
def test_a_lost_answer_starts_no_second_run(kfp: FakeKfp, tiny: str, fault: str) -> None:
    kfp.fault(fault, "POST .*runs$")
    assert submit(kfp, tiny) == 0
    assert len(kfp.runs) == 1


def test_of_two_at_the_same_moment_one_stays(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "SETTLE", SETTLE)
    both = threading.Barrier(2)
    found: list[tuple[str, bool]] = []
    group = Client(connection(kfp.endpoint)).experiment("distill", create=True)
    body = {"experiment_id": group, "display_name": "n", "description": "mark", "pipeline_spec": PACKAGE}

    def go() -> None:
        client = Client(connection(kfp.endpoint))
        create = client.create_run

        def late(given: Any) -> Run:
            both.wait(60)  # neither has seen the other
            return create(given)

        client.create_run = late  # type: ignore[method-assign]
        run, fresh = submitting.start(client, body, "mark")
        found.append((run.id, fresh))

    threads = [threading.Thread(target=go) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert {run for run, _ in found} == set(kfp.runs)
    assert len(kfp.runs) == 1
    assert sorted(fresh for _, fresh in found) == [False, True]


def test_a_later_one_gives_way_to_the_older(kfp: FakeKfp, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit(kfp, tiny) == 0
    (first,) = kfp.runs
    kfp.skew += 5
    look, answers = submitting.oldest, iter([None])  # what the slower one saw before the quicker one had begun
    monkeypatch.setattr(submitting, "oldest", lambda *given: next(answers, look(*given)))
    assert submit(kfp, tiny) == 0
    assert list(kfp.runs) == [first]


# Waiting


def test_each_step_is_told_when_it_starts_and_ends(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.steps = [Act("plan", polls=2), Act("prepare-data", cached=True), Act("cell/1/synthesize")]
    assert submit(kfp, tiny, "--wait") == 0
    lines = [" ".join(line.split()[1:3]) for line in capsys.readouterr().out.splitlines() if line[2:3] == ":"]
    steps = ["plan started", "plan done", "prepare_data started", "prepare_data cached"]
    assert lines == [*steps, "cell/1/synthesize started", "cell/1/synthesize done"]


def test_a_failed_run_says_where_and_why(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = (
        "".join(f"line {i}\n" for i in range(40)) + "ValueError: class 7 is empty\nF1121 10:00:01 1 main.go:50] exit\n"
    )
    kfp.steps = [Act("plan"), Act("cell/2/synthesize", fails=1, log=log)]
    assert submit(kfp, tiny, "--wait") == 1
    said = capsys.readouterr().err
    (run,) = kfp.runs
    assert "FAILED: cell/2/synthesize (Error (exit code 1))\n" in said
    assert "    ValueError: class 7 is empty\nsee " in said
    assert "line 39" in said
    assert "line 20" not in said
    assert f"{kfp.endpoint}/#/runs/details/{run}" in said


def test_a_log_that_is_gone_is_no_trouble(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.steps = [Act("plan", fails=1, lost_log=True, message="pod deleted")]
    assert submit(kfp, tiny, "--wait") == 1
    assert "FAILED: plan (pod deleted)\n    its log is gone" in capsys.readouterr().err


def test_a_canceled_run_is_no_success(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.steps = [Act("plan", polls=10**6)]
    once_running(kfp, lambda: kfp.terminate(next(iter(kfp.runs))))
    assert submit(kfp, tiny, "--wait") == 1
    assert "CANCELED" in capsys.readouterr().err


def test_a_run_that_vanishes_is_said(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.steps = [Act("plan", polls=10**6)]
    once_running(kfp, kfp.played.clear)
    assert submit(kfp, tiny, "--wait") == 1
    assert "was there and is gone" in capsys.readouterr().err


def test_an_api_that_restarts_is_waited_for(
    kfp: FakeKfp, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.steps = [Act("plan", polls=10**6)]
    told, once = threading.Event(), follow.Follower._once

    def noted(self: follow.Follower, what: str, line: str, key: str = "") -> None:
        once(self, what, line, key)
        if what == "api":
            told.set()

    def restart() -> None:
        kfp.stop()
        told.wait(60)  # longer than the patience of one request
        kfp.start()
        kfp.steps[0].polls = 1

    monkeypatch.setattr(follow.Follower, "_once", noted)
    once_running(kfp, restart)
    assert submit(kfp, tiny, "--wait") == 0
    said = capsys.readouterr().out
    assert "no answer, still trying" in said
    assert "SUCCEEDED" in said


def test_an_api_that_stays_away_ends_the_wait(
    kfp: FakeKfp, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "OUTAGE", 1.0)
    kfp.steps = [Act("plan", polls=10**6)]
    once_running(kfp, kfp.stop)
    assert submit(kfp, tiny, "--wait") == 1
    assert "no usable answer" in capsys.readouterr().err


def test_waiting_ends_in_time_and_the_run_goes_on(kfp: FakeKfp, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.steps = [Act("plan", polls=10**6)]
    assert submit(kfp, tiny, "--wait", "--timeout", "0.5") == 1
    assert "still RUNNING" in capsys.readouterr().out
    assert [told["state"] for told in kfp.runs.values()] == ["RUNNING"]


def test_interrupting_leaves_the_run_alone_and_says_how_to_come_back(
    kfp: FakeKfp, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow.Follower, "_show", interrupted)
    assert submit(kfp, tiny, "--wait") == 130
    (run,) = kfp.runs
    assert f"status {run}" in capsys.readouterr().err
    assert kfp.runs[run]["state"] in ("PENDING", "RUNNING")


def test_a_pod_that_nobody_starts_is_told_about(
    kfp: FakeKfp, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "STUCK", -5.0)
    nodes = kfp.nodes

    def pending(played: Any) -> dict[str, dict[str, Any]]:
        found = nodes(played)
        for each in found.values():
            if each["displayName"] == "executor" and each["phase"] == "Running":
                each |= {"phase": "Pending", "message": "0/1 nodes are available: Insufficient nvidia.com/gpu"}
        return found

    monkeypatch.setattr(kfp, "nodes", pending)
    kfp.steps = [Act("plan", polls=3)]
    assert submit(kfp, tiny, "--wait") == 0
    assert "plan                                     waiting for" in capsys.readouterr().out


# Retrying


@pytest.mark.parametrize(
    ("act", "retries", "asked", "says"),
    [
        (Act("plan", fails=2, log=["boom 1", "boom 2", ""]), 3, 2, "SUCCEEDED"),
        (Act("plan", fails=9, log="ValueError: boom"), 3, 1, "failed twice at the same place"),
        (Act("plan", fails=9, log=[f"boom {i}" for i in range(9)]), 3, 3, "3 of 3 retries are used up"),
        (Act("plan", fails=9, message="pod deleted", lost_log=True), 2, 2, "its pod was lost; retry 2 of 2"),
        (Act("plan", fails=2, message="pod deleted", lost_log=True), 3, 2, "SUCCEEDED"),
        (Act("plan", fails=1, log="distillery.errors.UserError: root 'x'"), 3, 0, "only a change helps"),
        (Act("plan", fails=1, log="distillery.errors.StoreRefused: wrong credentials"), 3, 0, "only a change helps"),
        (Act("plan", fails=1, log="distillery.errors.StoreError: no answer"), 3, 1, "SUCCEEDED"),
        (Act("verdict", fails=1, log="1 of 3 cells failed"), 3, 0, "only repeat the verdict"),
        (Act("verdict", fails=1, log="1 of 3 cells failed"), 3, 0, "another value of the parameter attempt"),
        (Act("plan", fails=9, message="OOMKilled (exit code 137)", lost_log=True), 3, 1, "failed twice"),
        (Act("cell/0/relabel", fails=1, driver=True, message="no node"), 1, 1, "SUCCEEDED"),
    ],
)
def test_retries(
    kfp: FakeKfp, tiny: str, act: Act, retries: int, asked: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.steps = [Act("prepare-data"), act]
    status = submit(kfp, tiny, "--wait", "--retries", str(retries))
    assert kfp.asked(":retry") == asked
    assert says in capsys.readouterr().out
    assert status == (0 if says == "SUCCEEDED" else 1)
    assert kfp.asked("POST /apis/v2beta1/runs$") == 1


def test_a_retry_whose_answer_is_lost_is_one_retry(kfp: FakeKfp, tiny: str) -> None:
    kfp.steps = [Act("plan", fails=1, log="boom")]
    kfp.fault("drop after", ":retry")
    assert submit(kfp, tiny, "--wait", "--retries", "2") == 0
    assert kfp.asked(":retry") == 1
    kfp.steps = [Act("plan", fails=1, log="boom")]
    kfp.fault("drop", ":retry")
    assert submit(kfp, tiny, "--again", "--wait", "--retries", "2") == 0
    assert kfp.asked(":retry") == 3


# What it needs


def test_the_commands_need_neither_kfp_nor_torch() -> None:
    barred = (
        "for name in ('kfp', 'kubernetes', 'kfp_server_api', 'requests', 'torch', 'google'): sys.modules[name] = None"
    )
    code = f"import sys\n{barred}\nimport pipelines.__main__ as m\nsys.exit(m.main(sys.argv[1:]))"
    with FakeKfp(steps=[Act("plan")]) as kfp:
        for words in (
            ["submit", "--wait", "--interval", "0.1"],
            ["status"],
            ["watch", "--once"],
            ["logs", "latest", "plan"],
            ["--help"],
        ):
            command = [sys.executable, "-c", code, *words]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "KF_PIPELINES_ENDPOINT": kfp.endpoint},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (words, done.stderr)
