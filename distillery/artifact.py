"""An artifact: a folder of plain files and a `manifest.json`, which is written last.

No manifest means not finished. The manifest lists each file with size and sha256, the step's resolved config, the
fingerprints of its inputs and how long it took. Equal content gives an equal fingerprint, wherever it was made.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from distillery import __version__
from distillery.code_version import code_version
from distillery.errors import CorruptArtifact, DistilleryError, StoreError
from distillery.files import disk, sha256_of, sync, write_atomic

MANIFEST = "manifest.json"
SCHEMA = 1
MAX_MANIFEST, MAX_FILES = 2**26, 200_000  # bytes of a manifest, files of an artifact
UNLISTED = "checkpoint"  # a folder of unfinished work; it never belongs to an artifact
PACKAGES = ("torch", "torchvision", "numpy", "safetensors")  # versions that can change a number

Facts = dict[str, Any]


class FileFacts(TypedDict):
    """What a manifest says of one file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and what it consists of. Only `run` and `code_version`, its own and
    those of artifacts inside it, may differ between two artifacts of equal content."""

    kind: str  # dataset | teacher | teachers | piece | pieces | synthetic | labels | result | failure | report | set
    step: str  # the step that made it
    config: Facts  # that step's resolved config
    inputs: dict[str, str]  # input name -> fingerprint
    meta: Facts  # facts of this kind, the same in every run
    files: dict[str, FileFacts]  # relative path -> size and hash
    code_version: str
    run: Facts  # seconds, steps (step -> seconds), peaks (step -> bytes), hardware, versions, created; with upstream's
    schema: int = SCHEMA

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the content: everything but `run` and `code_version`, and those of artifacts inside this one."""
        named = ("schema", "kind", "step", "config", "inputs", "meta")
        files = {name: facts for name, facts in self.files.items() if not name.endswith(f"/{MANIFEST}")}
        content = {name: getattr(self, name) for name in named} | {"files": files}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_MANIFEST = TypeAdapter(Manifest)


