"""`python -m pipelines schedule`: what a file may say, what is sent, and what is left when it dies half way."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml
from _kfp_api import FakeKfp
from test_submit import EXPERIMENT, PACKAGE, PLATFORM

from distillery.errors import UserError
from pipelines import cron, schedule_apply
from pipelines.__main__ import main
from pipelines.api import Client
from pipelines.schedule_file import next_time, read, timing

ROOT = Path(__file__).resolve().parent.parent
WITH_SCHEDULE = json.loads(json.dumps(PACKAGE))
WITH_SCHEDULE["root"]["inputDefinitions"]["parameters"]["schedule"] = {"parameterType": "STRING", "defaultValue": ""}
CREATE = "POST /apis/v2beta1/recurringruns$"


NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOON


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No schedule is exchanged near three or four o'clock, when those here fire: that would have to wait."""
    monkeypatch.setattr(schedule_apply, "datetime", Noon)


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    """A server."""
    with FakeKfp() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small package and an experiment."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump_all([PACKAGE, PLATFORM]))
    (tmp_path / "named.yaml").write_text(yaml.safe_dump_all([WITH_SCHEDULE, PLATFORM]))
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    return tmp_path


def write(folder: Path, *several: dict[str, Any], file: str = "schedule.yaml") -> str:
    """A file of schedules, each with what they all need."""
    usual = {"name": "nightly", "experiment": "mine.yaml", "package": "tiny.yaml"}
    filled = [{**usual, **({} if "interval" in each else {"cron": "0 0 3 * * *"}), **each} for each in several]
    (folder / file).write_text(yaml.safe_dump({"schedules": filled}, sort_keys=False))
    return str(folder / file)


def do(kfp: FakeKfp, *words: str) -> int:
    """The exit status of a command."""
    return main(["schedule", words[0], "--endpoint", kfp.endpoint, "--patience", "0.5", *words[1:]])


def apply(kfp: FakeKfp, file: str, *words: str) -> int:
    """The exit status of `apply`."""
    return do(kfp, "apply", file, "--yes", *words)


def only(kfp: FakeKfp) -> dict[str, Any]:
    """The one recurring run."""
    (known,) = kfp.recurring.values()
    return known


def sent(kfp: FakeKfp) -> list[dict[str, Any]]:
    """The recurring runs that were asked for."""
    return [body for method, path, body in kfp.requests if (method, path) == ("POST", "/apis/v2beta1/recurringruns")]


# Cron


@pytest.mark.parametrize(
    ("text", "after", "fires"),  # as github.com/robfig/cron v1.2.0 has them
    [
        ("0 0 3 * * *", "2026-11-21T16:00:00", "2026-11-22T03:00:00 2026-11-23T03:00:00"),
        ("0 */15 9-17 * * MON-FRI", "2026-11-21T16:00:00", "2026-11-23T09:00:00 2026-11-23T09:15:00"),
        ("30 0 3 1 * 1", "2026-11-21T16:00:00", "2026-11-23T03:00:30 2026-11-30T03:00:30 2026-12-01T03:00:30"),
        ("0 0 3 ? * sun", "2026-11-21T16:00:00", "2026-11-22T03:00:00 2026-11-29T03:00:00"),
        ("*/20 * * * * *", "2026-11-21T23:59:50", "2026-11-22T00:00:00 2026-11-22T00:00:20"),
        ("0 0 3 31 * *", "2026-11-21T16:00:00", "2026-12-31T03:00:00 2027-01-31T03:00:00 2027-03-31T03:00:00"),
        ("0 0 0 29 2 *", "2026-11-21T16:00:00", "2028-02-29T00:00:00 2032-02-29T00:00:00"),
        ("0 5/25 12 * * *", "2026-11-21T16:00:00", "2026-11-22T12:05:00 2026-11-22T12:30:00 2026-11-22T12:55:00"),
        ("0 0 3 1,15 JAN-FEB ?", "2026-11-21T16:00:00", "2027-01-01T03:00:00 2027-01-15T03:00:00"),
        ("5 0 22-23 */10 12 *", "2026-11-21T16:00:00", "2026-12-01T22:00:05 2026-12-01T23:00:05 2026-12-11T22:00:05"),
        ("0 0 4 * * 2-6/2", "2026-11-21T16:00:00", "2026-11-24T04:00:00 2026-11-26T04:00:00 2026-11-28T04:00:00"),
    ],
)
def test_cron_fires_when_the_schedulers_library_says(text: str, after: str, fires: str) -> None:
    now = datetime.fromisoformat(after).replace(tzinfo=UTC)
    for expected in fires.split():
        found = cron.parse(text).next(now)
        assert found == datetime.fromisoformat(expected).replace(tzinfo=UTC)
        now = found


