"""Hardware profiles: what each step asks for, and that a GPU which was asked for must be there."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from distillery import device, methods, profiles, run, steps
from distillery.__main__ import app
from distillery.config import Cell, parse
from distillery.errors import UserError
from distillery.profiles import CELL_STEPS, PROFILES, Ask

EXPERIMENT = """
name: small
dataset: {name: digits, per_class: 4}
teacher: {net: convnet1, net_options: {width: 4}, epochs: 1, batch: 32}
methods:
  - {method: random, ipc: [1]}
  - {method: rded, ipc: [1], options: {mipc: 4}, shards: 2}
students: [{net: convnet1, net_options: {width: 4}, recipe: {preset: fair-soft, epochs: 1}}]
"""
STORED = EXPERIMENT + "labels: {mode: stored}\n"
HARD = STORED.replace("fair-soft", "fair-hard")
WITH_GPUS = [name for name, row in PROFILES.items() if row.images.gpus]


def asks(text: str, **pods: str) -> dict[tuple[str, str], Ask]:
    """(method, step) -> what its pod asks for."""
    return {
        (cell["method"], step): Ask(*(cell[f"{step}_{one.name}"] for one in fields(Ask)))
        for cell in steps.plan(text, pods=pods)
        for step in CELL_STEPS
    }


def devices(text: str, **pods: str) -> tuple[str, str]:
    """The devices that the teachers' and the cells' pods are told."""
    (one,) = steps.plan_teachers(steps.upstream(text, pods=pods)["gather_teachers"]["experiment"], pods=pods)
    found = {cell["device"] for cell in steps.plan(text, pods=pods)}
    (own,) = [line for line in one["experiment"].splitlines() if line.startswith("{")]
    return json.loads(own)["device"], found.pop() if len(found) == 1 else str(found)


def test_profiles_are_the_five_and_well_formed() -> None:
    assert list(PROFILES) == ["cpu", "a10", "a100", "h100", "mixed"]
    for name, row in PROFILES.items():
        for ask in vars(row).values():
            assert profiles.CPU.match(ask.cpu), name
            assert profiles.MEMORY.match(ask.memory), name
        assert not row.light.gpus + row.data.gpus, f"{name}: steps that need no GPU ask for none"
        assert bool(row.images.gpus) == bool(row.students.gpus), f"{name}: a cell has one device"
    assert PROFILES["mixed"].images == PROFILES["a100"].images
    assert PROFILES["mixed"].students == PROFILES["a10"].students


@pytest.mark.parametrize("profile", PROFILES)
def test_steps_that_need_no_gpu_ask_for_none(profile: str) -> None:
    row = PROFILES[profile]
    found = asks(EXPERIMENT, profile=profile)
    assert found == asks(f"{EXPERIMENT}profile: {profile}\n"), "the parameter and the experiment say the same"
    assert found["random", "synthesize"] == found["rded", "gather_pieces"] == found["rded", "relabel"] == row.light
    assert found["rded", "synthesize"] == row.images
    assert found["random", "evaluate_student"] == found["rded", "evaluate_student"] == row.students
    assert asks(STORED, profile=profile)["random", "relabel"] == row.students
    assert asks(HARD, profile=profile)["random", "relabel"] == row.light, "hard labels are nobody's work"


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_methods_needs_travel_in_its_cells(method: str) -> None:
    text = EXPERIMENT.replace("{method: random, ipc: [1]}", f"{{method: {method}, ipc: [2]}}")
    text = text.replace("net: convnet1, net_options: {width: 4}, epochs: 1, batch: 32", "net: resnet18_modified")
    text = text.replace("rded, ipc: [1], options: {mipc: 4}, shards: 2", "median, ipc: [1]")
    found = asks(text, profile="a100")[method, "synthesize"]
    assert bool(found.gpus) == methods.find(method).NEEDS.gpu


def test_gathering_works_where_statistics_are_asked_for() -> None:
    wmdd = EXPERIMENT.replace("{method: random, ipc: [1]}", "{method: wmdd, ipc: [1]}")
    assert steps.upstream(EXPERIMENT, pods={"profile": "a10"})["gather_teachers"]["gpus"] == ""
    assert steps.upstream(wmdd, pods={"profile": "a10"})["gather_teachers"]["gpus"] == "1"


def test_values_given_by_hand_replace_the_profiles() -> None:
    found = asks(STORED, profile="a100", cell_cpu="3", cell_memory="5Gi", cell_gpus="2")
    assert found["rded", "synthesize"] == found["random", "relabel"] == Ask("3", "5Gi", "2")
    assert found["random", "synthesize"] == Ask("3", "5Gi", ""), "a number of GPUs is for steps that use one"
    data = steps.upstream(STORED, pods={"data_memory": "1Ti"})["prepare_data"]
    assert (data["cpu"], data["memory"]) == (PROFILES["cpu"].data.cpu, "1Ti")
    (teacher,) = steps.plan_teachers(STORED, pods={"teacher_cpu": "500m", "teacher_gpus": "1"})
    assert (teacher["cpu"], teacher["gpus"]) == ("500m", "1")
    assert asks(EXPERIMENT, cell_gpus="1")["rded", "synthesize"].gpus == "1", "under the profile cpu too"


def test_the_device_follows_what_is_asked_for() -> None:
    for profile in WITH_GPUS:
        assert devices(EXPERIMENT, profile=profile) == ("cuda", "cuda")
        assert devices(f"{EXPERIMENT}device: cpu\n", profile=profile) == ("cpu", "cpu")
        assert not any(ask.gpus for ask in asks(f"{EXPERIMENT}device: cpu\n", profile=profile).values())
    assert devices(EXPERIMENT) == ("auto", "auto"), "as on this machine"
    assert devices(EXPERIMENT, teacher_gpus="1") == ("cuda", "auto")
    assert devices(EXPERIMENT, profile="a10", cell_gpus="0") == ("cuda", "cpu")
    assert devices(f"{EXPERIMENT}device: cuda\n") == ("cuda", "cuda")
    assert asks(f"{EXPERIMENT}device: cuda\n")["rded", "synthesize"].gpus == "1", "else it could never run"


def test_runs_on_this_machine_take_no_notice_of_the_profile() -> None:
    (cell, _), (there, _) = steps.plan(f"{EXPERIMENT}profile: a100\n"), steps.plan(EXPERIMENT, pods={"profile": "a100"})
    assert cell["device"] == "auto"
    assert cell | {"device": "cuda"} == there


@pytest.mark.parametrize(
    ("pods", "said"),
    [
        ({"profile": "a10O"}, "profile: 'a10O' is unknown; did you mean"),
        ({"cell_cpu": "four"}, "cell_cpu: 'four' is no such quantity"),
        ({"teacher_memory": "16 GB"}, "teacher_memory: '16 GB'"),
        ({"cell_gpus": "-1"}, "cell_gpus: '-1'"),
        ({"cell_gpus": "0.5"}, "cell_gpus: '0.5'"),
    ],
)
def test_impossible_requests_stop_in_plan(pods: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        steps.plan(EXPERIMENT, pods=pods)
    assert said in str(caught.value)


def test_no_gpu_beside_device_cuda_is_a_contradiction() -> None:
    for name, step in (("cell_gpus", steps.plan), ("teacher_gpus", steps.upstream)):
        with pytest.raises(UserError, match=f"{name}: '0' beside device: cuda"):
            step(f"{EXPERIMENT}device: cuda\n", pods={name: "0"})


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that sees no GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_pods_without_the_gpu_they_asked_for_fail_at_once(tmp_path: Path, without_cuda: None) -> None:
    done = run.run(f"{EXPERIMENT}device: cpu\n", str(tmp_path / "run"))
    assert done.failures == []
    (data,), (teachers,) = (tmp_path / "run").glob("1-data/*"), (tmp_path / "run").glob("2-teachers/all-*")
    random, rded = steps.plan(EXPERIMENT, pods={"profile": "a10"})
    assert steps.synthesize(random, data, teachers, tmp_path / "random").kind == "synthetic", "it needs none"
    said = "asks for a GPU.*sees no CUDA device.*profile cpu"
    with pytest.raises(UserError, match=said):
        steps.synthesize(rded, data, teachers, tmp_path / "rded")
    with pytest.raises(UserError, match=said):
        steps.evaluate_student(random, data, teachers, tmp_path / "random", tmp_path / "labels", tmp_path / "result")
    upstream = steps.upstream(EXPERIMENT, pods={"profile": "a10"})["gather_teachers"]["experiment"]
    with pytest.raises(UserError, match=said):
        steps.train_teacher(upstream, "convnet1", data, tmp_path / "teacher")
    assert not (tmp_path / "rded").exists()


def test_putting_pieces_together_names_cuda_without_having_it(tmp_path: Path, without_cuda: None) -> None:
    run.run(f"{EXPERIMENT}device: cpu\n", str(tmp_path / "run"))
    (data,), (teachers,) = (tmp_path / "run").glob("1-data/*"), (tmp_path / "run").glob("2-teachers/all-*")
    _, rded = steps.plan(EXPERIMENT, pods={"profile": "a10"})
    config: dict[str, Any] = steps.synthetic_spec(rded, data, teachers, working=False).config
    assert (config["device"], config["precision"]) == ("cuda", "bf16"), "the key of what the pieces' pods made"


def test_each_step_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str], without_cuda: None) -> None:
    steps.prepare_data(EXPERIMENT, tmp_path / "data")
    steps.train_teacher(EXPERIMENT, "convnet1", tmp_path / "data", tmp_path / "teacher")
    assert f"train_teacher: device auto: {device.hardware(device.choose())}" in capsys.readouterr().err


def test_the_command_line_prints_each_pods_request() -> None:
    said = CliRunner().invoke(app, ["plan", EXPERIMENT, "--set", "profile=mixed"])
    assert said.exit_code == 0, said.output
    lines = [" ".join(line.split()) for line in said.output.partition("pods under profile mixed")[2].splitlines()]
    row = PROFILES["mixed"]
    for wanted in (
        f"prepare_data {row.data}",
        f"train_teacher {row.teachers}",
        f"synthesize {row.light} (random)",
        f"synthesize {row.images} (rded)",
        f"gather_pieces {row.light}",
        f"evaluate_student {row.students}",
    ):
        assert wanted in lines


def test_cells_as_kfp_sends_them_keep_their_requests() -> None:
    cell = steps.plan(EXPERIMENT, pods={"profile": "h100"})[1]
    there = parse(Cell, json.loads(json.dumps(cell), parse_int=float), "cell")
    assert there.synthesize_memory == PROFILES["h100"].images.memory
