"""The references of the benchmarks do the same mathematics as the library, and the benchmarks run."""

import json
from pathlib import Path

import pytest

from benchmarks import recover
from distillery.device import choose
from distillery.errors import UserError

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
        "ours": 1,
        "ours, bf16, other arithmetic": 1,
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
