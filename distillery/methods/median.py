"""Median-probability real images: the second baseline, and where DELT starts its optimisation from.

Paper: DELT, Diversity-Driven Synthesis with EarlyLate training, CVPR 2025.
Implements: the selection step alone. Real images of a class are ordered by the teacher's probability of that class;
the IPC images around the middle of the order are taken, alternating to both sides.
Code: VILA-Lab/DELT@f2f81ca, data_selection.py.
Differs: (1) the order is by log probability in float32, which also tells apart probabilities that round to 1;
(2) ties keep the order of the files; (3) with an even number of images the upper one of the two middle ones is first.
Target: none published for the selection alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from distillery.config import Options
from distillery.data import augment
from distillery.data.synthetic import Synthetic
from distillery.methods import _selection
from distillery.methods._contract import Group, Needs, Teacher, classwise

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)
groups = classwise
RECIPES: dict[tuple[str, int], dict[str, Any]] = {}


class Config(Options):
    """No options."""


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse an IPC beyond the smallest class.

    Raises:
        UserError: names the class.
    """
    _selection.check_enough("median", ipc, per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """One teacher forward per real training image."""
    memory = _selection.scoring_bytes(_selection.UNIT, size) + classes * ipc * 3 * size * size
    return {"forwards": train, "peak_bytes": memory}


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Take the IPC images of each class that are nearest to the median of the teacher's probabilities.

    Returns:
        The set, the median first; extras: `sources` [C * K, 1], the place of each image in its class, and `scores`
        [C * K, 1], its -log probability. The seed changes nothing.

    Raises:
        UserError: IPC beyond the smallest class, or a teacher for other data.
        NonFiniteLoss: the teacher gives NaN.
    """
    classes, counts = [group.classes[0] for group in part], real.counts("train")
    check(cfg, ipc=ipc, size=real.size, per_class=counts)
    chosen, scores = _selection.around_medians(real, teacher, classes, ipc, track)
    images = _selection.by_class(real)
    return Synthetic(
        torch.cat([augment.centre_crop(images[cls][chosen[cls]], real.size) for cls in classes]).contiguous(),
        torch.tensor(classes, dtype=torch.int64).repeat_interleave(ipc),
        {
            "sources": torch.cat([chosen[cls] for cls in classes])[:, None],
            "scores": torch.cat([scores[cls][chosen[cls]] for cls in classes])[:, None],
        },
    )
