"""Where the numbers come from: what was asked for, and the hashes of everything that was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from distillery.report.load import Outcome, Row

MOST_CELLS = 300
MOST_TEXT = 40_000


def configuration(outcomes: Sequence[Outcome]) -> str:
    """What all cells share, and where they differ, as YAML."""
    cells = [o.cell for o in outcomes if o.cell]
    if not cells:
        return ""
    shared = [key for key in cells[0] if key != "id" and all(cell[key] == cells[0][key] for cell in cells)]
    common = yaml.safe_dump({key: cells[0][key] for key in shared}, sort_keys=False, width=100)
    differing = [{k: v for k, v in cell.items() if k not in shared} for cell in cells]
    return common + yaml.safe_dump({"cells": differing}, sort_keys=False, default_flow_style=None, width=100)


def recipes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every recipe as it was resolved, name and YAML; then every method's options."""
    trained = {(f"{row.recipe} recipe", row.recipe_values, f"{row.student} at IPC {row.ipc}") for row in rows}
    made = {(f"{row.method} options", row.options, f"IPC {row.ipc}") for row in rows if row.options != "{}"}
    found: list[tuple[str, str]] = []
    for group in (trained, made):
        same: dict[tuple[str, str], list[str]] = {}
        for name, values, where in sorted(group):
            same.setdefault((name, values), []).append(where)
        found += [(f"{name}, {_joined(places)}", _yaml(values)) for (name, values), places in same.items()]
    return found


def hashes(outcomes: Sequence[Outcome], config: str) -> dict[str, Any]:
    """What all cells come from, and each cell's own artifacts: sha256 of their content."""
    made = [o for o in outcomes if o.fingerprint]
    shared: dict[str, list[str]] = {}
    for name in ("data", "teacher"):
        found = {print_ for o in made for key, print_ in o.inputs.items() if key.split("-")[0] == name}
        shared |= {name: sorted(found)} if found else {}
    shared |= {"configuration": [hashlib.sha256(config.encode()).hexdigest()]} if config else {}
    cells = [
        {"id": str(o.cell.get("id", "")), "kind": "failure" if o.failure else "result", "result": o.fingerprint}
        | {name: o.inputs.get(name, "") for name in ("synthetic", "labels")}
        for o in made[:MOST_CELLS]
    ]
    return {
        "shared": shared,
        "cells": cells,
        "left_out": max(0, len(made) - MOST_CELLS),
        "versions": _spans([o.versions for o in made]),
        "code": sorted({o.code_version for o in made if o.code_version}),
    }


def shortened(text: str) -> str:
    """A long text up to a limit."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\n..."


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _yaml(values: str) -> str:
    return yaml.safe_dump(json.loads(values), sort_keys=False, default_flow_style=None, width=100)


def _spans(versions: Iterable[Any]) -> dict[str, str]:
    """Package -> its versions."""
    found: dict[str, set[str]] = {}
    for each in versions:
        for name, version in each.items():
            found.setdefault(name, set()).add(str(version))
    return {name: ", ".join(sorted(own)) for name, own in sorted(found.items())}
