"""A compiled package through kfp.local: `python -m pipelines.local_run PACKAGE OUT [NAME=VALUE...]`.

kfp.local replaces `print` and the root logger, interleaves its tasks' output and may leave that state behind, so it
gets a process of its own: `start` is what others use. It passes artifacts by path and ignores limits, secrets, volumes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent


def start(package: Path, out: Path, parameters: Dict[str, str], events: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a run in a child process that leads its own process group.

    Args:
        package: compiled pipeline (YAML).
        out: folder for the run's artifacts, one subfolder per run.
        parameters: pipeline parameters, strings.
        events: file that receives what the steps report, one JSON object per line.
        log: file that receives everything that is printed.
    """
    given = [f"{name}={value}" for name, value in parameters.items()]
    command = [sys.executable, "-m", "pipelines.local_run", str(package), str(out), *given]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(events), start_new_session=True
        )


def environment(events: Path) -> Dict[str, str]:
    """This process's environment, with what the steps of a local run need."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    half = max(1, cores // 2)  # kfp.local runs two cells at once
    wanted = {"OMP_NUM_THREADS": str(half), "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    # The package points HOME to /tmp for pods; here data fetched before shall be found.
    wanted["DISTILLERY_CACHE"] = str(Path("~/.cache/distillery").expanduser())
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**wanted, **os.environ, "PYTHONPATH": path, "DISTILLERY_EVENTS": str(events)}


def main(arguments: List[str]) -> None:
    """Run the package in this process; an unsuccessful run raises."""
    package, out, *given = arguments
    from kfp import components, local

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=out)
    pipeline = components.load_component_from_file(package)
    pipeline(**dict(each.split("=", 1) for each in given))


if __name__ == "__main__":
    main(sys.argv[1:])
