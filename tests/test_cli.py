"""What the small commands print."""

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
