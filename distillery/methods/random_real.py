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
from torch import Tensor

from distillery.config import Options
from distillery.data.synthetic import Synthetic
from distillery.methods._contract import Group, Needs, Teacher, classwise
from distillery.methods._selection import by_class, check_enough
from distillery.rng import generator

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
    check_enough("random", ipc, per_class)


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
    pixels = by_class(real) if real.kind == "pixels" else []
    images, sources = [], []
    for done, cls in enumerate(classes, start=1):
        chosen = torch.randperm(counts[cls], generator=generator(seed, "random", cls))[:ipc]
        images.append(pixels[cls][chosen] if pixels else _whole(real, cls, chosen.tolist()))
        sources.append(chosen)
        track.log(done, len(classes), what="classes drawn")
    labels = torch.tensor(classes, dtype=torch.int64).repeat_interleave(ipc)
    return Synthetic(torch.cat(images), labels, {"sources": torch.cat(sources)[:, None]})


def _whole(real: Real, cls: int, indices: list[int]) -> Tensor:
    """Photos as the evaluation sees them: [n, 3, S, S] uint8."""
    short = real.size // 7 * 8
    from torchvision.transforms.v2 import functional  # here, because the import takes seconds

    resized = [functional.resize(image, [short], antialias=True) for image in real.read("train", cls, indices)]
    return torch.stack([functional.center_crop(image, [real.size, real.size]) for image in resized])
