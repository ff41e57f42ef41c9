"""Random real images: the first baseline of every report.

Paper: none; the usual "random" row of the field's tables.
Implements: IPC distinct real images of each class, drawn uniformly. The set of a smaller IPC is the beginning of the
set of a larger one with the same seed.
Code: none.
Differs: (1) photos are resized to a shorter side of S // 7 * 8 and cropped centrally to S, as at evaluation.
Target: none; it is what other methods are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from distillery.config import Options
from distillery.data.synthetic import Synthetic
from distillery.methods import _selection
from distillery.methods._contract import Group, Needs, Teacher, classwise

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=False, gpu=False)
groups = classwise
RECIPES: dict[tuple[str, int], dict[str, Any]] = {}


class Config(Options):
    """No options."""


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse an IPC beyond the smallest class.

    Raises:
        UserError: names the class.
    """
    _selection.check_enough("random", ipc, per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """No teacher; the images themselves."""
    return {"forwards": 0, "peak_bytes": classes * ipc * 3 * size * size}


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Draw IPC real images of each class.

    Returns:
        The set; extras: `sources` [C * K, 1], the place of each image in its class.
    """
    classes, counts = [group.classes[0] for group in part], real.counts("train")
    check(cfg, ipc=ipc, size=real.size, per_class=counts)
    images, sources = [], []
    for done, cls in enumerate(classes, start=1):
        drawn, chosen = _selection.draw_real("random", real, cls, ipc, seed)
        images.append(drawn)
        sources.append(chosen)
        track.log(done, len(classes), what="classes drawn")
    labels = torch.tensor(classes, dtype=torch.int64).repeat_interleave(ipc)
    return Synthetic(torch.cat(images), labels, {"sources": torch.cat(sources)[:, None]})
