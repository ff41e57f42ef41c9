"""What a person or a log collector sees while steps run.

`DISTILLERY_LOG` chooses the form on standard error: plain (default), quiet, or json (one object per line, for pods).
`DISTILLERY_EVENTS` names a file that receives every event as a JSON line, whatever the form.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from distillery.errors import UserError, choices
from distillery.files import disk

FORMS = ("plain", "quiet", "json")


def form() -> str:
    """The form asked for by the environment.

    Raises:
        UserError: unknown form.
    """
    asked = os.environ.get("DISTILLERY_LOG", "plain")
    if asked not in FORMS:
        raise UserError(f"DISTILLERY_LOG: {asked!r} is not one of {choices(FORMS)}")
    return asked


def emit(event: dict[str, Any]) -> None:
    """Show one event and append it to the events file."""
    if path := os.environ.get("DISTILLERY_EVENTS"):
        with disk(Path(path)), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3)} | event) + "\n")
    chosen = form()
    if chosen == "json":
        print(json.dumps(event), file=sys.stderr, flush=True)
    elif chosen == "plain" and (line := _line(event)):
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2s, 3m 05s, 2h 07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(count: float) -> str:
    """Bytes as people say them, in the binary units in which pods and caches are sized."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError(count)


def _line(event: dict[str, Any]) -> str:
    name = event.get("step", "")
    where = f"{name} {event['cell']}" if event.get("cell") else str(name)
    kind = event.get("event")
    if kind == "progress":
        known = ("event", "step", "cell", "done", "total", "eta")
        extra = "  ".join(f"{k} {v}" for k, v in event.items() if k not in known)
        eta = f"  eta {duration(event['eta'])}" if event.get("eta") else ""
        return f"  {where}: {event['done']}/{event['total']}{eta}  {extra}".rstrip()
    if kind == "note":
        return f"  {where}: {event['text']}"
    if kind == "step" and event["status"] != "started":
        tail = f"  {event['summary']}" if event.get("summary") else ""
        return f"{where}: {event['status']} in {duration(event['seconds'])}{tail}"
    return ""
