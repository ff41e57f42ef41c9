"""Soft labels of every view a student sees: made beside it, or beforehand and stored.

Both modes give the same student: views are drawn again from (seed, epoch, step), the teacher sees the same batches, and
its logits are rounded to fp16 either way. What is stored is the seed and fp16 logits in the order of presentation
(`data/label_file.py`): nothing of FKD's boxes, flips and mix partners. A process that continues finds them in the file;
one on another machine gets them, chunk by chunk, from the checkpoint store.

With `top_k` each view keeps its k largest logits, and one more value for all the others: the logit at which their
probability at the recipe's temperature, spread evenly, is what it was. This approximates; top_k 0 keeps everything.

Legend: C classes, B batch, K kept logits.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillery.config import LabelConfig, Recipe, Student, plain
from distillery.data import label_file
from distillery.data.batches import Batch, Batches
from distillery.data.label_file import stored_bytes
from distillery.errors import CorruptArtifact
from distillery.track import Track

if TYPE_CHECKING:
    from distillery.data.synthetic import Synthetic
    from distillery.teacher import Frozen

CARD = "labels.json"
FKD_RECORD = 25  # bytes per view beside the logits: crop box 4 x fp32, flip 1, mix partner int64
Source = Callable[[int, Batch], Tensor]  # (epoch, batch) -> logits [B, C] float32, rounded to fp16
Entry = dict[str, Any]
CHUNK = 2**26  # bytes of labels in one file of the checkpoint


def fkd_bytes(images: int, epochs: int, classes: int) -> int:
    """Size of FKD's label files for the same run: fp16 logits and view records (its file overhead not counted)."""
    return images * epochs * (2 * classes + FKD_RECORD)