def test_cron_that_never_fires() -> None:
    assert cron.parse("0 0 0 31 2 *").next(datetime(2026, 11, 21, tzinfo=UTC)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 3 * * *", r"5 fields.*write '0 0 3 \* \* \*' \(at 03:00, every day\)"),
        ("0 3 * * 7", r"write '0 0 3 \* \* 0' \(at 03:00, only on Sunday\)"),
        ("0 0 3 * * 7", "'7' as day of the week; allowed are 0 to 6.*Sunday is 0"),
        ("0 0 24 * * *", "'24' as hours; allowed are 0 to 23"),
        ("0 0 3 0 * *", "'0' as day of the month"),
        ("0 0 3 * * * 2026", "7 fields"),
        ("0 0 3 L * *", "'L' as day of the month"),
        ("0 0 3 * FEBRUARY *", "'FEBRUARY' as month.*jan, feb"),
        ("0 0 17-9 * * *", "'17-9' runs backwards"),
        ("0 */0 * * * *", "the step '0' as minutes"),
        ("0 0 3,, * * *", "'' as hours"),
        ("0 0 3 */2 * 1", "read differently"),
        ("@daily", r"write '0 0 0 \* \* \*'"),
        ("@every 6h", "interval: 6h"),
        ("", "0 fields"),
    ],
)
def test_wrong_cron_says_what_is_right(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cron.parse(text)


@pytest.mark.parametrize(
    ("trigger", "words"),
    [
        ({"cron_schedule": {"cron": "0 0 3 * * *"}}, "at 03:00, every day (UTC)"),
        ({"cron_schedule": {"cron": "0 30 4 ? * 1-5"}}, "at 04:30, Monday through Friday (UTC)"),
        ({"cron_schedule": {"cron": "30 0 3 1 * 1"}}, "at 03:00:30, on day 1 of the month, or on Monday (UTC)"),
        ({"periodic_schedule": {"interval_second": "5400"}}, "every 1h30m"),
        ({"cron_schedule": {"cron": "not ours"}}, "cron 'not ours'"),
        ({}, "never"),
    ],
)
def test_words(trigger: dict[str, Any], words: str) -> None:
    assert timing(trigger, "UTC") == words


def test_next_time_knows_zone_bounds_and_phase() -> None:
    now = datetime(2026, 7, 1, 12, tzinfo=UTC)
    trigger = {"cron_schedule": {"cron": "0 0 3 * * *", "end_time": "2026-07-02T01:00:00Z"}}
    assert next_time(trigger, "Europe/Berlin", now) == datetime(2026, 7, 2, 1, tzinfo=UTC)  # 03:00 there
    assert next_time(trigger, "UTC", now) is None
    periodic = {"periodic_schedule": {"interval_second": "3600", "start_time": "1970-01-01T00:00:00Z"}}
    assert next_time(periodic, "UTC", now, now - timedelta(minutes=20)) == now + timedelta(minutes=40)
    later = {"cron_schedule": {"cron": "0 0 3 * * *", "start_time": "2026-12-01T00:00:00Z"}}
    assert next_time(later, "UTC", now) == datetime(2026, 12, 1, 3, tzinfo=UTC)


# What is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"corn": "0 0 3 * * *"}, "corn: unknown key; did you mean 'cron'"),
        ({"cron": "0 3 * * *"}, r"nightly: cron '0 3 \* \* \*': 5 fields"),
        ({"interval": "6h", "cron": "0 0 3 * * *"}, "both cron and interval"),
        ({"interval": "6 hours"}, "90m, 6h, 7d"),
        ({"interval": 0}, "an interval has at least one"),
        ({"interval": 1.5}, "interval"),
        ({"max_concurrency": 11}, "max_concurrency.*10, got 11"),
        ({"start": "tomorrow"}, "start.*2026-12-01T03:00:00Z"),
        ({"start": "2026-12-01T03:00:00"}, "without its zone"),
        ({"start": "2027-01-02T00:00:00Z", "end": "2027-01-01T00:00:00Z"}, "ends .* before it starts"),
        ({"end": "2020-01-01T00:00:00Z"}, "never fires"),
        ({"cron": "0 0 0 31 2 *"}, "never fires"),
        ({"timezone": "Mars/Base"}, "is no time zone"),
        ({"enabled": "yes"}, "enabled"),
        ({"name": "my nightly"}, "name"),
        ({"parameters": {"cuont": 1}}, "cuont.*did you mean 'count'"),
        ({"parameters": {"count": "three"}}, "count='three': the pipeline wants a whole number"),
        ({"parameters": {"flag": "on"}}, "flag='on': the pipeline wants true or false"),
        ({"experiment": "missing.yaml"}, "missing.yaml"),
        ({"set": {"methods.0.ipc": [0]}}, "ipc"),
        ({"set": {"dataset.nome": "digits"}}, "did you mean 'name'"),
        ({"package": "mine.yaml"}, "no compiled pipeline"),
    ],
)
def test_mistakes_are_named_and_nothing_is_sent(
    kfp: FakeKfp, folder: Path, given: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(kfp, write(folder, {"name": "fine"}, given)) == 2
    assert re.search(says, capsys.readouterr().err, re.DOTALL)
    assert not [path for method, path, _ in kfp.requests if method != "GET"]


def test_a_name_stands_once(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(kfp, write(folder, {}, {"interval": "6h"})) == 2
    assert "nightly stands there more than once" in capsys.readouterr().err


def test_a_key_written_twice_is_refused(kfp: FakeKfp, folder: Path) -> None:
    (folder / "s.yaml").write_text("name: a\nname: b\n")
    assert apply(kfp, str(folder / "s.yaml")) == 2


def test_the_example_is_fine() -> None:
    nightly, weekly = read(ROOT / "pipelines" / "schedules" / "nightly.yaml")
    assert (nightly.name, nightly.timing, nightly.enabled) == ("nightly", "at 03:00, every day (UTC)", True)
    assert weekly.body["trigger"]["periodic_schedule"]["interval_second"] == str(7 * 86400)
    assert "s3://data/cifar10" in weekly.body["runtime_config"]["parameters"]["experiment"]
    assert not weekly.enabled


# What is sent


def test_what_a_schedule_sends(kfp: FakeKfp, folder: Path) -> None:
    given = {
        "interval": "1d12h",
        "start": "2026-12-01T01:00:00+01:00",
        "set": {"methods.0.ipc": [2]},
        "parameters": {"count": 3, "rate": 0.5, "flag": True, "tolerations": [{"key": "gpu"}]},
        "queue": "gpus",
        "parallelism": 2,
        "cache": False,
        "experiment_name": "group",
        "max_concurrency": 2,
        "catchup": True,
        "service_account": "me",
        "pipeline_root": "s3://b/p",
    }
    assert apply(kfp, write(folder, given)) == 0
    (body,) = sent(kfp)
    known = only(kfp)
    parameters = body["runtime_config"]["parameters"]
    experiment = yaml.safe_load(parameters.pop("experiment"))
    assert experiment["methods"] == [{"method": "random", "ipc": [2]}]
    assert parameters == {"count": 3, "rate": 0.5, "flag": True, "tolerations": [{"key": "gpu"}]}
    assert body["runtime_config"]["pipeline_root"] == "s3://b/p"
    periodic = {"interval_second": str(36 * 3600), "start_time": "2026-12-01T00:00:00Z"}
    assert body["trigger"] == {"periodic_schedule": periodic}
    assert (body["max_concurrency"], body["no_catchup"], body["service_account"]) == (2, False, "me")
    assert body["mode"] == "DISABLE"
    assert known["status"] == "ENABLED"
    assert kfp.experiments[known["experiment_id"]]["display_name"] == "group"
    pod = body["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-plan"]
    assert pod["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert set(body) <= set(kfp_server_api.V2beta1RecurringRun.attribute_map.values())
    assert len(known["description"]) < 255  # a column of the server's database


def test_a_file_may_hold_one_schedule(kfp: FakeKfp, folder: Path) -> None:
    text = "name: a.b_c\nexperiment: mine.yaml\npackage: tiny.yaml\ncron: 0 0 3 * * *\n"
    (folder / "s.yaml").write_text(text + "start: 2026-12-01T00:00:00Z\nenabled: false\n")  # YAML makes it a time
    assert apply(kfp, str(folder / "s.yaml")) == 0
    assert only(kfp)["trigger"]["cron_schedule"] == {"cron": "0 0 3 * * *", "start_time": "2026-12-01T00:00:00Z"}
    assert only(kfp)["runtime_config"]["parameters"]["experiment"] == EXPERIMENT
    assert only(kfp)["status"] == "DISABLED"


@pytest.mark.parametrize(("package", "known"), [("tiny.yaml", False), ("named.yaml", True)])
def test_the_run_learns_its_schedule_where_the_pipeline_asks(
    kfp: FakeKfp, folder: Path, package: str, known: bool
) -> None:
    assert apply(kfp, write(folder, {"package": package})) == 0
    assert only(kfp)["runtime_config"]["parameters"].get("schedule") == ("nightly" if known else None)


def test_many_users(folder: Path) -> None:
    with FakeKfp(multi_user=True, namespaces=("team",)) as server:
        file = write(folder, {})
        assert main(["schedule", "apply", file, "--yes", "--endpoint", server.endpoint]) == 2
        assert main(["schedule", "apply", file, "--yes", "--endpoint", server.endpoint, "-n", "team"]) == 0
        assert only(server)["namespace"] == "team"


# Differences


def test_applied_twice_changes_nothing(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(folder, {"parameters": {"count": 3.0}}, {"name": "often", "interval": 90, "enabled": False})
    assert apply(kfp, file) == 0
    before = json.dumps(kfp.recurring)
    asked = kfp.asked("POST|DELETE")
    assert apply(kfp, file) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert (json.dumps(kfp.recurring), kfp.asked("POST|DELETE")) == (before, asked)
    assert do(kfp, "diff", file, "--exit-code") == 0


def test_a_dry_run_shows_and_sends_nothing(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(folder, {})
    assert do(kfp, "apply", file, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "+ nightly: new\n    at 03:00, every day (UTC)\n" in said
    assert not kfp.asked("POST|DELETE")
    assert (do(kfp, "diff", file), do(kfp, "diff", file, "--exit-code")) == (0, 1)


def test_each_difference_is_shown(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(kfp, write(folder, {"parameters": {"count": 3, "rate": 1.0}}, {"name": "same"})) == 0
    capsys.readouterr()
    changed = {"cron": "0 0 4 * * *", "parameters": {"count": 4, "rate": 1}, "catchup": True, "enabled": False}
    (folder / "mine.yaml").write_text(EXPERIMENT.replace("ipc: [1]", "ipc: [1, 10]"))
    (folder / "old.yaml").write_text(EXPERIMENT)
    file = write(folder, {**changed, "max_concurrency": 2}, {"name": "same", "experiment": "old.yaml"})
    assert do(kfp, "diff", file) == 0
    assert capsys.readouterr().out.splitlines() == [
        "~ nightly: changed",
        "    enabled: true -> false",
        "    cron: 0 0 3 * * * -> 0 0 4 * * *",
        "    max_concurrency: 1 -> 2",
        "    catchup: false -> true",
        "    count: 3 -> 4",
        "    experiment:",
        "      --- server",
        "      +++ file",
        "      @@ -2,4 +2,4 @@",
        "       dataset: {name: digits}",
        "       teacher: {net: convnet3, epochs: 1}",
        "      -methods: [{method: random, ipc: [1]}]",
        "      +methods: [{method: random, ipc: [1, 10]}]",
        "       students: [{net: convnet3, recipe: fair-soft}]",
        "= same: unchanged",
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"queue": "gpus"}, "package, queue, parallelism, cache: "),
        ({"timezone": "Europe/Berlin"}, "timezone: UTC -> Europe/Berlin"),
        ({"experiment_name": "other"}, "experiment_name: distill -> other"),
        ({"interval": "6h"}, "interval: (none) -> 21600"),
        ({"service_account": "me"}, "service_account: (none) -> me"),
    ],
)
def test_other_differences(
    kfp: FakeKfp, folder: Path, given: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(kfp, write(folder, {})) == 0
    first = only(kfp)["recurring_run_id"]
    file = write(folder, given)
    assert apply(kfp, file) == 0
    assert f"    {says}" in capsys.readouterr().out
    assert only(kfp)["recurring_run_id"] != first
    assert do(kfp, "diff", file, "--exit-code") == 0


def test_only_switched_where_nothing_else_differs(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {})) == 0
    first = only(kfp)["recurring_run_id"]
    assert apply(kfp, write(folder, {"enabled": False})) == 0
    assert (only(kfp)["recurring_run_id"], only(kfp)["status"]) == (first, "DISABLED")
    assert kfp.asked(CREATE) == 1


def test_what_the_file_does_not_name_goes_only_when_asked(
    kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(kfp, write(folder, {}, {"name": "nightly-2"})) == 0
    theirs = {"display_name": "theirs", "experiment_id": next(iter(kfp.experiments)), "pipeline_spec": PACKAGE}
    kfp.new_recurring({**theirs, "max_concurrency": 1, "mode": "ENABLE"})
    file = write(folder, {})
    assert apply(kfp, file) == 0
    assert "--prune deletes it" in capsys.readouterr().out
    assert {known["display_name"] for known in kfp.recurring.values()} == {"nightly", "nightly-2", "theirs"}
    assert apply(kfp, file, "--prune") == 0
    assert {known["display_name"] for known in kfp.recurring.values()} == {"nightly", "theirs"}


def test_nobody_to_ask(kfp: FakeKfp, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert do(kfp, "apply", write(folder, {})) == 2
    assert not kfp.recurring


# Changing one, and dying on the way


class Killed(BaseException):
    """The process ends here: nothing it had planned is done."""


def watched(monkeypatch: pytest.MonkeyPatch, kfp: FakeKfp, lives: int) -> list[tuple[int, int]]:
    """Let so many changes through, then none; returns (schedules, those on) after each change."""
    seen: list[tuple[int, int]] = []
    send = Client._send

    def watch(self: Client, method: str, *rest: Any) -> Any:
        if method != "GET" and len(seen) >= lives:
            raise Killed
        answer = send(self, method, *rest)
        if method != "GET":
            on = sum(known["status"] == "ENABLED" for known in kfp.recurring.values())
            seen.append((len(kfp.recurring), on))
        return answer

    monkeypatch.setattr(Client, "_send", watch)
    return seen


@pytest.mark.parametrize("lives", range(5))
def test_dying_at_any_point_leaves_a_schedule_that_fires_once_and_is_repaired(
    kfp: FakeKfp, folder: Path, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    assert apply(kfp, write(folder, {})) == 0
    file = write(folder, {"cron": "0 0 4 * * *"})
    with monkeypatch.context() as patch:
        seen = watched(patch, kfp, lives)
        if lives < 4:
            with pytest.raises(Killed):
                apply(kfp, file)
        else:
            assert apply(kfp, file) == 0
        assert len(seen) == lives
    assert all(count >= 1 and on <= 1 for count, on in seen)
    left = [known["display_name"] for known in kfp.recurring.values()]
    assert left in (["nightly"], ["nightly", "nightly"])
    with monkeypatch.context() as patch:
        seen = watched(patch, kfp, 99)
        assert apply(kfp, file) == 0
    assert all(count >= 1 and on <= 1 for count, on in seen)
    assert (only(kfp)["status"], only(kfp)["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", "0 0 4 * * *")


def test_a_copy_left_behind_is_not_switched_on_late(
    kfp: FakeKfp, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(kfp, write(folder, {})) == 0
    file = write(folder, {"cron": "0 0 4 * * *"})
    with monkeypatch.context() as patch:
        watched(patch, kfp, 1)
        with pytest.raises(Killed):
            apply(kfp, file)
    left = {key for key, known in kfp.recurring.items() if known["status"] == "DISABLED"}
    assert do(kfp, "list") == 0
    assert "half done: 2 recurring runs" in capsys.readouterr().out
    assert do(kfp, "resume", "nightly") == 2  # which one?
    assert apply(kfp, file) == 0
    assert only(kfp)["recurring_run_id"] not in left  # it would fire at once, for times that the old one has had


def test_a_server_that_refuses_the_new_one_keeps_the_old_one_on(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {})) == 0
    (first,) = kfp.recurring
    file = write(folder, {"cron": "0 0 4 * * *"})
    kfp.fault("500", ":enable")
    assert apply(kfp, file) == 1
    assert {key for key, known in kfp.recurring.items() if known["status"] == "ENABLED"} == {first}
    assert apply(kfp, file) == 0
    assert only(kfp)["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * *"


def test_a_lost_answer_to_enable_does_not_bring_the_old_one_back(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {})) == 0
    (first,) = kfp.recurring
    kfp.fault("drop after", ":enable", times=99)
    assert apply(kfp, write(folder, {"cron": "0 0 4 * * *"})) == 1
    assert {key for key, known in kfp.recurring.items() if known["status"] == "ENABLED"}.isdisjoint({first})
    assert sum(known["status"] == "ENABLED" for known in kfp.recurring.values()) == 1


@pytest.mark.parametrize("fault", ["drop", "drop after", "503"])
def test_a_lost_answer_to_create_makes_no_second_one(kfp: FakeKfp, folder: Path, fault: str) -> None:
    kfp.fault(fault, CREATE)
    assert apply(kfp, write(folder, {})) == 0
    assert only(kfp)["status"] == "ENABLED"


def test_nothing_is_exchanged_while_it_fires(
    kfp: FakeKfp, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(schedule_apply.time, "sleep", slept.append)
    assert apply(kfp, write(folder, {"cron": "5 0 12 * * *"})) == 0
    assert not slept  # there was nothing to exchange
    assert apply(kfp, write(folder, {"cron": "0 0 0 1 1 *"})) == 0
    assert "waiting until that is over" in capsys.readouterr().out
    assert slept == [5 + schedule_apply.GUARD]
    assert apply(kfp, write(folder, {"cron": "*/5 * * * * *"})) == 0
    assert apply(kfp, write(folder, {"cron": "*/7 * * * * *"})) == 0
    assert len(slept) == 1  # there is no quiet moment


def test_a_run_that_is_going_outlives_its_schedule(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {})) == 0
    run = kfp.fire(only(kfp)["recurring_run_id"])
    kfp.look(run)
    assert apply(kfp, write(folder, {"cron": "0 0 4 * * *"})) == 0
    assert do(kfp, "delete", "nightly", "--yes") == 0
    assert (kfp.recurring, kfp.runs[run]["state"]) == ({}, "RUNNING")


def test_an_older_server_would_end_it_so_the_schedule_stays_off_until_then(
    kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.version = "2.15.0"
    assert apply(kfp, write(folder, {})) == 0
    (first,) = kfp.recurring
    run = kfp.fire(first)
    file = write(folder, {"cron": "0 0 4 * * *"})
    assert apply(kfp, file) == 0
    assert "Kubeflow 2.15.0 would end it" in capsys.readouterr().out
    assert sorted(known["status"] for known in kfp.recurring.values()) == ["DISABLED", "ENABLED"]
    assert kfp.recurring[first]["status"] == "DISABLED"
    kfp.runs[run]["state"] = "SUCCEEDED"
    assert apply(kfp, file) == 0
    assert only(kfp)["status"] == "ENABLED"


# The other commands


def test_list_says_when_and_how_the_last_run_went(
    kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do(kfp, "list") == 0
    assert "no schedules" in capsys.readouterr().out
    assert apply(kfp, write(folder, {}, {"name": "often", "interval": "6h"}, {"name": "off", "enabled": False})) == 0
    often = next(key for key, known in kfp.recurring.items() if known["display_name"] == "often")
    kfp.skew -= 3600
    run = kfp.fire(often)
    kfp.runs[run]["state"] = "FAILED"
    capsys.readouterr()
    assert do(kfp, "list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["nightly"]["next"].endswith("T03:00:00Z")
    assert (rows["nightly"]["last"], rows["nightly"]["state"]) == ("", "")
    assert (rows["often"]["run"], rows["often"]["state"]) == (run, "FAILED")
    fired = datetime.fromisoformat(rows["often"]["last"])
    assert datetime.fromisoformat(rows["often"]["next"]) == fired + timedelta(hours=6)
    assert (rows["off"]["enabled"], rows["off"]["next"]) == (False, "")
    assert do(kfp, "list") == 0
    said = capsys.readouterr().out
    assert "nightly: on, at 03:00, every day (UTC)\n" in said
    assert "off: paused, at 03:00, every day (UTC)\n  next none; last none\n" in said


def test_pause_and_resume(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(folder, {}, {"name": "other"})
    assert apply(kfp, file) == 0
    assert do(kfp, "pause", "nightly") == 0
    assert {known["display_name"]: known["status"] for known in kfp.recurring.values()} == {
        "nightly": "DISABLED",
        "other": "ENABLED",
    }
    assert do(kfp, "pause", file) == 0
    assert "nightly: was paused already\nother: paused\n" in capsys.readouterr().out
    assert do(kfp, "resume", file) == 0
    assert {known["status"] for known in kfp.recurring.values()} == {"ENABLED"}
    assert "Kubeflow starts a run" not in capsys.readouterr().out
    assert do(kfp, "pause", "nightly") == 0
    for known in kfp.recurring.values():
        known["updated_at"] = "2026-01-01T00:00:00Z"
    assert do(kfp, "resume", "nightly") == 0
    assert "Kubeflow starts a run for the time that it missed last, now" in capsys.readouterr().out


def test_run_now_starts_what_the_schedule_would(kfp: FakeKfp, folder: Path) -> None:
    file = write(folder, {"parameters": {"count": 3}, "pipeline_root": "s3://b/p", "enabled": False})
    assert apply(kfp, file) == 0
    kfp.fault("drop after", "POST .*runs$")
    assert do(kfp, "run-now", "nightly", "--wait", "--interval", "0.01") == 0
    (run,) = kfp.runs.values()
    assert run["state"] == "SUCCEEDED"
    for key in ("pipeline_spec", "runtime_config", "service_account", "experiment_id"):
        assert run[key] == only(kfp)[key]
    assert only(kfp)["status"] == "DISABLED"
    assert do(kfp, "run-now", "nightly") == 0
    assert len(kfp.runs) == 2  # asked for twice


def test_delete_a_name_or_all_of_a_file(kfp: FakeKfp, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(folder, {}, {"name": "other"})
    assert apply(kfp, file) == 0
    assert do(kfp, "delete", "nightli", "--yes") == 1
    assert "did you mean 'nightly'" in capsys.readouterr().err
    assert do(kfp, "delete", file, "--yes") == 0
    assert not kfp.recurring


@pytest.mark.parametrize("command", [["list"], ["apply"], ["pause", "nightly"], ["run-now", "nightly"]])
def test_an_api_that_is_not_there(
    kfp: FakeKfp, folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.stop()
    assert do(kfp, *command, *([write(folder, {}), "--yes"] if command == ["apply"] else [])) == 1
    assert "is the address right" in capsys.readouterr().err


def test_looking_needs_neither_kfp_nor_torch(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {})) == 0
    barred = "for name in ('kfp', 'kubernetes', 'kfp_server_api', 'requests', 'torch'): sys.modules[name] = None"
    code = f"import sys\n{barred}\nfrom pipelines.__main__ import main\n" + "".join(
        f"assert main({['schedule', words[0], '--endpoint', kfp.endpoint, *words[1:]]}) == 0\n"
        for words in (["list"], ["pause", "nightly"], ["run-now", "nightly"])
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_kfps_own_command_reads_what_was_made(kfp: FakeKfp, folder: Path) -> None:
    assert apply(kfp, write(folder, {"parameters": {"count": 3}}, {"name": "often", "interval": "6h"})) == 0
    often = next(key for key, known in kfp.recurring.items() if known["display_name"] == "often")

    def ask(*words: str) -> Any:
        program = str(Path(sys.executable).with_name("kfp"))
        command = [program, "--endpoint", kfp.endpoint, "--output", "json", "recurring-run", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout[done.stdout.index("[" if words[0] == "list" else "{") :])

    assert {row["display_name"]: row["status"] for row in ask("list")} == {"nightly": "ENABLED", "often": "ENABLED"}
    one = ask("get", often)
    assert (one["recurring_run_id"], one["max_concurrency"], one["no_catchup"]) == (often, "1", True)
    assert one["trigger"]["periodic_schedule"]["interval_second"] == "21600"
