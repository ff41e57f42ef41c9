"""All students of one cell, one after another, on the same images and labels; and what they mistook for what."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distillery import labels, student
from distillery.config import Cell
from distillery.data.real import Real
from distillery.data.synthetic import Synthetic
from distillery.files import write_atomic
from distillery.teacher import Frozen
from distillery.track import Track

PREDICTIONS = "predictions.safetensors"


def students(
    cell: Cell, real: Real, teacher: Frozen, synthetic: Synthetic, labels_in: Path, track: Track
) -> tuple[dict[str, Any], list[list[int]]]:
    """Train and measure every student of a cell.

    A student that has finished is kept with the checkpoint, so a killed process goes on with the next one.

    Args:
        cell: names the students and the seed.
        real: its validation split measures them.
        teacher: labels on the fly, and gives the normalisation.
        synthetic: the distilled images.
        labels_in: the labels artifact.
        track: progress and checkpoints.

    Returns:
        The content of result.json (accuracies are fractions), and the predictions of each student.
    """
    validation, counts = real.images("val"), real.counts("train")
    entries = labels.entries(labels_in)
    found, predicted = [], []
    for index, choice in enumerate(cell.students):
        done = track.child(f"student-{index}-done")
        kept = done.load(quiet=True)
        if kept is None:
            training = track.child(f"student-{index}")
            outcome = asdict(
                student.train(
                    choice.net,
                    choice.net_options,
                    choice.recipe,
                    synthetic,
                    labels.open_source(labels_in, index, choice.recipe, synthetic, teacher, cell.seed),
                    teacher,
                    validation,
                    seed=cell.seed,
                    compute=teacher.compute,
                    track=training,
                )
            )
            done.save({}, outcome)
            training.clear()  # only now: a kill before this line finds one of the two
        else:
            outcome = kept[1]
        entry = entries[index]
        predicted.append(outcome.pop("predicted"))
        found.append(
            {"net": choice.net, "recipe": choice.recipe.name, "regime": choice.recipe.regime, "seed": cell.seed}
            | outcome
            | {"images": len(synthetic.labels), "image_bytes": synthetic.images_u8.numel()}
            | {"label_bytes": entry["bytes"], "fkd_bytes": entry["fkd_bytes"]}
        )
    result = {
        "cell": {"id": cell.id, "dataset": cell.dataset.name, "method": cell.method, "ipc": cell.ipc}
        | {"seed": cell.seed, "options": cell.options, "labels": cell.labels.mode, "name": cell.name},
        "teacher": {"net": teacher.card.net, "accuracy": teacher.card.accuracy}
        | {"net_options": teacher.card.net_options},
        "data": {"images": sum(counts), "bytes": sum(counts) * 3 * real.size**2, "validation": len(validation[1])},
        "classes": list(real.classes),
        "students": found,
    }
    return result, predicted


def write_predictions(predicted: list[list[int]], counts: list[int], folder: Path) -> None:
    """Leave each student's predictions beside the true classes, [M] int16 each: all confusions follow from them.

    Args:
        predicted: class given to each validation image, by student.
        counts: validation images per class (they are sorted by class).
        folder: the result artifact's.
    """
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    tensors = {"labels": owners} | {f"student-{i}": torch.tensor(own) for i, own in enumerate(predicted)}
    write_atomic(folder / PREDICTIONS, save({name: tensor.short() for name, tensor in tensors.items()}))


def confusion(folder: Path, student: int, classes: int) -> Tensor | None:
    """How many images of each class (row) a student took for which (column): [C, C] int64; None where it is unknown."""
    path = folder / PREDICTIONS
    found = load_file(path) if path.exists() else {}
    if f"student-{student}" not in found:
        return None
    owners, given = found["labels"].long(), found[f"student-{student}"].long()
    return torch.bincount(owners * classes + given, minlength=classes**2).view(classes, classes)
