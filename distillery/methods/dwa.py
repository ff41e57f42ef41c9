"""DWA: each batch meets a teacher whose weights were pushed away from it, so that it adds what is missing.

Paper: Du et al., Diversity-Driven Synthesis: Enhancing Dataset Distillation through Directed Weight Adjustment,
NeurIPS 2024 (arXiv 2409.17612).
Implements: the synthesis. SRe2L's batches from real images; before a batch, K steps of rho / K up the normalised global
gradient of its CE (all parameters, one fixed view, buffers untouched), which start afresh from the teacher for every
batch; then CE + r_bn * sum_l w_l (||mean_l - RM_l|| + r_var ||var_l - RV_l||) with the original statistics as targets.
Code: AngusDujw/Diversity-Driven-Synthesis@c5b125f, distillation/.
Differs: (1) the official ImageNet script lets the adjustments of one image's class chunks pile up; here every batch
has its own, as in the paper's formula; (2) its first Adam step also holds the gradients of the K ascent steps; (3)
CIFAR-10 is normalised there with another spread than at training; here always as the teacher's; (4) photos are cropped
to a square as at evaluation, where the code squeezes them into one; (5) uint8, not JPEG.
Target: CIFAR-10, ResNet-18 (modified), IPC 10 / 50: 32.6 / 53.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distillery.config import Count, Options, Positive, Weight, Whole
from distillery.data.synthetic import Synthetic
from distillery.methods import _recover, _selection
from distillery.methods._contract import Group, Needs, Teacher
from distillery.methods._views import ViewLaw, curriculum

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)


class Config(Options):
    """Options under the paper's symbols; the defaults are those of ImageNet-1K."""

    K: Count = Field(15, description="steps of the weight adjustment (paper: 15; up to 64 px: 12)")
    rho: Positive = Field(0.015, description="length of the weight adjustment (paper: 0.015)")
    iterations: Count = Field(2000, description="optimisation steps of each image (paper: 2000; CIFAR: 1000)")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25; Tiny: 0.1)")
    r_bn: Weight = Field(0.01, description="weight of the BatchNorm statistics (paper: 0.01)")
    r_var: Weight = Field(2.0, description="lambda_var: weight of variances against means (paper: 2; up to 64 px: 11)")
    first_bn: Weight = Field(10.0, description="first_bn_multiplier: times the weight at the first layer (paper: 10)")
    batch: int = Field(100, ge=2, description="classes whose images are matched together (paper: 100; Tiny: 200)")
    jitter: Whole = Field(32, description="largest roll in pixels (paper: 32; up to 64 px: 4)")
    crop: Literal["rrc", "none"] = Field(
        "rrc", description="resized crop and flip, or neither (paper: CIFAR has neither)"
    )


SMALL = {"K": 12, "r_var": 11.0, "iterations": 1000, "jitter": 4, "crop": "none"}
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("cifar10", 0): SMALL,
    ("cifar100", 0): SMALL,
    ("fashion_mnist", 0): SMALL,
    ("digits", 0): SMALL,
    ("tiny_imagenet", 0): SMALL | {"lr": 0.1, "iterations": 2000, "batch": 200, "crop": "rrc"},
}


def groups(cfg: Config, *, ipc: int, classes: int) -> list[Group]:
    """One image of each of up to `batch` classes."""
    return _recover.one_per_class(classes, ipc, cfg.batch)


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse an IPC beyond the smallest class.

    Raises:
        UserError: names the class.
    """
    _selection.check_enough("dwa", ipc, per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """`iterations` forwards and K more of every image."""
    return _recover.work(classes * ipc * (cfg.iterations + cfg.K), classes * ipc, size)


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Recover IPC images of each class from real ones, each batch against its own adjusted weights.

    Raises:
        UserError: a teacher without BatchNorm, for other data, or memory too small for a group.
        NonFiniteLoss: names group, step and term.
    """
    counts = real.counts("train")
    check(cfg, ipc=ipc, size=real.size, per_class=counts)
    cropped = cfg.crop == "rrc"
    recovery = _recover.Recovery(
        name="dwa",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw(cfg.crop, curriculum(cfg.iterations, "constant"), 0.5 if cropped else 0.0, cfg.jitter),
        init=_recover.given(_selection.random_images("dwa", real, _recover.classes_in(part), ipc, seed), teacher),
        r_bn=cfg.r_bn,
        r_var=cfg.r_var,
        first_bn=cfg.first_bn,
        ascent=(cfg.rho, cfg.K),
    )
    return _recover.as_set(_recover.recover(recovery, real, teacher, part, seed, track), part)
