"""Which code made a number: one version for people, one digest per step for resuming.

Editing a method must not throw away a teacher that took an hour. So each step's key holds the digest of just the
source files it can reach by imports, found by reading them, and the artifact's manifest holds the version of the whole.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import distillery

ROOT = Path(distillery.__file__).parent
# Registries and plumbing that steps import but that change no number: what a step really uses is named by its caller.
NEUTRAL = frozenset({"errors", "files", "track", "console", "preview", "artifact", "store", "code_version", "methods"})


@functools.cache
def code_version() -> str:
    """Version of the package with a digest of its sources, for example `0.1.0+3f2a90c1d4e5`."""
    return f"{distillery.__version__}+{_digest(sorted(ROOT.rglob('*.py')))[:12]}"


@functools.cache
def digest(*modules: str) -> str:
    """Digest of the source of these modules and of everything of ours they import.

    Args:
        modules: dotted names below `distillery`, for example "teacher" or "methods.rded".
    """
    seen: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in seen or path is None:
            continue
        seen[name] = path
        waiting += [found for found in _imports(path) if found.split(".")[0] not in NEUTRAL or "._" in found]
    return _digest([seen[name] for name in sorted(seen)])


def _source(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


@functools.cache
def _imports(path: Path) -> list[str]:
    """Names below `distillery` that a file imports, submodules and attributes alike."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name.partition(".")[2] for a in node.names if a.name.startswith("distillery.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "distillery":
            base = (node.module or "").partition(".")[2]
            found += [base, *(f"{base}.{a.name}".lstrip(".") for a in node.names)]
    return [name for name in found if name]


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
