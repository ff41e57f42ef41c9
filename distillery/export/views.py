"""Every view that a student was shown, as plain arrays, and the teacher's answer to it.

E epochs, N images, T steps of an epoch, C classes. `steps[t]` in set.json says which positions of an epoch step t has:
from the first number to before the second. A recipe that does not use an array does not have it.

    order.npy     int32 [E, N]        image at each position of an epoch
    box.npy       int16 [E, N, 4]     top, left, height, width of the resized crop
    shift.npy     int16 [E, N, 2]     top, left of a plain crop in the image, zero-padded by `crop_pad` on each side
    flip.npy      uint8 [E, N]        1: mirrored left to right
    partner.npy   int32 [E, N]        place in the same step of the image mixed into this one
    mix_box.npy   int16 [E, T, 4]     CutMix: top, left, bottom, right of what comes from the partner
    own.npy       float64 [E, T]      share of the image itself (CutMix: of the area; MixUp: of every pixel)
    strips.npy    int16 [E, N, 2, f]  which column strip, and which row strip, comes to each place
    ops.npy       int32 [E, N, n]     RandAugment's operations
    dsa_u.npy     float32 [E, N, 3]   DSA's random numbers; dsa_group.npy uint8 [E, T]: which transform
    logits.npy    float16 [E, N, C]   the teacher's logits of the view at each position
    places.npy    int32 [E, N, K]     top-k labels: classes of the first K logits, the last logit is all others'

Applied in the order RandAugment, strips, crop, flip, normalise, DSA, mix. The header of each file is 128 bytes long.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillery import labels
from distillery.config import Recipe
from distillery.data import dsa, label_file
from distillery.data.augment import Views
from distillery.data.batches import Batches
from distillery.errors import CorruptArtifact
from distillery.files import disk
from distillery.teacher import Frozen

FOLDER, HEADER = "views", 128
NAMES = {"order", "box", "shift", "flip", "partner", "mix_box", "own", "strips", "ops", "dsa_u", "dsa_group"} | {
    "logits",
    "places",
}
Arrays = dict[str, np.ndarray[Any, Any]]
Log = Callable[[int, int], None]


def create(path: Path, kind: str, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An .npy file of zeros to be filled in place; its bytes are there from the beginning.

    Raises:
        StoreError, UserError: the disk is full or not writable.
    """
    dtype = np.dtype(kind)
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    head = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode().ljust(HEADER - 11) + b"\n"
    assert len(head) == HEADER, f"the header of {path.name} has {len(head)} bytes"
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, HEADER + math.prod(shape) * dtype.itemsize)  # a full disk is a SIGBUS
            file.write(head)
    return np.memmap(path, dtype, "r+", HEADER, shape)


def write(path: Path, values: np.ndarray[Any, Any]) -> None:
    """One array as an .npy file with a header of 128 bytes."""
    file = create(path, values.dtype.str, values.shape)
    file[...] = values
    file.flush()


def record(
    folder: Path, batches: Batches, recipe: Recipe, teacher: Frozen | None, stored: Path | None, log: Log
) -> list[str]:
    """Write all views of a training, with the teacher's logits where the recipe asks for soft labels.

    Args:
        folder: gets the files of this module's head.
        batches: of the student.
        recipe: its recipe.
        teacher: answers the views; not needed where its answers are stored.
        stored: a label file of `labels.relabel`.
        log: hears how many steps are done, of how many.

    Returns:
        The names of the arrays.
    """
    epochs, slices = recipe.epochs, batches.slices
    count, total = slices[-1].stop, recipe.epochs * len(slices)
    arrays: Arrays = {"order": create(folder / "order.npy", "<i4", (epochs, count))}
    for epoch in range(epochs):
        arrays["order"][epoch] = batches.order(epoch).cpu().numpy()
        for step, part in enumerate(slices):
            for name, (kind, values) in _values(recipe, batches.views(epoch, step)).items():
                each = name not in ("mix_box", "own", "dsa_group")
                if name not in arrays:
                    shape = (count, *values.shape[1:]) if each else (len(slices), *values.shape)
                    arrays[name] = create(folder / f"{name}.npy", kind, (epochs, *shape))
                arrays[name][epoch, part if each else step] = values
            if recipe.regime == "soft" and stored is None:
                assert teacher is not None, "views of a soft recipe without a teacher or stored labels"
                batch = batches.get(epoch, step)
                logits = labels.teacher_logits(teacher, batch.x_norm, recipe.teacher_mode).half().cpu().numpy()
                if "logits" not in arrays:
                    arrays["logits"] = create(folder / "logits.npy", "<f2", (epochs, count, logits.shape[1]))
                arrays["logits"][epoch, part] = logits
            log(epoch * len(slices) + step + 1, total)
    if recipe.regime == "soft" and stored is not None:
        _copy(folder, stored, epochs, count, arrays)
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return sorted(arrays)


