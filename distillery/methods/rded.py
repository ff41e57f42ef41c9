"""RDED: the crops of real images that the teacher finds most realistic, four to an image.

Paper: Sun et al., On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm,
CVPR 2024 (arXiv 2312.03526).
Implements: the whole selection. For each class: `mipc` random real images, `num_crop` random square crops of each;
the score of a crop is the teacher's cross-entropy with the class (low = realistic); the best crop of each image is
kept, the best IPC * N of those are tiled into IPC images of N = factor^2 patches.
Code: LINs-lab/RDED@3f6453d, synthesize/main.py and synthesize/utils.py.
Differs: (1) images are kept as uint8, rounded, where the official code writes truncated values as JPEG; (2) each class
has its own random stream; (3) `patches_per_image` takes several crops of an image when IPC asks for more patches than
there are images, as DELT's fork of the code does; (4) the tiles are cut again from the real images at the end, so that
only scores are kept while scoring.
Target: CIFAR-10, ConvNet-3 teacher and student, IPC 10: 50.2 (Table 2), with an 82.2 % teacher.

Legend: P real images of a class, m crops of each, N tiles per image, K ipc, S side, s = S / factor side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from distillery.data.synthetic import Synthetic
from distillery.methods import _patches, _selection
from distillery.methods._contract import Group, Needs, Teacher, classwise

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)
groups = classwise
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("tiny_imagenet", 200): {"mipc": 600},  # InfoUtil's reproduction at IPC 200
}


class Config(_patches.Options):
    """Options under the names of the official code."""


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse what cannot give IPC * N patches of each class.

    Raises:
        UserError: names the numbers and the ways out.
    """
    _patches.check("rded", cfg, ipc=ipc, size=size, per_class=per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """`mipc` * `num_crop` teacher forwards per class, or fewer where a class has fewer than `mipc` images."""
    memory = _selection.scoring_bytes(_patches.PIXELS_AT_ONCE * cfg.num_crop, size) + classes * ipc * 3 * size * size
    return {"forwards": _patches.forwards(cfg, classes, train), "peak_bytes": memory}


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Select and tile the most realistic patches of each class.

    Returns:
        The set; extras, one row per image and one column per tile: `sources` (place of the real image in its class),
        `boxes` (top, left, height, width there) and `scores`.

    Raises:
        UserError: not enough patches, or a teacher for other data.
        NonFiniteLoss: the teacher gives NaN.
    """
    classes = [group.classes[0] for group in part]
    found = _patches.select("rded", cfg, real, teacher, ipc=ipc, seed=seed, classes=classes, track=track)
    labels = torch.tensor(classes, dtype=torch.int64).repeat_interleave(ipc)
    extras = {"sources": found.sources, "boxes": found.boxes, "scores": found.scores}
    return Synthetic(found.images_u8, labels, extras)
