"""All students of one cell, one after another, on the same images and labels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from distillery import labels, student
from distillery.config import Cell
from distillery.data.real import Real
from distillery.data.synthetic import Synthetic
from distillery.teacher import Frozen
from distillery.track import Track


def students(
    cell: Cell, real: Real, teacher: Frozen, synthetic: Synthetic, labels_in: Path, track: Track
) -> dict[str, Any]:
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
        The content of result.json; accuracies are fractions.
    """
    validation = real.images("val")
    entries = labels.entries(labels_in)
    found = []
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
        found.append(
            {"net": choice.net, "recipe": choice.recipe.name, "regime": choice.recipe.regime, "seed": cell.seed}
            | outcome
            | {"images": len(synthetic.labels), "image_bytes": synthetic.images_u8.numel()}
            | {"label_bytes": entry["bytes"], "fkd_bytes": entry["fkd_bytes"]}
        )
    return {
        "cell": {"id": cell.id, "dataset": cell.dataset.name, "method": cell.method, "ipc": cell.ipc}
        | {"seed": cell.seed, "options": cell.options, "labels": cell.labels.mode, "name": cell.name},
        "teacher": {"net": teacher.card.net, "accuracy": teacher.card.accuracy},
        "classes": list(real.classes),
        "students": found,
    }
