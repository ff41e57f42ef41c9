"""What is exported: a finished cell of a run with all that its students saw, or a synthetic artifact alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from distillery import artifact
from distillery.artifact import MANIFEST, Manifest
from distillery.errors import CorruptArtifact, UserError, choices, nearest
from distillery.files import cache_root
from distillery.store import Store, open_store
from distillery.store.local import LocalStore

RUN = "experiment.name"  # a run has it in its folder
SHOWN = 12  # cells that a message lists
Result = dict[str, Any]  # the content of result.json


@dataclass(frozen=True)
class Origin:
    """The artifacts behind an exported set, as local folders; empty where a synthetic artifact came alone.

    Attributes:
        images: the synthetic artifact.
        labels: its labels.
        teachers: whose labels they are; several label as the mean of their logits.
        data: the real images.
        result: what its students reached, and the manifest beside it.
        run: the experiment's name.
        beside: results of the run's other finished cells, with theirs.
    """

    images: Path
    labels: Path | None = None
    teachers: tuple[Path, ...] = ()
    data: Path | None = None
    result: tuple[Manifest, Result] | None = None
    run: str = ""
    beside: tuple[tuple[Manifest, Result], ...] = ()


@dataclass(frozen=True)
class Beside:
    """URIs of the artifacts that belong to a synthetic one outside of a run's folder, as Kubeflow keeps them."""

    result: str = ""
    labels: str = ""
    teachers: str = ""
    data: str = ""


def beside(given: Sequence[str]) -> Beside:
    """`Beside` from KIND=URI as people write them.

    Raises:
        UserError: another kind, or no URI.
    """
    pairs = [each.partition("=") for each in given]
    known = [field.name for field in fields(Beside)]
    for kind, _, uri in pairs:
        if kind not in known or not uri:
            raise UserError(
                f"--beside {kind}={uri}: give KIND=URI with a KIND of {choices(known)}{nearest(kind, known)}"
            )
    return Beside(**{kind: uri for kind, _, uri in pairs})


def find(source: str, cell: str = "", *, data: bool = False, beside: Beside = Beside()) -> Origin:
    """The cell that a user means.

    Args:
        source: a run's folder, a synthetic artifact in one, or one alone; or a URI of these.
        cell: id of a cell, or the beginning of just one; may be empty where there is one only.
        data: whether the real images are wanted too.
        beside: where the other artifacts of the cell are, if `source` is a synthetic artifact outside of a run.

    Raises:
        UserError: nothing to export there, no such cell, several without `cell`, or a cell that failed.
        CorruptArtifact: an artifact that is needed is missing, unfinished or damaged.
    """
    store = open_store(source)
    if store.exists(RUN) or (not store.exists(MANIFEST) and store.list("3-synthetic/")):
        if beside != Beside():
            raise UserError(f"{source} is a run, which has its artifacts in it; leave out {beside}")
        return _Run(store).origin(cell, data)
    if not store.exists(MANIFEST):
        raise UserError(
            f"{source}: neither a run nor a finished artifact; give the --out of `distillery run`, or a synthetic "
            "artifact out of its 3-synthetic"
        )
    found = artifact.parse(store.read(MANIFEST), f"{store.uri}/{MANIFEST}")
    if found.kind == "failure":
        raise UserError(f"{source}: {_failure(json.loads(store.read('failure.json')))}")
    if found.kind != "synthetic":
        raise UserError(
            f"{source}: holds a {found.kind!r} artifact; what can be exported is a run or a synthetic artifact"
        )
    if cell:
        raise UserError(f"--cell {cell!r} belongs to a run, but {source} is a single artifact; leave it out")
    if beside.result:
        return _together(_local(store, "", found, source), found, beside, data)
    above = open_store(source.rstrip("/").rsplit("/", 2)[0]) if source.rstrip("/").count("/") > 1 else None
    if above is not None and above.exists(RUN):
        return _Run(above).around(found, data)
    return Origin(_local(store, "", found, source))


