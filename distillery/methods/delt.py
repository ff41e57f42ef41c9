"""DELT: images of one class start their optimisation at different times, so that they end up different.

Paper: Shen et al., DELT: A Simple Diversity-driven EarlyLate Training for Dataset Distillation, CVPR 2025.
Implements: selection and EarlyLate training. First images are the real ones around the median of the teacher's
probabilities; M = `iterations` fall into rounds of `round_iterations`; the IPC images of a class, in the order of their
selection, into as many nearly equal groups (the first ones get the extra images). Group j joins in round j and is
optimised from there to the end, so it gets M - j * RI iterations. The inner loop is CDA's; batches hold whole classes.
Code: VILA-Lab/DELT@f2f81ca, data_selection.py and recover/recover.py.
Differs: (1) `schedule`: "global" is what the code does, one learning rate, one crop curriculum and one Adam for the
whole run, where late images take first steps of (1 - b1) / sqrt(1 - b2) = 1.58 learning rates; "phase" is the paper's
text: every round is complete, with its own learning rate, curriculum and optimiser; (2) late images that have not
joined are not in the batch at all, where the code computes and zeroes their part; (3) CIFAR and Tiny are normalised
there with another mean and spread than their teacher's; here always as the teacher's; (4) uint8, not JPEG.
Target: CIFAR-10, ResNet-18 (modified), IPC 1 / 10 / 50: 24.0 / 43.0 / 64.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor

from distillery.config import Count, Fraction, Options, Positive, Weight, Whole
from distillery.data import augment
from distillery.data.synthetic import Synthetic
from distillery.errors import UserError
from distillery.methods import _recover, _selection
from distillery.methods._contract import Group, Needs, Teacher
from distillery.methods._views import ViewLaw, curriculum

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True)


class Config(Options):
    """Options under the paper's names."""

    iterations: Count = Field(4000, description="M: steps of the first images (paper: 4000)")
    round_iterations: Count = Field(500, description="RI: steps of a round (paper: 500 or 1000)")
    early_late: bool = Field(True, description="let groups of images join round by round (paper: not at IPC 1)")
    schedule: Literal["global", "phase"] = Field("global", description="one schedule for the run, or one a round")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25)")
    r_bn: Weight = Field(0.01, description="weight of the BatchNorm statistics (paper: 0.01)")
    first_bn: Weight = Field(10.0, description="first_bn_multiplier: times the weight at the first layer (paper: 10)")
    batch: int = Field(100, ge=2, description="images that are matched together, whole classes (paper: 100)")
    jitter: Whole = Field(0, description="largest roll in pixels (paper's scripts: 0)")
    flip: Fraction = Field(0.5, description="probability of a mirrored view (paper: 0.5)")
    mode: Literal["cosine", "linear", "step", "constant"] = Field(
        "cosine", description="crop curriculum (paper: cosine)"
    )


ONE = {"early_late": False}  # at IPC 1 a fixed number of iterations
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("digits", 0): {"flip": 0.0},  # ours: a mirrored 2 is no 2
    ("cifar10", 1): ONE | {"iterations": 2000},
    ("cifar100", 1): ONE | {"iterations": 2000},
    ("fashion_mnist", 1): ONE | {"iterations": 2000},
    ("digits", 1): ONE | {"iterations": 2000, "flip": 0.0},
    ("tiny_imagenet", 1): ONE | {"iterations": 500},
    ("imagenette", 1): ONE | {"iterations": 1000},
    ("imagefolder", 1): ONE | {"iterations": 3000},
}


def groups(cfg: Config, *, ipc: int, classes: int) -> list[Group]:
    """All images of as many classes as `batch` holds."""
    return _recover.class_major(classes, ipc, cfg.batch)


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse rounds that do not fit, and an IPC beyond the smallest class.

    Raises:
        UserError: names both numbers, or the class.
    """
    if cfg.early_late and cfg.iterations % cfg.round_iterations:
        raise UserError(
            f"delt: iterations {cfg.iterations} is not a multiple of round_iterations {cfg.round_iterations}; set "
            f"iterations to {max(1, cfg.iterations // cfg.round_iterations) * cfg.round_iterations}, or early_late to "
            "false"
        )
    _selection.check_enough("delt", ipc, per_class)


def starts(cfg: Config, ipc: int) -> tuple[int, ...]:
    """The iteration at which each image of a class joins, in the order of selection.

    M = 4000 and RI = 500 give means of 2550, 2310 and 2290 iterations at IPC 10, 50 and 100.
    """
    rounds = cfg.iterations // cfg.round_iterations if cfg.early_late else 1
    sizes = [ipc // rounds + (place < ipc % rounds) for place in range(rounds)]
    return tuple(place * cfg.round_iterations for place, size in enumerate(sizes) for _ in range(size))


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """Scoring of the real images, then each image's own iterations."""
    images = classes * ipc
    steps = classes * sum(cfg.iterations - at for at in starts(cfg, ipc))
    found = _recover.work(steps, images, size, scored=train)
    scoring = _selection.scoring_bytes(_selection.UNIT, size)
    return found | {"peak_bytes": max(scoring + images * 3 * size * size, found["peak_bytes"])}


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Recover IPC images of each class, early ones long, late ones briefly.

    Raises:
        UserError: a teacher without BatchNorm, for other data, or memory too small for a group.
        NonFiniteLoss: names group, step and term.
    """
    counts, classes = real.counts("train"), _recover.classes_in(part)
    check(cfg, ipc=ipc, size=real.size, per_class=counts)

    def medians(own: Track) -> dict[int, Tensor]:
        chosen, _ = _selection.around_medians(real, teacher, classes, ipc, own)
        images = _selection.by_class(real)
        return {cls: augment.centre_crop(images[cls][chosen[cls]], real.size) for cls in classes}

    rounds = cfg.iterations // cfg.round_iterations if cfg.early_late and cfg.schedule == "phase" else 1
    length = cfg.iterations // rounds
    recovery = _recover.Recovery(
        name="delt",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw("rrc", curriculum(length, cfg.mode).repeat(rounds), cfg.flip, cfg.jitter),
        init=_recover.given(_recover.once(track, medians), teacher),
        r_bn=cfg.r_bn,
        first_bn=cfg.first_bn,
        factor=_recover.cosine(length).repeat(rounds),
        starts=starts(cfg, ipc),
        restarts=tuple(range(0, cfg.iterations, length)),
    )
    return _recover.as_set(_recover.recover(recovery, real, teacher, part, seed, track), part)
