"""What the command line tells about artifacts and methods."""

from __future__ import annotations

import json

from distillery import artifact, console
from distillery import methods as registry
from distillery.artifact import Manifest
from distillery.files import cache_root
from distillery.store import open_store
from distillery.store.local import LocalStore


def describe(place: str) -> str:
    """An artifact in words, after every file was checked against its manifest.

    Args:
        place: folder, file:// or s3:// URI.

    Raises:
        CorruptArtifact: unfinished, too new, or changed since it was written.
        StoreError: the store does not answer.
    """
    store = open_store(place)
    if isinstance(store, LocalStore):
        found = artifact.read(store.root)
    else:
        found = store.pull("", cache_root() / "inspect" / place.removeprefix("s3://"))
    return "\n".join(_lines(place, found))


def _lines(place: str, found: Manifest) -> list[str]:
    total = sum(file["bytes"] for file in found.files.values())
    lines = [
        f"{place}: {found.kind}, made by {found.step}",
        f"  fingerprint   {found.fingerprint}",
        f"  code version  {found.code_version}",
        f"  made          {found.run.get('created', 'unknown')} in {console.duration(found.run.get('seconds', 0))}"
        f" on {found.run.get('hardware') or 'unknown hardware'}",
        f"  files         {len(found.files)}, {console.size(total)}, all verified",
    ]
    lines += [f"    {name}  {console.size(file['bytes'])}" for name, file in sorted(found.files.items())]
    lines += [f"  {name:13s} {json.dumps(value)[:200]}" for name, value in sorted(found.meta.items())]
    lines += [f"  input         {name} {print_[:16]}" for name, print_ in sorted(found.inputs.items())]
    return lines


def methods() -> str:
    """Every method, with the first line of its docstring."""
    wide = max(map(len, registry.METHODS))
    return "\n".join(f"{name:{wide}s}  {_title(module)}" for name, module in registry.METHODS.items())


def method(name: str) -> str:
    """One method's options with type, default and meaning.

    Raises:
        UserError: unknown method.
    """
    module = registry.find(name)
    lines = [f"{name}: {_title(module)}", ""]
    for key, option in module.Config.model_fields.items():
        kind = getattr(option.annotation, "__name__", str(option.annotation))
        lines.append(f"  {key} ({kind}, default {option.default!r})  {option.description or ''}".rstrip())
    for (dataset, ipc), values in getattr(module, "RECIPES", {}).items():
        lines.append(f"  recipe for {dataset}{f' ipc {ipc}' if ipc else ''}: {values}")
    return "\n".join(lines)


def _title(module: object) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]