class _Run:
    """A run's folder or prefix."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def cells(self) -> dict[str, tuple[str, Manifest]]:
        """Each cell's place and manifest: the one of the report, else the newest."""
        reported = next((m.inputs.values() for _, m in self._manifests("6-report")), ())
        found: dict[str, tuple[str, Manifest]] = {}
        for place, manifest in sorted(self._manifests("5-students"), key=lambda each: each[1].run.get("created", "")):
            name = str(manifest.config.get("cell") or place.split("/")[1].rpartition("-")[0])
            if not reported or manifest.fingerprint in reported:
                found[name] = place, manifest
        return found

    def origin(self, cell: str, data: bool) -> Origin:
        """What is behind one cell."""
        name = self._named(cell)
        place, manifest = self.cells[name]
        if manifest.kind == "failure":
            said = _failure(json.loads(self.store.read(f"{place}/failure.json")))
            raise UserError(f"cell {name} of {self.store.uri} has nothing to export: {said}")
        return self._origin(place, manifest, data)

    def around(self, synthetic: Manifest, data: bool) -> Origin:
        """What is behind a synthetic artifact of this run; the artifact alone when its cell has not finished."""
        for place, manifest in self.cells.values():
            if manifest.inputs.get("synthetic") == synthetic.fingerprint:
                return self._origin(place, manifest, data)
        return Origin(self._get("3-synthetic", synthetic.fingerprint, "synthetic"))

    def _named(self, cell: str) -> str:
        if not self.cells:
            raise UserError(f"{self.store.uri}: no cell of this run has finished; run it to its end first")
        names = sorted(self.cells)
        listed = choices(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        fitting = [name for name in names if name == cell] or [name for name in names if name.startswith(cell)]
        if len(fitting) == 1:
            return fitting[0]
        if not cell:
            raise UserError(f"{self.store.uri} has {len(names)} cells; choose one with --cell: {listed}")
        if fitting:
            raise UserError(f"--cell {cell!r} may be any of {choices(fitting[:SHOWN])}; say more of its name")
        raise UserError(f"--cell {cell!r} is not in {self.store.uri}{nearest(cell, names)}; it has {listed}")

    def _origin(self, place: str, manifest: Manifest, data: bool) -> Origin:
        inputs = manifest.inputs
        teachers = sorted((name for name in inputs if name.startswith("teacher-")), key=lambda name: int(name[8:]))
        return Origin(
            images=self._get("3-synthetic", inputs["synthetic"], "synthetic"),
            labels=self._get("4-labels", inputs["labels"], "labels"),
            teachers=tuple(self._get("2-teachers", inputs[name], "teacher") for name in teachers),
            data=self._get("1-data", inputs["data"], "dataset") if data else None,
            result=(manifest, self._result(place)),
            run=str(manifest.config["name"]),
            beside=tuple(
                (m, self._result(p)) for p, m in self.cells.values() if m.kind == "result" and m is not manifest
            ),
        )

    def _result(self, place: str) -> Result:
        found: Result = json.loads(self.store.read(f"{place}/result.json"))
        return found

    def _get(self, folder: str, fingerprint: str, kind: str) -> Path:
        """The artifact of a fingerprint, checked, on this machine."""
        for place, manifest in self._manifests(folder):
            if manifest.fingerprint == fingerprint and manifest.kind == kind:
                return _local(self.store, place, manifest, f"{self.store.uri}/{place}")
        raise CorruptArtifact(
            f"{self.store.uri}/{folder} has no {kind} artifact {fingerprint[:16]}, which the cell was made with; it "
            "was deleted or changed since: start the run again, what is missing is made anew"
        )

    def _manifests(self, folder: str) -> Iterator[tuple[str, Manifest]]:
        """Place and manifest of each finished artifact; what cannot be read is not finished."""
        for entry in self.store.list(f"{folder}/"):
            place, _, last = entry.key.rpartition("/")
            if last == MANIFEST and place.count("/") == (0 if folder == "6-report" else 1):
                try:
                    yield place, artifact.parse(self.store.read(entry.key), f"{self.store.uri}/{entry.key}")
                except CorruptArtifact:
                    continue


def _together(images: Path, made: Manifest, beside: Beside, data: bool) -> Origin:
    """A cell out of single artifacts, each held against what the result says it was made of."""
    place, manifest = _artifact(beside.result, "result")
    if manifest.inputs.get("synthetic") != made.fingerprint:
        raise UserError(
            f"--beside result={beside.result}: belongs to other images than {images}; give the cell's own result"
        )
    found: dict[str, Path] = {}
    for name, kind in (("labels", "labels"), ("data", "dataset")):
        if uri := getattr(beside, name):
            found[name], other = _artifact(uri, kind)
            if other.fingerprint != manifest.inputs[name]:
                raise UserError(f"--beside {name}={uri}: not what the result was made with; give the cell's own")
    if data and "data" not in found:
        raise UserError(f"--with-test needs the real images of {images}: name them too, --beside data=URI")
    teachers: list[Path] = []
    if beside.teachers:
        folder, _ = _artifact(beside.teachers, "teachers")
        known = {
            artifact.read(each.parent, verify=False).fingerprint: each.parent for each in folder.glob("*/manifest.json")
        }
        wanted = sorted(
            (name for name in manifest.inputs if name.startswith("teacher-")), key=lambda name: int(name[8:])
        )
        if missing := [name for name in wanted if manifest.inputs[name] not in known]:
            raise UserError(
                f"--teachers {beside.teachers}: has not {choices(missing)} of the result; give its own run's"
            )
        teachers = [known[manifest.inputs[name]] for name in wanted]
    result = json.loads((place / "result.json").read_text())
    name = str(manifest.config["name"])
    return Origin(images, found.get("labels"), tuple(teachers), found.get("data"), (manifest, result), name)


def _artifact(uri: str, kind: str) -> tuple[Path, Manifest]:
    store = open_store(uri)
    if not store.exists(MANIFEST):
        raise UserError(f"{uri}: no finished artifact there; give the {kind} artifact of the same run")
    manifest = artifact.parse(store.read(MANIFEST), f"{store.uri}/{MANIFEST}")
    if manifest.kind != kind:
        raise UserError(f"{uri}: holds a {manifest.kind!r} artifact, and a {kind!r} one is needed")
    return _local(store, "", manifest, uri), manifest


def _local(store: Store, place: str, manifest: Manifest, where: str) -> Path:
    if isinstance(store, LocalStore):
        folder = store.root / place
        artifact.read(folder)
        return folder
    folder = cache_root() / "export" / manifest.fingerprint
    store.pull(place, folder)
    return folder


def _failure(said: Mapping[str, Any]) -> str:
    error = " ".join(str(said["error"]).split())
    return f"it failed in {said['step']} ({error:.300}); correct that and start the run again"
