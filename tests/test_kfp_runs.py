"""`python -m pipelines status | logs | cancel`."""

import json
from collections.abc import Iterator

import pytest
from _kfp_api import Act, FakeKfp

from pipelines.__main__ import main
from pipelines.api import Client, connection

SPEC = {"root": {}}
STEPS = [
    Act("plan", log="planned\n"),
    Act("cell/0/synthesize", log="zero\n"),
    Act("cell/1/synthesize", fails=1, log="one\n\x1b[31mValueError: boom\x1b[0m\n"),
]


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    """A server with a script that fails in its third step."""
    with FakeKfp(steps=STEPS) as server:
        yield server


def run(kfp: FakeKfp, name: str = "mine", looks: int = 20) -> str:
    """The id of a run that has been looked at so often."""
    to = Client(connection(kfp.endpoint, patience=1))
    group = to.experiment("distill", create=True)
    known = to.create_run({"experiment_id": group, "display_name": name, "pipeline_spec": SPEC})
    for _ in range(looks):
        to.run(known.id)
    return known.id


def ask(kfp: FakeKfp, *words: str) -> int:
    """The exit status of a command."""
    return main([*words, "--endpoint", kfp.endpoint, "--patience", "1"])


def test_status_lists_runs_newest_first(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(kfp, "status") == 0
    assert capsys.readouterr().out == "no runs\n"
    first, second = run(kfp, "one"), run(kfp, "two", looks=0)
    assert ask(kfp, "status", "-e", "distill") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0:2] for line in lines] == [[second, "PENDING"], [first, "FAILED"]]
    assert ask(kfp, "status", "--last", "1", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["id"], told["state"], told["failures"]) == (second, "PENDING", 0)
    assert ask(kfp, "status", "-e", "nix") == 1


def test_status_of_one_run_shows_its_steps(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    known = run(kfp)
    for name in (known, known[:8], "mine", "latest"):
        assert ask(kfp, "status", name) == 0
        said = capsys.readouterr().out
        assert f"mine: FAILED\n  run {known}" in said
        assert [line.split()[0:2] for line in said.splitlines()[3:]] == [
            ["plan", "SUCCEEDED"],
            ["cell/0/synthesize", "SUCCEEDED"],
            ["cell/1/synthesize", "FAILED"],
        ]
        assert said.endswith("Error (exit code 1)\n")
    assert ask(kfp, "status", known, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"][2]["path"] == "cell/1/synthesize"


def test_status_works_where_the_workflow_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(steps=STEPS, old_api=False) as kfp:
        assert ask(kfp, "status", run(kfp)) == 0
        assert "synthesize" in capsys.readouterr().out


def test_a_run_that_nobody_knows_is_the_users_mistake(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("latest", "mine", "00000000-0000-4000-8000-000000000000"):
        assert ask(kfp, "status", name) == 2
        assert name in capsys.readouterr().err
    run(kfp, "twin"), run(kfp, "twin")
    assert ask(kfp, "logs", "twin") == 2
    assert "2 runs" in capsys.readouterr().err


def test_logs_of_what_failed_of_one_step_and_of_all_turns(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    known = run(kfp)
    assert ask(kfp, "logs", known) == 0
    assert capsys.readouterr().out == "one\nValueError: boom\n"
    assert ask(kfp, "logs", known, "plan") == 0
    assert capsys.readouterr().out == "planned\n"
    assert ask(kfp, "logs", known, "synthesize") == 0
    heads = "== cell/0/synthesize ==\nzero\n== cell/1/synthesize ==\none\nValueError: boom\n"
    assert capsys.readouterr().out == heads
    assert ask(kfp, "logs", known, "relabel") == 2
    assert "steps: plan, cell/0/synthesize" in capsys.readouterr().err


def test_logs_that_are_gone_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(steps=[Act("prepare-data", cached=True), Act("plan", fails=1, lost_log=True)]) as kfp:
        known = run(kfp)
        assert ask(kfp, "logs", known) == 0
        assert "== plan == no log" in capsys.readouterr().err
        assert ask(kfp, "logs", known, "prepare_data") == 0
        assert "KFP reused" in capsys.readouterr().err


def test_logs_are_followed_to_the_end_of_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [Act("plan", polls=6, log="a\nb\n"), Act("report", polls=10**6)]
    with FakeKfp(steps=steps) as kfp:
        known = run(kfp, looks=0)
        assert ask(kfp, "logs", known, "plan", "--follow", "--interval", "0.01") == 0
        assert capsys.readouterr().out == "a\nb\n"
        assert kfp.runs[known]["state"] == "RUNNING"


def test_a_run_is_canceled_once(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    known = run(kfp, looks=1)
    assert ask(kfp, "cancel", "mine") == 0
    assert f"canceled\n  run {known}" in capsys.readouterr().out
    assert ask(kfp, "status", known) == 0
    assert "CANCELED" in capsys.readouterr().out
    assert ask(kfp, "cancel", known) == 0
    assert "has ended already (CANCELED)" in capsys.readouterr().out
    assert kfp.asked(":terminate") == 1
