"""Run an experiment and keep what backs its numbers as one result folder.

    python benchmarks/accuracy.py cifar10_convnet3 --out docs/results/2026-11-21_cifar10_convnet3 \\
        --work runs/cifar10 --set dataset.root=data/cifar10

The folder holds experiment.yaml, results.csv, report.md, summary.json, log.jsonl (every event of every run in the work
folder) and environment.json (hardware, versions, code). Start it again after an interruption: it continues.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from distillery import experiment, run
from distillery.code_version import code_version
from distillery.device import Compute, choose, hardware

KEPT = ("results.csv", "report.md", "summary.json")


def main() -> None:
    """Run, then copy what belongs to the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="shipped name or YAML file")
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    parser.add_argument("--work", required=True, help="where artifacts go (folder or s3://); an earlier run continues")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value")
    asked = parser.parse_args()
    text, _ = experiment.read(experiment.override(asked.experiment, asked.set))
    done = run.run(text, asked.work)
    keep(text, done.report, Path(asked.work), asked.out)
    print((asked.out / "report.md").read_text())
    sys.exit(1 if done.failures else 0)


def keep(text: str, report: Path, work: Path, out: Path) -> None:
    """Copy the evidence: what was asked, what came out, on what."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "experiment.yaml").write_text(text)
    for name in KEPT:
        shutil.copyfile(report / name, out / name)
    if (work / "log.jsonl").exists():
        shutil.copyfile(work / "log.jsonl", out / "log.jsonl")
    wanted = experiment.load(text)
    about = environment(choose(wanted.device, wanted.precision))
    (out / "environment.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def environment(compute: Compute) -> dict[str, object]:
    """Hardware, versions and code of this process."""
    names = ("torch", "torchvision", "numpy", "safetensors", "pydantic")
    return {
        "hardware": hardware(compute),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: metadata.version(name) for name in names},
        "code_version": code_version(),
    }


if __name__ == "__main__":
    main()
