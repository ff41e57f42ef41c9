"""The references of the benchmarks do the same mathematics as the library, and the benchmarks run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import carry_over, recover, student_training
from distillery import run
from distillery.device import choose
from distillery.errors import UserError
from distillery.teacher import Card, Frozen

CASES = ["sre2l:2x4", "dwa:2x4", "delt:2x6"]
IPC = 3  # fewer than DELT's rounds, so that some rounds bring no new image


def small(case: str) -> recover.Setting:
    """A case on a ConvNet-2 of 8 channels at 8 px."""
    return recover.setting(recover.Case.parse(case, IPC), "convnet2", choose("cpu", "fp32"), size=8, width=8)


@pytest.mark.parametrize("case", CASES)
def test_the_recover_loop_and_its_plain_reference_make_the_same_images(case: str) -> None:
    steps = recover.ROUNDS + 1  # every round of DELT, and one step more
    ours, _ = recover.compare(small(case).doubled(), steps)
    assert ours["max"] < 1e-5
    single, _ = recover.compare(small(case), steps)
    assert single["grey_levels_max"] <= 1


def test_the_reference_notices_another_method() -> None:
    run = small("sre2l:1x4")
    given, plan = recover.start(run, run.groups[0], 5), run.plan(5, 0)
    base = recover.reference(run, given, plan)
    other = recover.dataclasses.replace
    for change in ({"first_bn": 1.0}, {"lambda_var": 2.0}, {"lr": 0.2}, {"ascent": 3, "rho": 0.5}):
        assert recover.apart(recover.reference(run, given, other(plan, **change)), base)["max"] > 1e-2, change
    assert recover.apart(recover.reference(run, given, other(plan, priors=False)), base)["max"] < 1e-3


def test_recover_leaves_a_result(tmp_path: Path) -> None:
    command = "--nets convnet2 --size 8 --ipc 4 --steps 8 --repeats 1 --compared 8 --exact 8 --device cpu"
    recover.main([*command.split(), "--cases", "sre2l:2x4", "dwa:2x4", "--precision", "bf16", "--out", str(tmp_path)])
    exact, _, packed, dwa = json.loads((tmp_path / "metrics.json").read_text())
    assert exact["exact"] == "sre2l"
    assert exact["max"] < 1e-5
    assert packed["groups"] == {
        "reference": 1,
        "ours": 2,
        "ours, bf16, other arithmetic": 2,
        "ours, packed as on a GPU": 2,
    }
    assert set(packed["ways"]) == set(packed["groups"])
    assert dwa["ways"]["reference"]["times_reference"] == 1
    assert "reference, weights frozen" in dwa["ways"]
    assert json.loads((tmp_path / "config.json").read_text())["weights"] == "random"
    assert "ours, bf16, other arithmetic" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("case", ["mtt:1x10", "sre2l:10", "delt:1x4"])
def test_recover_refuses_other_cases(case: str) -> None:
    with pytest.raises(UserError, match=case):
        recover.Case.parse(case, IPC)


DIGITS = """
name: toy
dataset: {name: digits, per_class: 10}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [1, 2]}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: fair-hard, epochs: 1}}
"""


def test_statistics_are_those_of_the_given_images() -> None:
    card = Card("toy", {}, ["a", "b"], 2, [0.5] * 3, [0.5] * 3, 0.5, 0.5, [], [])
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    images = torch.full((600, 3, 4, 4), 255, dtype=torch.uint8)  # more than two batches; 1 after normalisation
    images[::2] = 0  # -1
    found = carry_over.with_statistics(net, Frozen(net, card, choose("cpu", "fp32")), images)
    assert torch.equal(net[0].running_mean, torch.zeros(3)), "the net itself stays as it is"
    assert torch.allclose(found[0].running_mean, torch.zeros(3), atol=1e-6)
    assert torch.allclose(found[0].running_var, torch.ones(3), atol=2e-3)
    assert not found.training


def test_carry_over_leaves_a_result(tmp_path: Path) -> None:
    assert run.run(DIGITS, str(tmp_path / "run")).failures == []
    asked = ["--net", "convnet1", "--epochs", "2", "--images", "40", "--device", "cpu", "--ipc", "2"]
    carry_over.main([str(tmp_path / "run"), *asked, "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"]
    assert (row["method"], row["ipc"], row["epochs"]) == ("random", 2, 2)
    assert all(0 < row[way] < 1 for way in carry_over.WAYS)
    assert f"| random | 2 | 0 | {100 * row['as trained']:.1f} |" in (tmp_path / "out" / "report.md").read_text()
    for wrong, said in (
        (["--methods", "cda"], "no set of cda"),
        (["--net", "resnet20"], "option norm"),
        (["--recipe", "fair-hard"], "soft"),
    ):
        with pytest.raises(UserError, match=said):
            carry_over.main([str(tmp_path / "run"), *wrong, "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_student_training_leaves_a_result(tmp_path: Path) -> None:
    asked = ["--dataset", "digits", "--root", "", "--net", "convnet1", "--ipc", "2", "--teacher-epochs", "1"]
    asked += ["--epochs", "2", "--seeds", "1", "--val-every", "4", "--device", "cpu", "--precision", "fp32"]
    student_training.main([*asked, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "result.json").read_text())
    assert all(found["seconds"][loop][part] > 0 for loop in ("ours", "textbook") for part in ("training", "validation"))
    assert all(0 <= found["accuracy"][loop]["mean"] <= 1 for loop in ("ours", "textbook"))
    assert "| textbook |" in (tmp_path / "README.md").read_text()
