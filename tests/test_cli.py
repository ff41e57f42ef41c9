"""What the small commands print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distillery import estimate, inspection
from distillery.artifact import finish
from distillery.errors import CorruptArtifact, UserError
from distillery.methods import METHODS


def test_methods_are_listed_and_explained() -> None:
    listed = inspection.methods().splitlines()
    assert [line.split()[0] for line in listed] == list(METHODS)
    told = inspection.method("rded")
    assert "mipc (int, default 300)" in told
    assert "num_crop" in told
    with pytest.raises(UserError, match="did you mean 'rded'"):
        inspection.method("rdedd")


def test_plan_estimates_every_cell() -> None:
    lines = estimate.table("demo").splitlines()
    assert lines[0].startswith("demo: 5 cells on ")
    assert sum("-ipc1-seed" in line for line in lines) == 5
    assert "together about" in lines[-1]


def test_inspect_checks_and_describes(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abc")
    finish(tmp_path, kind="labels", step="relabel", config={}, inputs={}, meta={"n": 3}, seconds=1.5, hardware="a cpu")
    told = inspection.describe(str(tmp_path))
    assert "labels, made by relabel" in told
    assert "x.bin  3 B" in told
    assert inspection.describe(tmp_path.as_uri()).splitlines()[1:] == told.splitlines()[1:]
    (tmp_path / "x.bin").write_bytes(b"abd")
    with pytest.raises(CorruptArtifact, match=r"x\.bin"):
        inspection.describe(str(tmp_path))


def test_help_names_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "distillery", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("check", "plan", "run", "inspect", "compare", "history", "methods"):
        assert command in done.stdout


def test_plan_works_times_out_for_another_machine() -> None:
    published = 2 * 1.814e9  # operations of a ResNet-18 at 224 px; torchvision counts multiply-adds
    speed = estimate._assumed("resnet18", {}, 1000, 224, tflops=1.0)
    assert speed.forward == pytest.approx(1e12 / published, rel=0.01)
    assert speed.training == pytest.approx(speed.forward / 3)
    slow, fast = (estimate.table("cifar10_fair", tflops) for tflops in (0.1, 0.2))
    assert "sustains 0.1 TFLOP/s (assumed)" in slow
    hours = [re.search(r"together about (\d+)h (\d+)m", text) for text in (slow, fast)]
    minutes = [60 * int(found[1]) + int(found[2]) for found in hours if found]
    assert minutes[0] == pytest.approx(2 * minutes[1], abs=2)
