"""The only side effects of a long loop: progress lines, checkpoints, and the guard against NaN.

A loop asks `due()` now and then and hands its state to `save`; a restarted process gets it back from `load`.
The work lost to a kill is at most the checkpoint interval. With a store the files also go there, beside the loop
(`distillery.checkpoints`); a process on another machine finds them in its own folder before it loads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distillery.errors import NonFiniteLoss, StoreError
from distillery.files import disk, sync

Say = Callable[[dict[str, Any]], None]
CHECKPOINT = "checkpoint"
FILE = "state.safetensors"
SHARE = 0.02  # of a loop's time that checkpoints may cost


class Remote(Protocol):
    """Where checkpoint files go besides their folder; both calls return at once."""

    def keep(self, name: str, path: Path) -> None:
        """Take the file as it is now; the caller may replace or delete it afterwards."""

    def drop(self, name: str) -> None:
        """Forget that file."""


class Track:
    """Progress and checkpoints of one step.

    Args:
        say: receives one event (a flat dict) per progress line; the console decides how it looks.
        folder: where the checkpoint lives; None keeps none.
        every: seconds between checkpoints; up to twice that where writing one takes more than 2 % of the time.
        remote: gets a copy of each checkpoint file.
        name: the folder's name for `remote`.
    """

    def __init__(
        self,
        say: Say | None = None,
        folder: Path | None = None,
        every: float = 30.0,
        remote: Remote | None = None,
        name: str = "",
    ) -> None:
        self._say, self._every = say, every
        self._file = folder / FILE if folder else None
        self._remote, self._name = remote, f"{name}/{FILE}" if name else FILE
        self._start = self._saved = time.monotonic()
        self._pause = every
        self._spoke = 0.0
        self._first: tuple[float, int] | None = None

    @staticmethod
    def quiet() -> Track:
        """No output and no checkpoint."""
        return Track()

    def child(self, name: str) -> Track:
        """A track for one part of the step: the same console, its own checkpoint."""
        folder = self._file.parent / name if self._file else None
        own = self._name.removesuffix(FILE) + name
        return Track(self._say, folder, self._every, self._remote, own)

    @property
    def is_sent(self) -> bool:
        """Whether checkpoints go to a store, where `send` may put what is too large to be saved again and again."""
        return self._remote is not None

    def log(self, done: int, total: int, **values: float | str) -> None:
        """Report progress; at most one line in 5 seconds, and always the last one."""
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        if self._say is None or (done < total and now - self._spoke < 5):
            return
        self._spoke = now
        since, began = self._first
        rate = (done - began) / (now - since) if now > since else 0.0
        left = round((total - done) / rate) if rate > 0 else None
        self._say({"event": "progress", "done": done, "total": total, "eta": left, **values})

    def note(self, text: str) -> None:
        """Say one line now."""
        if self._say is not None:
            self._say({"event": "note", "text": text})

    def due(self) -> bool:
        """Whether the checkpoint interval has passed since the last save."""
        return self._file is not None and time.monotonic() - self._saved >= self._pause

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Write the checkpoint atomically: a kill leaves the old one or the new one, never a mixture.

        Args:
            tensors: the state's tensors, any device and layout.
            values: everything else, as JSON.

        Raises:
            StoreError, UserError: the disk is full or not writable.
        """
        if self._file is None:
            return
        began = time.monotonic()
        lost = next((k for k, v in tensors.items() if k.startswith("net/") and not torch.isfinite(v).all()), "")
        if lost:
            self.finite(math.nan, int(values.get("step", values.get("done", 0))), weight=lost.removeprefix("net/"))
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        self._write(self._file, plain, {"values": json.dumps(values)})
        if self._remote is not None:
            self._remote.keep(self._name, self._file)
        self._saved = time.monotonic()
        self._pause = min(2 * self._every, max(self._every, (self._saved - began) / SHARE))

    def _write(self, path: Path, plain: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        part = path.with_suffix(".part")
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(plain, part, metadata=metadata)
            except SafetensorError as error:
                raise StoreError(
                    f"{path} cannot be written ({error}); free space on that disk, then start again"
                ) from error
            if self._remote is None:  # a lost machine's disk helps nobody, and waiting for it costs as much as the rest
                sync(part)
            os.replace(part, path)

    def send(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """As `save`, but only for another machine: no file stays here, and without a store nothing is done."""
        if self._file is not None and self._remote is not None:
            self.save(tensors, values)
            self._file.unlink()

    def load(self, quiet: bool = False, last: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last checkpoint, or None when there is none (or an unreadable one, which is said).

        Args:
            quiet: do not say that the work continues.
            last: it will not be asked for again here: its local copy goes.
        """
        if self._file is None or not self._file.exists():
            return None
        try:
            with safe_open(self._file, framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            self.note(f"checkpoint {self._file} is unreadable ({error}); starting this step from its beginning")
            return None
        if last:
            self._file.unlink()
        if not quiet:
            self.note("continuing from a checkpoint")
        return tensors, values

    def clear(self) -> None:
        """Forget the checkpoint (the step has finished)."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.drop(self._name)

    def finite(self, loss: float, step: int, **context: float | str) -> None:
        """Stop when a loss is not a number.

        Raises:
            NonFiniteLoss: names the step, the context (such as lr) and the last finite checkpoint.
        """
        if math.isfinite(loss):
            return
        kept = (
            f"the last finite checkpoint is {self._file}" if self._file and self._file.exists() else "no checkpoint yet"
        )
        said = ", ".join(f"{k} {v}" for k, v in context.items())
        raise NonFiniteLoss(
            f"loss is {loss} at step {step} ({said}); {kept}; lower lr, or use precision: fp32, and start again"
        )
