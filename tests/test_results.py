"""Tables of results are generated from committed runs, and every committed run is complete."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from distillery.config import Experiment, parse, read_yaml

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/results.csv"))


def test_the_tables_are_those_of_the_committed_runs() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_committed_run_says_what_was_asked_and_on_what(run: Path) -> None:
    text = (run / "experiment.yaml").read_text()
    asked = parse(Experiment, read_yaml(text, run.name), run.name)
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    cells = sum(len(choice.ipc) * len(choice.seeds) for choice in asked.methods)
    assert len(rows) == cells * len(asked.students)
    assert {row["status"] for row in rows} == {"ok"}
    about = json.loads((run / "environment.json").read_text())
    assert {row["hardware"] for row in rows} == {about["hardware"]}
    assert about["versions"]["torch"]
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    done = {e["cell"] for e in events if e.get("step") == "evaluate_student" and e.get("status") == "finished"}
    assert {row["cell"] for row in rows} <= done