def begin(folder: Path) -> Path:
    """Make `folder` ready to be (re)written: it exists, and no manifest of an earlier time vouches for it.

    Raises:
        StoreError, UserError: the disk is full or not writable.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    return folder


def finish(
    folder: Path,
    *,
    kind: str,
    step: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path | Manifest],
    meta: Mapping[str, Any],
    seconds: float,
    hardware: str,
    peak: Mapping[str, int] | None = None,
) -> Manifest:
    """Hash what lies in `folder` and write its manifest: from here on the artifact counts.

    Args:
        folder: the step's output; `*.part` files and `checkpoint/` are left out.
        kind: see `Manifest.kind`.
        step: the step's name.
        config: the resolved config.
        inputs: input name -> artifact (its folder or its manifest).
        meta: facts about the content, JSON values only.
        seconds: what the step itself took.
        hardware: what it ran on.
        peak: bytes of memory it held at most, by kind (ram, gpu).

    Raises:
        StoreError: the disk is full. CorruptArtifact: an input has no readable manifest.
    """
    sources = {k: v if isinstance(v, Manifest) else read(v, verify=False) for k, v in inputs.items()}
    steps = {name: spent for source in sources.values() for name, spent in source.run.get("steps", {}).items()}
    for each in {source.step for source in sources.values()}:  # several teachers: all their training counts
        same = {s.fingerprint: s.run.get("seconds", 0.0) for s in sources.values() if s.step == each}
        steps |= {each: round(sum(same.values()), 3)} if len(same) > 1 else {}
    peaks = {name: held for source in sources.values() for name, held in source.run.get("peaks", {}).items()}
    peaks |= {step: dict(peak)} if peak else {}
    begin(folder)
    with disk(folder):
        files = {name: _facts(folder / name) for name in _names(folder)}
    manifest = Manifest(
        kind=kind,
        step=step,
        config=_plain(config, folder),
        inputs={k: v.fingerprint for k, v in sources.items()},
        meta=_plain(meta, folder),
        files=files,
        code_version=code_version(),
        run={
            "seconds": round(seconds, 3),
            "steps": {**steps, step: round(seconds, 3)},
            "peaks": peaks,
            "hardware": hardware,
            "versions": _versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    write_atomic(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())
    return manifest


def read(folder: Path, kind: str | None = None, verify: bool = True) -> Manifest:
    """The manifest of a finished artifact, after checking that the artifact is what it says.

    Args:
        folder: the artifact.
        kind: the kind it must be; None accepts any.
        verify: also check each file's size and hash (unchanged files are hashed once per process).

    Raises:
        CorruptArtifact: no manifest, unreadable, newer than this program, of another kind, or a file that is missing
            or has other bytes. The message names the file.
    """
    path = Path(folder) / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptArtifact(
            f"{folder} has no {MANIFEST}: the step that writes it has not finished, or this is not an artifact; "
            "run that step again"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}; check the path and its permissions") from error
    manifest = parse(data, str(path))
    if kind is not None and manifest.kind != kind:
        raise CorruptArtifact(f"{path}: this is a {manifest.kind!r} artifact where a {kind!r} one is needed")
    for name in manifest.files if verify else ():
        fault = find_fault(Path(folder) / name, manifest.files[name])
        if fault:
            raise CorruptArtifact(f"{Path(folder) / name} {fault}; delete {folder} and run its step again")
    return manifest


def is_finished(folder: Path) -> bool:
    """Whether `folder` has a manifest; `read` says whether it is to be believed."""
    return (Path(folder) / MANIFEST).is_file()


def parse(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes; `where` names it in errors.

    Raises:
        CorruptArtifact: unreadable, incomplete, newer than this program, or naming files outside its folder.
    """
    if len(data) > MAX_MANIFEST:
        raise CorruptArtifact(f"{where} has {len(data)} bytes, more than a manifest can have ({MAX_MANIFEST})")
    try:
        raw = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{where} is not readable JSON ({error}); delete it and run its step again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise CorruptArtifact(
            f"{where} has schema {schema}, this is distillery {__version__} which reads up to {SCHEMA}; "
            "upgrade distillery"
        )
    try:
        manifest = _MANIFEST.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "its content"
        raise CorruptArtifact(f"{where}: {key}: {first['msg']}; delete it and run its step again") from error
    if len(manifest.files) > MAX_FILES:
        raise CorruptArtifact(
            f"{where} lists {len(manifest.files)} files, more than an artifact can have ({MAX_FILES})"
        )
    for name in manifest.files:
        if not is_inside(name):
            raise CorruptArtifact(f"{where} lists the file {name!r}, which is not a plain path inside the artifact")
    return manifest


def find_fault(path: Path, facts: FileFacts, hashed: bool = True) -> str:
    """What is wrong with a file, in words; empty when it is as its manifest says (or has that size, if not hashed)."""
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"has {size} bytes, its manifest says {facts['bytes']}"
        found = sha256_of(path) if hashed else facts["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return "" if found == facts["sha256"] else f"has sha256 {found[:12]}, its manifest says {facts['sha256'][:12]}"


def _names(folder: Path) -> list[str]:
    """Relative paths of the files that belong to the artifact."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(p.as_posix() for p in found if p.suffix != ".part" and p.parts[0] not in (UNLISTED, MANIFEST))


def _facts(path: Path) -> FileFacts:
    # The bytes must be on the disk before the manifest vouches for them.
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _plain(values: Mapping[str, Any], folder: Path) -> Facts:
    """As JSON gives it back (string keys, lists), so that the fingerprint is the same before and after writing."""
    try:
        plain: Facts = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DistilleryError(f"{folder}: the manifest cannot hold {dict(values)!r:.500}: {error}") from error
    return plain


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "distillery": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and "\0" not in name
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name != MANIFEST


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
