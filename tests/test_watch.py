"""`python -m pipelines watch`: what it retries, what it leaves, and that it may be restarted at any time."""

import itertools

import pytest
from _kfp_api import Act, FakeKfp

from pipelines import watch as watching
from pipelines.__main__ import main
from pipelines.api import Client, connection
from pipelines.retry import Limits

SPEC = {"root": {"inputDefinitions": {"parameters": {"experiment": {"parameterType": "STRING"}}}}}


def client(kfp: FakeKfp) -> Client:
    """A client of that server."""
    return Client(connection(kfp.endpoint, patience=1))


def submit(kfp: FakeKfp, text: str = "a", group: str = "distill") -> str:
    """The id of a new run."""
    to = client(kfp)
    group_id = to.experiment(group, create=True)
    body = {"experiment_id": group_id, "display_name": text, "pipeline_spec": SPEC}
    return to.create_run({**body, "runtime_config": {"parameters": {"experiment": text}}}).id


def let_it_run(kfp: FakeKfp, *runs: str) -> list[str]:
    """Look at runs until they have ended; their states."""
    to = client(kfp)
    states = []
    for run in runs:
        states.append(next(known.state for _ in itertools.count() if (known := to.run(run)).ended))
    return states


def once(kfp: FakeKfp, *words: str) -> int:
    """One turn of the CronJob: each is a process of its own, so nothing is remembered in memory."""
    return main(["watch", "--once", "--endpoint", kfp.endpoint, "--patience", "1", "--backoff", "0", *words])


def play(kfp: FakeKfp, run: str, turns: int, *words: str) -> int:
    """So many turns of the CronJob, with a run that gets to its end in between; how many retries there were."""
    for _ in range(turns):
        let_it_run(kfp, run)
        assert once(kfp, *words) == 0
    return kfp.asked(":retry")


def test_nothing_to_do_is_no_trouble() -> None:
    with FakeKfp(steps=[Act("plan")]) as kfp:
        assert once(kfp) == 0  # the experiment is not even there
        run = submit(kfp)
        assert once(kfp) == 0
        assert let_it_run(kfp, run) == ["SUCCEEDED"]
        assert once(kfp) == 0
        assert kfp.asked(":retry") == 0


def test_lost_pods_are_retried_up_to_the_bound_by_whoever_looks() -> None:
    lost = Act("plan", fails=9, message="pod deleted", lost_log=True)
    with FakeKfp(steps=[lost]) as kfp:
        run = submit(kfp)
        assert play(kfp, run, 6, "--retries", "3") == 3
        assert kfp.runs[run]["state"] == "FAILED"


def test_a_run_that_recovers_succeeds() -> None:
    with FakeKfp(steps=[Act("plan", fails=2, message="pod deleted", lost_log=True)]) as kfp:
        run = submit(kfp)
        assert play(kfp, run, 4) == 2
        assert kfp.runs[run]["state"] == "SUCCEEDED"


def test_a_step_that_fails_again_without_progress_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(steps=[Act("prepare-data"), Act("plan", fails=9, log="ValueError: boom")]) as kfp:
        assert play(kfp, submit(kfp), 4, "--retries", "5") == 1
        assert "failed twice at the same place" in capsys.readouterr().out


def test_another_step_that_fails_after_progress_is_retried() -> None:
    steps = [Act("plan", fails=1, log="boom"), Act("prepare-data", fails=1, log="bang"), Act("report")]
    with FakeKfp(steps=steps) as kfp:
        run = submit(kfp)
        assert play(kfp, run, 4) == 2
        assert kfp.runs[run]["state"] == "SUCCEEDED"


def test_a_server_that_forgets_is_not_asked_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    lost = Act("plan", fails=9, message="pod deleted", lost_log=True)
    with FakeKfp(steps=[lost], forgets=True) as kfp:
        assert play(kfp, submit(kfp), 5) == 1
        assert "does not say how often" in capsys.readouterr().out
        run = submit(kfp, "b")
        watcher = watching.Watcher(client(kfp), "distill", Limits(3, 0), within=7)
        for _ in range(6):  # one process that stays remembers what it did
            let_it_run(kfp, run)
            watcher.look()
        assert kfp.asked(":retry") == 1 + 3


def test_what_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(steps=[Act("plan", fails=9, log="boom")]) as kfp:
        old, new, other = submit(kfp, "a"), submit(kfp, "a"), submit(kfp, "b", group="others")
        canceled = submit(kfp, "c")
        let_it_run(kfp, old, new, other, canceled)
        kfp.played[canceled].stopped = True  # Argo says failed of a run that somebody ended
        assert once(kfp) == 0
        retried = [path.split("/")[-1] for _, path, _ in kfp.requests if path.endswith(":retry")]
        assert retried == [f"{new}:retry"]
        assert "somebody canceled it" in capsys.readouterr().out
        kfp.runs[old]["created_at"] = kfp.runs[new]["created_at"] = "2026-01-01T00:00:00Z"
        let_it_run(kfp, new)
        assert once(kfp) == 0
        assert kfp.asked(":retry") == 1


def test_the_pause_is_kept() -> None:
    with FakeKfp(steps=[Act("plan", fails=9, log="boom")]) as kfp:
        run = submit(kfp)
        let_it_run(kfp, run)
        assert once(kfp, "--backoff", "600") == 0
        assert kfp.asked(":retry") == 0
        kfp.runs[run]["finished_at"] = "2026-01-01T00:00:00Z"
        assert once(kfp, "--backoff", "600") == 0
        assert kfp.asked(":retry") == 1


def test_one_runs_trouble_is_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp(steps=[Act("plan", fails=9, log="boom")]) as kfp:
        runs = [submit(kfp, text) for text in "ab"]
        let_it_run(kfp, *runs)
        kfp.fault("400", f"{runs[1]}:retry", times=9)
        assert once(kfp) == 0
        assert "the retry was refused" in capsys.readouterr().err
        assert [kfp.runs[run]["state"] for run in runs] == ["RUNNING", "FAILED"]


def test_logs_that_may_not_be_read_change_nothing() -> None:
    with FakeKfp(steps=[Act("plan", fails=9, log="boom")], logs=False) as kfp:
        assert play(kfp, submit(kfp), 4, "--retries", "5") == 1


def test_once_fails_when_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKfp() as kfp:
        kfp.stop()
        assert once(kfp) == 1
        assert kfp.endpoint in capsys.readouterr().err


def test_a_watch_that_stays_outlives_an_outage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeKfp(steps=[Act("plan", fails=1, log="boom")]) as kfp:
        run = submit(kfp)
        let_it_run(kfp, run)
        kfp.fault("503", times=30)
        naps = itertools.count()

        def nap(_: float) -> None:
            if kfp.asked(":retry"):
                raise KeyboardInterrupt
            assert next(naps) < 100

        monkeypatch.setattr(watching.time, "sleep", nap)
        words = ["watch", "--endpoint", kfp.endpoint, "--patience", "0", "--backoff", "0", "--interval", "0.01"]
        assert main(words) == 130
        assert "no usable answer" in capsys.readouterr().err