def _values(recipe: Recipe, views: Views) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """The drawn parameters of one step by name, with the type that they are kept as."""
    found: dict[str, tuple[str, Any]] = {}
    if recipe.views.crop == "rrc":
        whole = torch.tensor([[0, 0, views.source, views.source]]).expand(_images(recipe, views), 4)
        found["box"] = "<i2", (views.boxes if views.boxes.numel() else whole).numpy()
    if views.shift.numel():
        found["shift"] = "<i2", views.shift.numpy()
    if views.flip.numel():
        found["flip"] = "|u1", views.flip.numpy()
    if views.strips.numel():
        found["strips"] = "<i2", views.strips.numpy()
    if views.ops.numel():
        found["ops"] = "<i4", views.ops.T.numpy()
    if views.partner.numel():
        found["partner"] = "<i4", views.partner.numpy()
        found["own"] = "<f8", np.array(views.own)
        if recipe.views.mix == "cutmix":
            found["mix_box"] = "<i2", np.array(views.mix_box)
    if views.dsa_group:
        found["dsa_u"] = "<f4", views.dsa_u.numpy()
        found["dsa_group"] = "|u1", np.array(dsa.groups(recipe.views.dsa).index(views.dsa_group))
    return found


def read(recipe: Recipe, arrays: Arrays, size: int, epoch: int, step: int, part: slice) -> Views:
    """The views of one step out of the recorded arrays: what `record` was given."""

    def each(name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        found = arrays[name][epoch, part] if name in arrays else np.empty(0, np.int64)
        return torch.from_numpy(np.array(found)).to(dtype)  # a map may not be written to

    boxes, ops = each("box"), each("ops")
    whole = torch.tensor([0, 0, size, size])
    box = arrays["mix_box"][epoch, step].tolist() if "mix_box" in arrays else (0, 0, 0, 0)
    group = dsa.groups(recipe.views.dsa)[int(arrays["dsa_group"][epoch, step])] if "dsa_group" in arrays else ""
    return Views(
        size=size,
        source=size,
        shift=each("shift"),
        boxes=boxes[:0] if boxes.numel() and bool((boxes == whole).all()) else boxes,
        flip=each("flip", torch.bool),
        strips=each("strips"),
        partner=each("partner"),
        ops=ops.T if ops.numel() else ops,
        dsa_u=each("dsa_u", torch.float32),
        dsa_group=group,
        mix_box=(box[0], box[1], box[2], box[3]),
        own=float(arrays["own"][epoch, step]) if "own" in arrays else 1.0,
    )


def _images(recipe: Recipe, views: Views) -> int:
    """How many images a step has whose boxes are all the whole image."""
    for kept in (views.boxes, views.flip, views.partner):
        if kept.numel():
            return len(kept)
    return 1  # broadcast over the step


def _copy(folder: Path, stored: Path, epochs: int, count: int, arrays: Arrays) -> None:
    """Labels that the run stored, as they are."""
    file = label_file.Reader(stored)
    for name, kind in ((label_file.LOGITS, "<f2"), (label_file.PLACES, "<i4")):
        if name == label_file.PLACES and not file.top_k:
            continue
        for epoch in range(epochs):
            values = file.read(name, epoch, slice(0, count)).numpy()
            if len(values) != count:
                raise CorruptArtifact(f"{stored}: {name} of {len(values)} views, but {count} were shown; relabel again")
            if name not in arrays:
                arrays[name] = create(folder / f"{name}.npy", kind, (epochs, *values.shape))
            arrays[name][epoch] = values