def relabel(
    students: Sequence[Student],
    synthetic: Synthetic,
    teacher: Frozen,
    *,
    seed: int,
    config: LabelConfig,
    out: Path,
    track: Track,
) -> dict[str, Any]:
    """Make the labels of a cell's students, or the reference from which they are made on the fly.

    Args:
        students: with resolved recipes; hard-label students need none.
        synthetic: the distilled images.
        teacher: labels them.
        seed: of views and order; the students must be trained with the same.
        config: mode and top_k.
        out: folder for labels.json and student-<i>.safetensors.
        track: progress and checkpoints.

    Returns:
        Manifest meta: mode, seed, label_bytes, fkd_bytes, and one entry per student.
    """
    if config.top_k and config.mode != "stored":
        track.note(f"labels.top_k {config.top_k} has no effect with labels.mode {config.mode}")
    if config.top_k >= len(teacher.card.classes):
        track.note(f"labels.top_k {config.top_k} has no effect with {len(teacher.card.classes)} classes")
    made = [_entry(student.recipe, synthetic, teacher, seed, config) for student in students]
    start = _resume(made, out, track)
    for index, student in enumerate(students):
        if made[index]["mode"] == "stored":
            path = out / f"student-{index}.safetensors"
            if index >= start.student:
                start.student, start.done = index, start.done if index == start.student else 0
                _store(path, made[index], student.recipe, synthetic, teacher, start)
            made[index] = made[index] | {"bytes": path.stat().st_size}
    card = {"mode": config.mode, "seed": seed, "students": made}
    (out / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")
    total = {key: sum(int(entry[key]) for entry in made) for key in ("bytes", "fkd_bytes")}
    return card | {"label_bytes": total["bytes"], "fkd_bytes": total["fkd_bytes"]}


def entries(folder: Path) -> list[Entry]:
    """What a labels artifact says of each student: sizes, counts, and all that its labels depend on.

    Raises:
        CorruptArtifact: labels.json is missing or not readable.
    """
    try:
        found: list[Entry] = json.loads((folder / CARD).read_text())["students"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptArtifact(f"{folder / CARD}: not a labels artifact ({error}); run relabel again") from error
    return found


def open_source(folder: Path, index: int, recipe: Recipe, synthetic: Synthetic, teacher: Frozen, seed: int) -> Source:
    """The labels of one student of a cell, for `student.train`.

    Args:
        folder: a labels artifact.
        index: the student's place in the cell.
        recipe, synthetic, teacher, seed: what the student is trained with.

    Raises:
        CorruptArtifact: the artifact does not hold this student, or was made for other views.
    """
    found = entries(folder)
    if index >= len(found):
        raise CorruptArtifact(
            f"{folder / CARD}: labels of {len(found)} students, none of number {index}; relabel again"
        )
    entry = found[index]
    config = LabelConfig(mode="stored" if entry["mode"] == "stored" else "on_the_fly", top_k=entry["top_k"])
    wanted = _entry(recipe, synthetic, teacher, seed, config)
    for key in sorted(wanted.keys() - {"bytes"}):
        if entry.get(key) != wanted[key]:
            raise CorruptArtifact(
                f"{folder / CARD}: the labels of student {index} were made for {key} {entry.get(key)!r}, but the "
                f"student is trained with {wanted[key]!r}; run relabel again"
            )
    if entry["mode"] == "stored":
        return stored(folder / f"student-{index}.safetensors", entry["classes"])
    return on_the_fly(teacher, recipe.teacher_mode)


def on_the_fly(teacher: Frozen, mode: str) -> Source:
    """Labels made beside the student, on the batch it sees."""
    return lambda _, batch: teacher_logits(teacher, batch.x_norm, mode).half().float()


def stored(path: Path, classes: int) -> Source:
    """Labels read from a file of `relabel`, one batch at a time.

    Raises:
        CorruptArtifact: the file is missing.
    """
    file = label_file.Reader(path)

    def read(epoch: int, batch: Batch) -> Tensor:
        device = batch.x_norm.device
        logits = file.read(label_file.LOGITS, epoch, batch.part).to(device).float()
        if not file.top_k:
            return logits
        return expand(logits, file.read(label_file.PLACES, epoch, batch.part).to(device), classes)

    return read


def teacher_logits(teacher: Frozen, x_norm: Tensor, mode: str) -> Tensor:
    """Teacher logits [B, C] float32 of one batch of views.

    Args:
        teacher: the frozen teacher.
        x_norm: [B, 3, S, S].
        mode: eval: running statistics; train: the batch's own (DWA and SRe2L on CIFAR); bssl: the own statistics of
            each half of the batch (SRe2L++). Only BatchNorm changes, and its running statistics never move.
    """
    if mode == "eval":
        return teacher.logits(x_norm)
    halves = x_norm.chunk(2) if mode == "bssl" and len(x_norm) > 1 else [x_norm]
    with batch_statistics(teacher.net):
        return torch.cat([teacher.logits(half) for half in halves])


@contextlib.contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """BatchNorm layers normalise by the batch at hand inside this block, and remember nothing of it."""
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


def compress(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Keep the largest logits.

    Args:
        logits: [B, C] float32.
        top_k: K < C.
        temperature: at which the others keep their total probability.

    Returns:
        [B, K + 1] logits (the last one stands for every other class) and [B, K] int64 places.
    """
    values, places = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, places, -math.inf) / temperature
    level = temperature * (rest.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - top_k))
    return torch.cat([values, level], dim=1), places


def expand(values: Tensor, places: Tensor, classes: int) -> Tensor:
    """Undo `compress`: [B, C] float32."""
    return values[:, -1:].expand(-1, classes).scatter(1, places.long(), values[:, :-1])


def _entry(recipe: Recipe, synthetic: Synthetic, teacher: Frozen, seed: int, config: LabelConfig) -> Entry:
    """Everything a student's labels depend on, and their sizes."""
    images, classes = len(synthetic.labels), len(teacher.card.classes)
    mode = config.mode if recipe.regime == "soft" else "none"
    return {
        "mode": mode,
        "recipe": recipe.name,
        "epochs": recipe.epochs,
        "batch": min(recipe.batch, images),
        "steps": recipe.epochs * math.ceil(images / recipe.batch),
        "images": images,
        "classes": classes,
        "seed": seed,
        "views": plain(recipe.views),
        "teacher_mode": recipe.teacher_mode,
        "temperature": recipe.temperature,
        "top_k": config.top_k if mode == "stored" and config.top_k < classes else 0,
        "bytes": 0,
        "fkd_bytes": fkd_bytes(images, recipe.epochs, classes) if mode != "none" else 0,
    }


@dataclass
class _Position:
    """Where the labels of a cell stand: the next step of which student; `key` says of which cell.

    `chunks` are the labels that lie in the checkpoint store: student, first row and the row after the last.
    """

    student: int
    done: int
    key: str
    track: Track
    chunks: list[list[int]] = field(default_factory=list)

    def save(self, done: int) -> None:
        self.done = done
        values = {"student": self.student, "done": done, "key": self.key, "chunks": self.chunks}
        self.track.save({}, values)

    def send(self, arrays: label_file.Arrays, end: int) -> None:
        """Put the rows up to `end` that are not there yet into the store."""
        first = max((chunk[2] for chunk in self.chunks if chunk[0] == self.student), default=0)
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}
        rows = max(1, CHUNK // sum(array.itemsize * array.shape[-1] for array in flat.values()))
        for start in range(first, end, rows) if self.track.is_sent else ():
            stop = min(end, start + rows)
            part = {name: torch.from_numpy(array[start:stop].copy()) for name, array in flat.items()}
            self._chunk(self.student, start).send(part, {})
            self.chunks.append([self.student, start, stop])

    def fetch(self, student: int, arrays: label_file.Arrays) -> bool:
        """Bring the rows that are in the store into the file; False when some are lost."""
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}
        for _, start, stop in (chunk for chunk in self.chunks if chunk[0] == student):
            kept = self._chunk(student, start).load(quiet=True, last=True)
            if kept is None or any(len(kept[0].get(name, ())) != stop - start for name in flat):
                return False
            for name, array in flat.items():
                array[start:stop] = kept[0][name].numpy()
        return True

    def _chunk(self, student: int, start: int) -> Track:
        return self.track.child(f"labels-{student}-{start}")


def _resume(made: list[Entry], out: Path, track: Track) -> _Position:
    """The position of an earlier process on these very labels, else the beginning in a folder without any."""
    key = json.dumps(made, sort_keys=True)
    kept = track.load()
    if kept is not None and kept[1]["key"] == key:
        position = _Position(kept[1]["student"], kept[1]["done"], key, track, kept[1]["chunks"])
        begun = range(min(len(made), position.student + 1))
        if all(_is_back(made[i], out, i, position) for i in begun if made[i]["mode"] == "stored"):
            return position
        track.note("labels made earlier are lost; starting from the first one")
    for path in out.glob("student-*"):
        path.unlink()
    return _Position(0, 0, key, track)


def _is_back(entry: Entry, out: Path, student: int, position: _Position) -> bool:
    """Whether the labels that a student had are in its file: they are, or come from the store."""
    whole = out / f"student-{student}.safetensors"
    finished, part = student < position.student, whole.with_suffix(".part")
    if whole.is_file() and not finished:
        whole.replace(part)  # the last process ended between the file and the checkpoint that says so
    if whole.is_file() or not (finished or position.done):
        return True
    arrays, fresh = _map(part, entry)
    if not fresh and not finished:
        position.chunks[:] = [
            chunk for chunk in position.chunks if chunk[0] != student
        ]  # sent again, with what was not
        return True
    rows = entry["epochs"] * entry["images"] if finished else _row(entry, position.done)
    sent = max((chunk[2] for chunk in position.chunks if chunk[0] == student), default=0)
    if sent < rows or not position.fetch(student, arrays):
        return False
    if finished:
        _flush(arrays)
        part.replace(whole)
    return True


def _row(entry: Entry, done: int) -> int:
    """Rows of labels that so many steps make."""
    count = entry["steps"] // entry["epochs"]
    epoch, step = divmod(done, count)
    return int(epoch * entry["images"] + step * entry["images"] // count)


def _map(part: Path, entry: Entry) -> tuple[label_file.Arrays, bool]:
    return label_file.create(part, entry["images"], entry["epochs"], entry["classes"], entry["top_k"])


def _store(
    path: Path, entry: Entry, recipe: Recipe, synthetic: Synthetic, teacher: Frozen, position: _Position
) -> None:
    """Write the logits of every view; a half-written file continues where its checkpoint says."""
    norm = (teacher.mean, teacher.std)
    batches = Batches(synthetic.images_u8, synthetic.labels, recipe, entry["seed"], norm, teacher.compute)
    part, count = path.with_suffix(".part"), len(batches.slices)
    arrays, _ = _map(part, entry)
    for done in range(position.done, entry["steps"]):
        epoch, step = divmod(done, count)
        batch = batches.get(epoch, step)
        _write(arrays, epoch, batch, teacher_logits(teacher, batch.x_norm, recipe.teacher_mode), entry)
        position.track.log(done + 1, entry["steps"], student=position.student)
        if position.track.due():
            _flush(arrays)
            position.send(arrays, _row(entry, done + 1))
            position.save(done + 1)
    _flush(arrays)
    position.send(arrays, _row(entry, entry["steps"]))
    part.replace(path)
    position.student += 1
    position.save(0)


def _write(arrays: label_file.Arrays, epoch: int, batch: Batch, logits: Tensor, entry: Entry) -> None:
    if entry["top_k"]:
        logits, places = compress(logits, entry["top_k"], entry["temperature"])
        arrays[label_file.PLACES][epoch, batch.part] = places.cpu().numpy()
    arrays[label_file.LOGITS][epoch, batch.part] = logits.half().cpu().numpy()


def _flush(arrays: label_file.Arrays) -> None:
    for array in arrays.values():
        array.flush()


__all__ = ["entries", "fkd_bytes", "on_the_fly", "open_source", "relabel", "stored", "stored_bytes", "teacher_logits"]
