"""The compiled pipeline on real data, on this machine: `python -m pipelines.demo [--experiment NAME] [--out DIR]`.

Runs the committed package through kfp.local in a child process whose output goes to a log; shows one line per step, the
leaderboard and the path of the report. The exit status is 0 only when every step of every cell worked.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

from rich.console import Console
from rich.table import Table

from distillery.console import duration
from pipelines import local_run

PACKAGE = Path(__file__).with_name("distill_pipeline.yaml")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
LAST_LINES = 15
WORDS = ("student", "recipe", "method")
COLUMNS = ("ipc", *WORDS, "last %", "best %", "seeds", "vs random", "vs teacher")


def main(arguments: List[str]) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="demo", help="name of a shipped experiment, a YAML file or a URI")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for artifacts, log and report")
    asked = parser.parse_args(arguments)
    screen = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    out = asked.out.resolve()
    log, events, page = out / "log.txt", out / "events.jsonl", out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in (events, page):
            old.unlink(missing_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error}; choose a folder you may write to")
    screen.print(f"{asked.experiment}: {PACKAGE.name} through kfp.local; everything it prints goes to {log}\n")
    began = time.monotonic()
    child = local_run.start(PACKAGE, out / "steps", {"experiment": asked.experiment}, events, log)
    try:
        folder = watch(child, events, screen)
    except BaseException:
        stop(child)
        raise
    known = []
    if folder:
        shutil.copyfile(folder / "report.html", page)
        known = show(json.loads((folder / "summary.json").read_text(encoding="utf-8")), screen)
    worked = child.returncode == 0 and folder is not None
    if not worked and not known:
        explain(log, screen)
    where = f"report: {page}" if folder else f"log: {log}"
    screen.print(f"{duration(time.monotonic() - began)} in all; {where}", markup=False)
    return 0 if worked else 1


def watch(child: "subprocess.Popen[bytes]", events: Path, screen: Console) -> "Path | None":
    """Print a line for each finished step until the child ends; returns the report's folder, if one was made."""
    folder, began = None, time.time()
    with screen.status("plan") as status:
        for event in follow(child, events):
            name = " ".join(filter(None, [event.get("step"), event.get("cell")]))
            if event["event"] == "progress":
                status.update(f"{name} {event['done']}/{event['total']}")
            elif event.get("status") == "started":
                if event["step"] == "prepare_data":  # the step before it reports nothing itself
                    screen.print(planned(Path(event["path"]).parents[1], began))
                status.update(name)
            elif event["event"] == "step":
                said = event.get("summary", "")
                worked = "" if event["status"] == "finished" else f"{event['status']}: "
                screen.print(line(name, event["seconds"], f"{worked}{said}"), markup=False)
                folder = Path(event["path"]) if event["step"] == "report" else folder
    return folder


def follow(child: "subprocess.Popen[bytes]", events: Path) -> Iterator[Dict[str, Any]]:
    """Whole lines of the events file as they come, until the child has ended and the file is read."""
    position, ended = 0, False
    while not ended:
        ended = child.poll() is not None
        text = events.read_bytes()[position:] if events.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        position += len(whole)
        yield from map(json.loads, whole.splitlines())
        if not ended:
            time.sleep(0.2)


def planned(run: Path, began: float) -> str:
    """The line of `plan`, from what kfp.local keeps of it."""
    path = run / "plan" / "executor_output.json"
    count = len(json.loads(path.read_text(encoding="utf-8"))["parameterValues"]["Output"])
    return line("plan", path.stat().st_mtime - began, f"{count} cell{'s' * (count > 1)}")


def line(name: str, seconds: float, said: str) -> str:
    """One step as people see it."""
    return f"  {name:<42} {duration(seconds):>7}   {said}"


def show(summary: Dict[str, Any], screen: Console) -> List[str]:
    """The leaderboard, best first within an IPC and a student, and the failed cells, which are returned."""
    table = Table(box=None, header_style="bold", title="Leaderboard", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="left" if name in WORDS else "right")
    for row in summary["leaderboard"]:
        spread = "" if row["acc_last_std"] is None else f" +- {row['acc_last_std']:.2f}"
        tie = " (tie)" if row.get("tie_with_random") else ""
        beside = "" if row["to_random"] is None else f"{row['to_random']:+.2f}{tie}"
        last, best = f"{row['acc_last']:.2f}{spread}", f"{row['acc_best']:.2f}"
        words = (row["ipc"], row["student"], row["recipe"], row["method"], last, best, row["seeds"], beside)
        table.add_row(*map(str, words), f"{row['to_teacher']:+.2f}")
    screen.print()
    screen.print(table)
    for failure in summary["failures"]:
        screen.print(f"FAILED  {failure}", markup=False)
    screen.print()
    failures: List[str] = summary["failures"]
    return failures


def explain(log: Path, screen: Console) -> None:
    """The step that failed and the end of what it printed."""
    lines = [ANSI.sub("", text).rstrip() for text in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    fault = re.compile(r"Task '([^']+)' finished with status FAILURE")
    where = next((index for index, text in enumerate(lines) if fault.search(text)), len(lines))
    found = fault.search(lines[where]) if where < len(lines) else None
    name = found[1].replace("-", "_") if found else "the run, before or between its steps"
    screen.print(f"FAILED: {name}. The last lines it printed:", markup=False)
    for text in [text.strip() for text in lines[:where] if text.strip(" ^~")][-LAST_LINES:]:
        screen.print(f"    {text}", markup=False)


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End the child and the steps it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted; the steps were stopped", file=sys.stderr)
        sys.exit(130)
