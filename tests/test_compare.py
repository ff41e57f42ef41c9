"""Runs side by side: the test over seeds, what counts as worse, and what the command line prints."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _records import TEXT, cell, failed, record, seeds
from hypothesis import given
from hypothesis import strategies as st

from distillery import compare, history
from distillery.__main__ import main
from distillery.errors import CorruptArtifact, UserError
from distillery.history.record import RECORD, Record
from distillery.regress import entries, judge, largest_drop, welch


def test_welch_against_hand_arithmetic() -> None:
    # Variances 2 and 2 of two values each: t = -4 / sqrt(2), 2 degrees of freedom, where p has a closed form.
    t = 4 / math.sqrt(2)
    assert welch([1.0, 3.0], [5.0, 7.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_welch_where_there_is_no_spread_or_one_value() -> None:
    assert welch([5.0], [5.0, 6.0]) is None
    assert welch([5.0, 5.0], [5.0, 5.0, 5.0]) == 1.0
    assert welch([5.0, 5.0], [4.0, 4.0]) == 0.0


@given(*[st.lists(st.floats(0, 100), min_size=2, max_size=5)] * 2)
def test_welch_is_a_probability_and_symmetric(one: list[float], other: list[float]) -> None:
    p = welch(one, other)
    assert p is not None
    assert 0 <= p <= 1
    assert welch(other, one) == pytest.approx(p)


def kinds(before: Record, now: Record) -> list[str]:
    """What is flagged."""
    return [found.kind for found in judge(before, now)]


def runs(old: tuple[float, ...], new: tuple[float, ...], **changes: Any) -> tuple[Record, Record]:
    """Two runs of one method with these accuracies; `changes` of the second."""
    return record("a", 0, seeds("rded", *old)), record("b", 1, seeds("rded", *new), **changes)


@pytest.mark.parametrize(
    ("old", "new", "flagged"),
    [
        ((0.50, 0.51, 0.52), (0.40, 0.41, 0.42), True),
        ((0.40, 0.41, 0.42), (0.50, 0.51, 0.52), False),  # better
        ((0.50, 0.55, 0.60), (0.48, 0.53, 0.58), False),  # inside the noise
        ((0.500, 0.5001, 0.5002), (0.496, 0.4961, 0.4962), False),  # beyond the noise, but under half a point
        ((0.500, 0.5001, 0.5002), (0.494, 0.4941, 0.4942), True),
        ((0.50,), (0.481,), False),  # one seed: under two points
        ((0.50,), (0.479,), True),
        ((0.50, 0.51, 0.52), (0.48,), True),  # one side with one seed
        ((0.50, 0.50), (0.49, 0.49), True),  # no spread at all
    ],
)
def test_accuracy_is_lower_only_beyond_the_noise(old: tuple[float, ...], new: tuple[float, ...], flagged: bool) -> None:
    assert kinds(*runs(old, new)) == ["accuracy"] * flagged


def test_texts_say_how_it_is_known_and_what_else_differs() -> None:
    (found,) = judge(*runs((0.50, 0.51, 0.52), (0.40, 0.41, 0.42), code_version="0.1.0+b"))
    assert found.text.startswith("rded, IPC 10, convnet1, fair-soft, digits: 51.00 -> 41.00 %, 10.00 points lower")
    assert "(Welch's p " in found.text
    assert found.text.endswith(" (different besides: code version)")
    assert (found.before, found.after) == (0.51, 0.41)
    (alone,) = judge(*runs((0.50,), (0.40,)))
    assert "(one seed, so anything above 2 points counts; 1 and 1 seeds)" in alone.text
    assert alone.text.endswith(" (nothing else is known to differ)")


@pytest.mark.parametrize(
    ("before", "after", "hardware", "flagged"),
    [
        (20.0, 31.0, "a cpu", True),
        (20.0, 29.0, "a cpu", False),  # not 1.5 times as long
        (20.0, 31.0, "a gpu", False),  # other hardware
        (0.5, 4.0, "a cpu", False),  # seconds
        (20.0, 20.0, "a cpu", False),  # kept
        (31.0, 20.0, "a cpu", False),  # faster
    ],
)
def test_slower_counts_on_the_same_hardware_and_above_seconds(
    before: float, after: float, hardware: str, flagged: bool
) -> None:
    old = record("a", 0, seeds("rded", 0.5, 0.5, seconds={"synthesize": before}))
    new = record("b", 1, seeds("rded", 0.5, 0.5, seconds={"synthesize": after}, hardware=hardware))
    found = judge(old, new)
    assert [each.kind for each in found] == ["slower"] * flagged
    if flagged:
        assert found[0].text.startswith("synthesize of rded, IPC 10, digits: 20.0 -> 31.0 s, 1.6 times as long")
        assert (found[0].before, found[0].after) == (20.0, 31.0)


def test_steps_that_cells_share_are_judged_once() -> None:
    old, slow = record("a"), {"train_teacher": 200.0, "synthesize": 60.0}
    assert [found.entry for found in judge(old, record("b", steps=slow))] == ["train_teacher"]
    assert not judge(old, record("b", steps=slow, hardware=("a gpu",)))


def test_images_change_with_a_reason_or_are_flagged() -> None:
    old = record("a")
    cells = tuple(replace(each, images_sha256="others") for each in old.cells[:2]) + old.cells[2:]
    (found,) = judge(old, record("b", cells=cells, code_version="0.1.0+b", hardware=("a gpu",)))
    assert found.kind == "images"
    assert "the images of rded-ipc10-seed0, rded-ipc10-seed1 changed under an equal configuration" in found.text
    assert "different besides: code version, hardware" in found.text
    assert (found.before, found.after) == (3, 2)
    assert not judge(old, record("b", cells=cells, config_sha256="1" * 64)), "another configuration is a reason"
    unknown = tuple(replace(each, images_sha256="") for each in old.cells)
    assert not judge(old, record("b", cells=unknown)), "what is not known has not changed"


def test_only_what_both_runs_have_is_judged() -> None:
    old = record("a", cells=[*seeds("rded", 0.5, 0.51), failed("random")])
    new = record("b", cells=[*seeds("random", 0.1, 0.11), failed("rded")])
    assert judge(old, new) == []
    assert largest_drop(old, new) == 0.0
    assert largest_drop(*runs((0.5, 0.6), (0.4, 0.45))) == pytest.approx(12.5)


def test_options_tell_entries_apart_only_where_a_run_has_both() -> None:
    def of(*factors: int) -> Record:
        return record(cells=[cell(acc=0.1 * f, id=f"c{f}", options={"factor": f, "crop": {"num": 1}}) for f in factors])

    names = [[key.method for key in own] for own in entries([of(1), of(2)])]
    assert names == [["rded"], ["rded"]], "the option is what the comparison is about"
    names = [[key.method for key in own] for own in entries([of(1, 2), of(2)])]
    assert names == [["rded factor=1", "rded factor=2"], ["rded factor=2"]]


def test_teachers_tell_entries_apart_only_where_a_run_has_several() -> None:
    one = record(cells=[cell(), cell(id="other", teacher="resnet18")])
    found = entries([one, record()])
    assert {key.teacher for own in found for key in own} == {"convnet1", "resnet18"}
    assert {key.teacher for own in entries([record(), record()]) for key in own} == {""}


def test_configurations_differ_by_key_path_with_every_value() -> None:
    other = TEXT.replace("epochs: 2", "epochs: 5").replace("methods:", "methods:\n  - {method: random, ipc: [2]}")
    found = compare.configurations([TEXT, other, TEXT.replace("name: toy", "name: other")])
    assert found["teachers[convnet1].epochs"] == [2, 5, 2]
    assert found["methods[random].ipc"] == [None, [2], None]
    assert not [path for path in found if path.startswith(("methods[rded]", "name"))]
    assert compare.configurations([TEXT, TEXT.replace("name: toy", "name: toy # a comment")]) == {}


def test_a_configuration_of_another_version_is_compared_as_it_was_written() -> None:
    found = compare.configurations([TEXT, TEXT.replace("labels", "x") + "new_key: {a: 1}\n"])
    assert found == {"new_key.a": [None, 1]}
    assert "text" in compare.configurations([TEXT, "no mapping: ["])


def test_compare_tells_results_apart_and_warns() -> None:
    a = record("a", 0, [*seeds("rded", 0.50, 0.51, 0.52), cell("random", acc=0.3)])
    b = record("b", 1, [*seeds("rded", 0.40, 0.41, 0.42), cell("random", acc=0.35)], code_version="0.1.0+b")
    c = record("c", 2, [*seeds("rded", 0.50, 0.51, 0.53), *seeds("median", 0.2, 0.2)], config="other: 1")
    found = compare.compare([a, b, c])
    verdicts = {r["method"]: [o and o["verdict"] for o in r["against_first"]] for r in found["results"]}
    one = "cannot be told with 1 seed"
    assert verdicts == {"rded": ["lower", "no difference shown"], "random": [one, None], "median": [None, None]}
    assert found["tests"] == 2
    assert json.loads(json.dumps(found)) == found
    text = compare.text(found)
    assert "51.00 +- 1.00 (3)" in text
    assert "Code version: A: 0.1.0+a; B: 0.1.0+b; C: 0.1.0+a" in text
    assert "B differs from A in: code version" in text
    assert "Hardware: a cpu" in text
    assert "2 tests at p < 0.05: about 0.1 would show a difference by chance" in text
    alike = compare.text(compare.compare([a, replace(a, config_sha256="1" * 64)]))
    assert "written the same, but what methods or recipes fill in differs" in alike
    assert "none of the runs has any" in compare.text(compare.compare([record(cells=[failed()])] * 2))
    with pytest.raises(UserError, match="1 runs"):
        compare.compare([a])


def test_recipes_of_one_preset_stand_beside_each_other_unless_a_run_has_two() -> None:
    def of(*recipes: str) -> Record:
        return record(cells=[cell(seed=seed, recipe=recipe) for seed, recipe in enumerate(recipes)])

    def rows(*records: Record) -> list[str]:
        return sorted({result["recipe"] for result in compare.compare(records)["results"]})

    assert rows(of("rded(epochs=1)"), of("rded(epochs=2)")) == ["rded"]
    assert rows(of("rded(epochs=1)", "rded"), of("rded(epochs=2)")) == ["rded", "rded(epochs=1)", "rded(epochs=2)"]
    assert judge(of("rded(epochs=9)"), of("rded(epochs=2)")) == [], "but nothing is called worse then"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A store with three records, and a report with one."""
    for number, run in enumerate(("nightly-1", "nightly-2", "weekly-1")):
        history.enter(str(tmp_path), record(run, number), lambda before, now: [])
    (tmp_path / "run" / "6-report").mkdir(parents=True)
    (tmp_path / "run" / "6-report" / RECORD).write_bytes(record("local").json())
    place = tmp_path / "kfp" / "report" / "0b1e" / "summary"
    place.mkdir(parents=True)
    (place / RECORD).write_bytes(record("cluster").json())
    return tmp_path


