"""CDA: SRe2L whose crops begin with the whole image and shrink as the images take shape.

Paper: Yin and Shen, Dataset Distillation via Curriculum Data Synthesis in Large Data Era, TMLR 2024 (arXiv 2311.18838).
Implements: the recover stage. SRe2L's batches and loss; the lower bound of the crop area falls from 1 to 0.08 over the
first `milestone` of the iterations, as a cosine, a line or a step.
Code: VILA-Lab/SRe2L@8d00cba, CDA/.
Differs: (1) the last iterate is rounded to uint8, not written as JPEG; (2) CIFAR scripts are not published: the
settings here are SRe2L's for CIFAR-100 with CDA's crops.
Target: Tiny-ImageNet, ResNet-18, IPC 50: 48.7; CIFAR-100, ResNet-18, IPC 10: 49.8 (both from figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distillery.config import Count, Fraction, Options, Positive, Weight, Whole
from distillery.data.synthetic import Synthetic
from distillery.methods import _recover
from distillery.methods._contract import Group, Needs, Teacher
from distillery.methods._views import ViewLaw, curriculum

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)


class Config(Options):
    """Options under the names of the official code; the defaults are those of ImageNet-1K."""

    iterations: Count = Field(4000, description="optimisation steps of each image (paper: 4000)")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25; Tiny: 0.4)")
    r_bn: Weight = Field(0.01, description="weight of the BatchNorm statistics (paper: 0.01; Tiny: 0.05)")
    first_bn: Weight = Field(10.0, description="first_bn_multiplier: times the weight at the first layer (paper: 10)")
    batch: int = Field(100, ge=2, description="classes whose images are matched together (paper: 100)")
    jitter: Whole = Field(32, description="largest roll in pixels (paper: 32; up to 64 px: 4)")
    flip: Fraction = Field(0.5, description="probability of a mirrored view (paper: 0.5)")
    mode: Literal["cosine", "linear", "step"] = Field(
        "cosine", description="how the crop's bound falls (paper: cosine)"
    )
    milestone: float = Field(1.0, gt=0, le=1, description="share of the iterations until the bound is 0.08 (paper: 1)")


RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("cifar10", 0): {"iterations": 1000, "jitter": 4},
    ("cifar100", 0): {"iterations": 1000, "jitter": 4},
    ("fashion_mnist", 0): {"iterations": 1000, "jitter": 4},
    ("digits", 0): {"iterations": 1000, "jitter": 4, "flip": 0.0},
    ("tiny_imagenet", 0): {"lr": 0.4, "r_bn": 0.05, "jitter": 4},
}


def groups(cfg: Config, *, ipc: int, classes: int) -> list[Group]:
    """One image of each of up to `batch` classes."""
    return _recover.one_per_class(classes, ipc, cfg.batch)


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Nothing depends on the data: images come from noise."""


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """`iterations` forwards (and backwards) of every image."""
    return _recover.work(classes * ipc * cfg.iterations, classes * ipc, size)


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Recover IPC images of each class under the curriculum.

    Raises:
        UserError: a teacher without BatchNorm, for other data, or memory too small for a group.
        NonFiniteLoss: names group, step and term.
    """
    recovery = _recover.Recovery(
        name="cda",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw("rrc", curriculum(cfg.iterations, cfg.mode, cfg.milestone), cfg.flip, cfg.jitter),
        init=_recover.noise("cda", seed, real.size),
        r_bn=cfg.r_bn,
        first_bn=cfg.first_bn,
    )
    return _recover.as_set(_recover.recover(recovery, real, teacher, part, seed, track), part)
