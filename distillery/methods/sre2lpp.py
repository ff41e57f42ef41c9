"""SRe2L++: SRe2L from real patches of medium score, with crops on every data set.

Paper: the strengthened baseline in Cui et al., Dataset Distillation via Committee Voting (CV-DD, arXiv 2501.07575).
Implements: the recover stage. First images are RDED's patches from the middle of the teacher's ranking; then SRe2L's
batches and loss, with resized crop, flip and roll at every size. Its labels (BSSL: a teacher in train mode, on batches
in two halves) and its small batches are the student recipe `sre2lpp`.
Code: Jiacheng8/CV-DD@24097e9, recover, model setting 0.
Differs: (1) the last iterate is rounded to uint8, not written as JPEG; (2) "medium" is the middle of the ranking of
each image's best crop.
Target: CIFAR-10, ResNet-18 (modified), IPC 1 / 10 / 50: 24.4 / 42.5 / 63.0 (from a figure).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor

from distillery.config import Count, Fraction, Positive, Weight, Whole
from distillery.data.synthetic import Synthetic
from distillery.methods import _patches, _recover, _selection
from distillery.methods._contract import Group, Needs, Teacher
from distillery.methods._views import ViewLaw, curriculum

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)


class Config(_patches.Options):
    """Options under the names of the official code."""

    iterations: Count = Field(4000, description="optimisation steps of each image (paper: 4000)")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25)")
    r_bn: Weight = Field(0.01, description="weight of the BatchNorm statistics (paper: 0.01)")
    first_bn: Weight = Field(10.0, description="first_bn_multiplier: times the weight at the first layer (paper: 10)")
    batch: int = Field(100, ge=2, description="classes whose images are matched together (paper: 100)")
    jitter: Whole = Field(32, description="largest roll in pixels (paper: 32; up to 64 px: 4)")
    flip: Fraction = Field(0.5, description="probability of a mirrored view (paper: 0.5)")
    init: Literal["medium", "easy"] = Field(
        "medium", description="first images: patches from the middle of the ranking, or the most realistic ones"
    )


SMALL = {"jitter": 4}
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("cifar10", 0): SMALL,
    ("cifar100", 0): SMALL,
    ("fashion_mnist", 0): SMALL,
    ("digits", 0): SMALL | {"flip": 0.0},
    ("tiny_imagenet", 0): SMALL,
}


def groups(cfg: Config, *, ipc: int, classes: int) -> list[Group]:
    """One image of each of up to `batch` classes."""
    return _recover.one_per_class(classes, ipc, cfg.batch)


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse what cannot give IPC * N patches of each class.

    Raises:
        UserError: names the numbers and the ways out.
    """
    _patches.check("sre2lpp", cfg, ipc=ipc, size=size, per_class=per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """RDED's scoring, then `iterations` forwards (and backwards) of every image."""
    images = classes * ipc
    found = _recover.work(images * cfg.iterations, images, size, scored=_patches.forwards(cfg, classes, train))
    scoring = _selection.scoring_bytes(_patches.PIXELS_AT_ONCE * cfg.num_crop, size)
    return found | {"peak_bytes": max(scoring + images * 3 * size * size, found["peak_bytes"])}


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Recover IPC images of each class from real patches.

    Raises:
        UserError: a teacher without BatchNorm, for other data, or memory too small for a group.
        NonFiniteLoss: names group, step and term.
    """
    classes = _recover.classes_in(part)

    def patches(own: Track) -> dict[int, Tensor]:
        found = _patches.select(
            "sre2lpp",
            cfg,
            real,
            teacher,
            ipc=ipc,
            seed=seed,
            classes=classes,
            track=own,
            medium=cfg.init == "medium",
        )
        return dict(zip(classes, found.images_u8.split(ipc), strict=True))

    recovery = _recover.Recovery(
        name="sre2lpp",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw("rrc", curriculum(cfg.iterations, "constant"), cfg.flip, cfg.jitter),
        init=_recover.given(_recover.once(track, patches), teacher),
        r_bn=cfg.r_bn,
        first_bn=cfg.first_bn,
    )
    return _recover.as_set(_recover.recover(recovery, real, teacher, part, seed, track), part)