def test_runs_are_found_by_folder_report_record_uri_and_id(kept: Path) -> None:
    places = {
        "run": "local",
        "run/6-report": "local",
        "run/6-report/record.json": "local",
        "kfp": "cluster",
        "history/20261121T000001Z-nightly-2.json": "nightly-2",
    }
    for place, run in places.items():
        assert compare.find(str(kept / place)).run == run
        assert compare.find((kept / place).as_uri()).run == run
    assert compare.find("nightly-2", str(kept)).run == "nightly-2"
    assert compare.find("wee", str(kept)).run == "weekly-1"


@pytest.mark.parametrize(
    ("run", "place", "said"),
    [
        ("nightly", "{}", "2 runs begin so: nightly-1, nightly-2"),
        ("monthly", "{}", "no run begins so"),
        ("{}/nothing", "", "no record of a run there"),
        ("{}/history/nothing.json", "", "there is no such record"),
    ],
)
def test_what_cannot_be_found_says_what_to_give(kept: Path, run: str, place: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare.find(run.format(kept), place.format(kept))


def test_a_damaged_record_is_named(kept: Path) -> None:
    (kept / "run" / "6-report" / RECORD).write_text("{")
    with pytest.raises(CorruptArtifact, match=r"6-report/record\.json"):
        compare.find(str(kept / "run"))


def test_the_list_shows_state_best_and_what_got_worse(tmp_path: Path) -> None:
    assert compare.listing(str(tmp_path)).endswith("0 runs")
    cells = [*seeds("random", 0.6, 0.61), *seeds("rded", 0.5, 0.52)]
    history.enter(str(tmp_path), record("a", 0, cells), judge)
    worse = [*seeds("random", 0.6, 0.61), *seeds("rded", 0.1, 0.12), failed("median")]
    history.enter(str(tmp_path), record("b", 60, worse, experiment="toy"), judge)
    history.enter(str(tmp_path), record("c", 120, [failed()], experiment="other"), judge)
    (tmp_path / "history" / "half.json").write_text("{")
    head, a, b, c, said = compare.listing(str(tmp_path)).splitlines()
    assert head.split()[:3] == ["finished", "(UTC)", "experiment"]
    assert "rded IPC 10 convnet1: 51.00 %" in a, "not the baseline, though it is better"
    assert b.split()[-2:] == ["1", "b"]
    assert "1 of 5 failed" in b
    assert "1 of 1 failed" in c
    assert said.endswith("3 runs; 1 objects are no records of this version")
    told = json.loads(compare.listing(str(tmp_path), "other", as_json=True))
    assert [line["run"] for line in told["runs"]] == ["c"]
    assert told["unreadable"] == 1


def test_the_commands_print_and_tell_mistakes_by_their_status(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distillery", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    monkeypatch.chdir(kept)

    status, text = said("compare", "run", "kfp")
    assert (status, "Configuration: the same" in text) == (0, True), text
    status, text = said("compare", "--json", "--history", ".", "nightly-1", "weekly", "run/6-report")
    assert (status, [each["run"] for each in json.loads(text)["runs"]]) == (0, ["nightly-1", "weekly-1", "local"])
    status, text = said("history", ".", "--experiment", "toy")
    assert (status, text.count("nightly")) == (0, 2)
    status, text = said("compare", "run")
    assert (status, "give 2 to 26" in text) == (2, True)
