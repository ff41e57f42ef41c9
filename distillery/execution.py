"""One execution of a step: its key, its folder, its checkpoint, its clock, its failure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distillery import artifact, console
from distillery.checkpoints import LAST, Checkpoints, Mirror, Place, Vault
from distillery.code_version import digest
from distillery.config import Cell, plain
from distillery.device import Compute, hardware, peak_memory, watch_memory
from distillery.errors import DistilleryError, StoreError, StoreRefused, UserError
from distillery.files import disk
from distillery.track import CHECKPOINT, Track


@dataclass(frozen=True)
class Spec:
    """What a step will make, known before it runs.

    Attributes:
        name: the step, a verb.
        kind: the artifact, a noun.
        config: everything in the experiment that can change this artifact.
        inputs: folders of finished artifacts, by name.
        modules: where the step's code lives, below `distillery` (what it imports is found by reading).
        compute: device and precision, where they matter.
        cell: the cell, for the steps inside one.
        places: where things are read from; part of the key, but not of the artifact's content.
    """

    name: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, Path]
    modules: tuple[str, ...]
    compute: Compute | None = None
    cell: Cell | None = None
    places: dict[str, str] = field(default_factory=dict)

    @cached_property
    def sources(self) -> dict[str, artifact.Manifest]:
        """The inputs' manifests, checked."""
        return {name: artifact.read(folder) for name, folder in self.inputs.items()}

    @cached_property
    def key(self) -> str:
        """16 hex digits that change whenever anything that can change the artifact's content changes."""
        prints = {name: manifest.fingerprint for name, manifest in self.sources.items()}
        everything = [self.name, self.config, prints, self.places, digest(*self.modules)]
        text = json.dumps(everything, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Execution:
    """A step at work in its output folder; the step's body fills `meta` and `summary`.

    `parts` are artifacts from which this one is only put together: a failed one fails it, their seconds are its own.
    With `checkpoints` the unfinished work and the finished artifact are kept in a store: another machine goes on there.
    """

    spec: Spec
    out: Path
    checkpoints: Checkpoints = ""
    parts: Sequence[Path] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    _vault: Vault | None = field(default=None, init=False)
    _mirror: Mirror | None = field(default=None, init=False)

    @contextlib.contextmanager
    def running(self) -> Iterator[bool]:
        """Yield whether there is work to do; afterwards finish the artifact, or record the cell's failure.

        Raises:
            Exception: outside cells, and with `stop_on_failure`, whatever the work raised.
            StoreError, StoreRefused, torch.AcceleratorError: a store, a disk or the GPU failed; in a cell too,
            since another try may find it well.
        """
        self._began, handed = time.monotonic(), False
        self._emit("started")
        try:
            sources = [(self.spec.inputs[name], manifest) for name, manifest in self.spec.sources.items()]
            sources += [(part, artifact.read(part)) for part in self.parts]
            failed = next((folder for folder, manifest in sources if manifest.kind == "failure"), None)
            if failed is not None:
                self._pass_on(failed)
            elif not self._kept() and not self._found():
                self.out.mkdir(parents=True, exist_ok=True)
                handed = True
                self._say_device()
                watch_memory(self.spec.compute)
                with disk(self.out):
                    yield True
                self._end_uploads()
                self._finish(self.spec.kind)
                self._emit("finished", self.summary)
        except Exception as error:
            self._end_uploads(LAST)
            self._emit("failed", f"{type(error).__name__}: {error}")
            # A recorded failure is a finished step to Kubeflow: cached, and never retried. What the store or the disk
            # did says nothing of the cell, and is gone tomorrow; so is a GPU that fell over (one too small is not).
            surroundings = isinstance(error, (StoreError, StoreRefused, torch.AcceleratorError))
            if self.spec.cell is None or self.spec.cell.stop_on_failure or surroundings:
                raise
            self._record(error)
        finally:
            self._end_uploads()
        if self.manifest.kind != "failure" and (vault := self._open_vault()) is not None:
            vault.push(self.out)
        if not handed:
            yield False

    def track(self) -> Track:
        """Progress and checkpoints of this step; with a store, its newest checkpoint has been brought here."""
        folder, every = self.out / CHECKPOINT / self.spec.key, _seconds()
        if (vault := self._open_vault()) is not None and self._mirror is None:
            self._mirror = vault.open(folder, lambda: clear(self.out))
        return Track(self._say, folder, every, self._mirror)

    def _say(self, event: dict[str, Any]) -> None:
        cell = {"cell": self.spec.cell.id} if self.spec.cell else {}
        console.emit({"step": self.spec.name} | cell | event)

    def _open_vault(self) -> Vault | None:
        """The step's share of the store; opening it the first time checks that it may be used."""
        if self._vault is None and self.checkpoints:
            place = self.checkpoints
            if isinstance(place, str):
                place = Place.below(place, f"{self.spec.name}-{self.spec.key}")
            self._vault = Vault(place, self._say)
        return self._vault

    def _end_uploads(self, wait: float = 0.0) -> None:
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            mirror.close(wait)

    def _found(self) -> bool:
        """Whether the store held this very artifact; it lies in the folder now."""
        vault = self._open_vault()
        return vault is not None and vault.pull(self.out) and self._kept()

    def _kept(self) -> bool:
        """Whether the folder already holds this very artifact."""
        if not artifact.is_finished(self.out):
            return False
        found = artifact.read(self.out)
        if found.kind == "failure":
            clear(self.out)  # a failure is tried again
            return False
        prints = {name: manifest.fingerprint for name, manifest in self.spec.sources.items()}
        if found.kind != self.spec.kind or found.config != self.spec.config or found.inputs != prints:
            raise UserError(
                f"{self.out}: holds a finished {found.kind} of another configuration; choose another output folder or "
                "delete this one"
            )
        self.manifest = found
        self._emit("kept", "already finished")
        return True

    def _finish(self, kind: str) -> None:
        inputs = dict(self.spec.inputs)
        parts = [artifact.read(part, verify=False) for part in self.parts if _is_readable(part)]
        if kind == "failure":
            inputs = {name: folder for name, folder in inputs.items() if _is_readable(folder)}
        else:
            shutil.rmtree(self.out / CHECKPOINT, ignore_errors=True)
        self.manifest = artifact.finish(
            self.out,
            kind=kind,
            step=self.spec.name,
            config=self.spec.config,
            inputs=inputs,
            meta=self.meta,
            seconds=time.monotonic() - self._began + sum(part.run.get("seconds", 0.0) for part in parts),
            hardware=self._hardware(parts),
            peak=self._peak(parts),
        )

    def _hardware(self, parts: Sequence[artifact.Manifest]) -> str:
        """What the work ran on; what is only put together ran where its parts did."""
        if parts:
            return "; ".join(sorted({str(part.run.get("hardware", "")) for part in parts} - {""}))
        return hardware(self.spec.compute) if self.spec.compute else ""

    def _peak(self, parts: Sequence[artifact.Manifest]) -> dict[str, int]:
        """Memory at most; what is only put together held as much as the largest of its parts."""
        peaks = [peak_memory(self.spec.compute)]
        peaks += [part.run.get("peaks", {}).get(part.step, {}) for part in parts]
        return {kind: max(peak.get(kind, 0) for peak in peaks) for kind in sorted({k for peak in peaks for k in peak})}

    def _say_device(self) -> None:
        if self.spec.compute and not self.parts:
            where = {"cell": self.spec.cell.id} if self.spec.cell else {}
            text = f"device {self.spec.compute.asked}: {hardware(self.spec.compute)}"
            console.emit({"event": "note", "step": self.spec.name} | where | {"text": text})

    def _record(self, error: Exception) -> None:
        """Leave the failure where the artifact would be; the checkpoint stays for the next try."""
        assert self.spec.cell is not None
        self.out.mkdir(parents=True, exist_ok=True)
        clear(self.out)
        self.meta = {}
        said = {
            "step": self.spec.name,
            "cell": plain(self.spec.cell),
            "error": f"{type(error).__name__}: {error}",
            "hint": "correct what the message names and start the run again; what is finished is kept",
            "traceback": traceback.format_exc(),
        }
        (self.out / "failure.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
        self._finish("failure")

    def _pass_on(self, failed: Path) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        clear(self.out)
        said = json.loads((failed / "failure.json").read_text())
        if self.spec.cell is not None:
            said["cell"] = plain(self.spec.cell)  # a piece knows less of it
        (self.out / "failure.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
        self._finish("failure")
        self._emit("passed on", "an earlier step of this cell failed")

    def _emit(self, status: str, summary: str = "") -> None:
        event: dict[str, Any] = {"event": "step", "step": self.spec.name, "status": status}
        if self.spec.cell:
            event["cell"] = self.spec.cell.id
        if status != "started":
            event["seconds"] = round(time.monotonic() - self._began, 3)
        console.emit(event | ({"summary": summary} if summary else {}) | {"path": str(self.out)})


def _is_readable(folder: Path) -> bool:
    try:
        artifact.read(folder, verify=False)
    except DistilleryError:
        return False
    return True


def _seconds() -> float:
    text = os.environ.get("DISTILLERY_CHECKPOINT_SECONDS") or "30"
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"DISTILLERY_CHECKPOINT_SECONDS is {text!r}; give a number of seconds, like 30") from error


def clear(folder: Path) -> None:
    """Empty an artifact folder, its manifest first, but keep the checkpoint."""
    (folder / artifact.MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and path.name != CHECKPOINT:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
