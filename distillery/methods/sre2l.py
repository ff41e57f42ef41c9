"""SRe2L: squeeze, recover, relabel. Images from noise that a teacher classifies and finds its statistics in.

Paper: Yin et al., Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective,
NeurIPS 2023 (arXiv 2306.13092).
Implements: the recover stage. Batches of one image of each of up to `batch` classes, from N(0, 1); each iteration one
view (resized crop and flip where the data set's recipe has one, roll), CE + r_bn * R_BN, Adam.
Code: VILA-Lab/SRe2L@8d00cba, SRe2L/recover.
Differs: (1) the last iterate is rounded to uint8, not written as JPEG of quality 75; (2) the image priors (tv, l2),
whose weights are 0 in all the published scripts, are left out.
Target: CIFAR-10, ResNet-18 (modified), IPC 10 / 50: 29.3 / 45.0 in RDED's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distillery.config import Count, Options, Positive, Weight, Whole
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

    iterations: Count = Field(4000, description="optimisation steps of each image (paper: 4000; CIFAR-100: 1000)")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25; Tiny: 0.1)")
    r_bn: Weight = Field(0.01, description="weight of the BatchNorm statistics (paper: 0.01; Tiny: 1)")
    first_bn: Weight = Field(10.0, description="first_bn_multiplier: times the weight at the first layer (paper: 10)")
    batch: int = Field(100, ge=2, description="classes whose images are matched together (paper: 100)")
    jitter: Whole = Field(32, description="largest roll in pixels (paper: 32; up to 64 px: 4)")
    crop: Literal["rrc", "none"] = Field(
        "rrc", description="resized crop and flip, or neither (paper: CIFAR has neither)"
    )


SMALL = {"iterations": 1000, "jitter": 4, "crop": "none"}
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("cifar10", 0): SMALL,
    ("cifar100", 0): SMALL,
    ("fashion_mnist", 0): SMALL,
    ("digits", 0): SMALL,
    ("tiny_imagenet", 0): {"lr": 0.1, "r_bn": 1.0, "jitter": 4},
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
    """Recover IPC images of each class.

    Raises:
        UserError: a teacher without BatchNorm, for other data, or memory too small for a group.
        NonFiniteLoss: names group, step and term.
    """
    cropped = cfg.crop == "rrc"
    recovery = _recover.Recovery(
        name="sre2l",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw(cfg.crop, curriculum(cfg.iterations, "constant"), 0.5 if cropped else 0.0, cfg.jitter),
        init=_recover.noise("sre2l", seed, real.size),
        r_bn=cfg.r_bn,
        first_bn=cfg.first_bn,
    )
    return _recover.as_set(_recover.recover(recovery, real, teacher, part, seed, track), part)
