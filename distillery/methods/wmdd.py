"""WMDD: images whose features are the Wasserstein barycenter of their class, under the class's BatchNorm statistics.

Paper: Liu et al., Dataset Distillation via the Wasserstein Metric, ICCV 2025 (arXiv 2311.18531).
Implements: the whole synthesis. For each class the features of its real images (what goes into the teacher's last
linear layer) are summed up by IPC atoms, their Wasserstein barycenter (`_barycenter`); image i of the class is pulled
towards atom i, and the images of the class together towards the class's mean and variance at every BatchNorm:
L = sum_i ||f(x_i) - b_i||^2 + r_bn * mean over classes of sum_l (||m_l - M_l|| + ||v_l - V_l||), by the recover loop,
from N(0, 1), in groups of all images of floor(batch / IPC) classes.
Code: Liu-Hy/WMDD@45c2962, run.sh, recover/data_synthesis_new.py, recover/barycenter.py, recover/utils.py.
Differs: (1) paper and code differ, and the defaults are the paper's: the code takes the Frobenius norm of the group's
feature differences (`feature_loss: frobenius`) and adds the cross-entropy (`r_ce: 1`; the code calls this weight
r_wb); (2) class statistics are those of all images of a class, where the code averages the variances of batches and so
loses what batches differ by; (3) images have the data set's own size, where the code enlarges every set to 224 px;
(4) the last group may have fewer classes, where the code refuses class counts that its batch does not divide; (5) with
`weighted` the best weights are computed directly (see `_barycenter.weigh`); as in the code they weight the images in
their class's BatchNorm statistics too, and no weight in the feature loss; (6) rounded to uint8, not JPEG of quality 75.
Target: ImageNette, ResNet-18, IPC 1 / 10 / 50: 40.2 / 64.8 / 83.5; Tiny-ImageNet IPC 10 / 50: 41.8 / 59.4.

Legend: G groups, c classes of a group, s images of a class, n = c * s, D features, C channels, B = G * n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distillery.config import Count, Options, Positive, Weight, Whole
from distillery.data import augment
from distillery.data.synthetic import Synthetic
from distillery.errors import UserError
from distillery.methods import _barycenter, _matching, _recover, _selection
from distillery.methods._contract import Group, Needs, Teacher, in_order
from distillery.methods._views import ViewLaw, curriculum
from distillery.nets import head
from distillery.rng import generator

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

NEEDS = Needs(teacher=True, gpu=True, statistics=("class_bn",))
AT_ONCE = {"cpu": 32, "cuda": 256}  # real images in one forward


class Config(Options):
    """Options under the names of the official code; the defaults are the paper's for ImageNette."""

    iterations: Count = Field(2000, description="optimisation steps of each image (paper: 2000)")
    lr: Positive = Field(0.25, description="Adam's learning rate on normalised pixels (paper: 0.25; Tiny: 0.1)")
    r_bn: Weight = Field(10.0, description="weight of the class's BatchNorm statistics (ImageNette: 10; Tiny: 500)")
    first_bn: Weight = Field(1.0, description="first_bn_multiplier: times the weight at the first layer (paper: 1)")
    feature_loss: Literal["squared", "frobenius"] = Field(
        "squared", description="distance to the barycenter: summed squares (paper), or one norm of a group (code)"
    )
    r_ce: Weight = Field(0.0, description="weight of the cross-entropy (paper: none; code: 1, where it is called r_wb)")
    weighted: bool = Field(False, description="let the barycenter's weights follow the class (run.sh: no)")
    batch: Count = Field(100, description="images of a group: all of floor(batch / ipc) classes (paper: 100)")
    jitter: Whole = Field(32, description="largest roll in pixels (paper: 32; ours up to 64 px: 4)")
    crop: Literal["rrc", "none"] = Field("rrc", description="resized crop and flip, or neither (paper: rrc)")


# The paper has no set below 64 px. Ours, after SRe2L's recipe for CIFAR: no crop of images this small, short rolls, and
# Tiny's learning rate.
SMALL = {"lr": 0.1, "jitter": 4, "crop": "none"}
RECIPES: dict[tuple[str, int], dict[str, Any]] = {
    ("cifar10", 0): SMALL,
    ("cifar100", 0): SMALL,
    ("fashion_mnist", 0): SMALL,
    ("digits", 0): SMALL,
    ("tiny_imagenet", 0): {"lr": 0.1, "r_bn": 500.0, "jitter": 4},
    ("imagenette", 0): {"r_bn": 10.0},
}


def groups(cfg: Config, *, ipc: int, classes: int) -> list[Group]:
    """All images of as many classes as `batch` holds; the last group may have fewer."""
    return _recover.class_major(classes, ipc, cfg.batch)


def check(cfg: Config, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse more atoms than a class has images.

    Raises:
        UserError: names the class and both numbers.
    """
    _selection.check_enough("wmdd", ipc, per_class)


def estimate(cfg: Config, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
    """Every real image once for its features, and `iterations` forwards (and backwards) of every image."""
    return _recover.work(classes * ipc * cfg.iterations, classes * ipc, size, scored=train)


def synthesize(
    cfg: Config, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
) -> Synthetic:
    """Recover IPC images of each class from the class's barycenter.

    Returns:
        The set; with `weighted` the extra `weights` [n] float32: of each image, 1 on average over a class.

    Raises:
        UserError: a teacher without BatchNorm, without statistics of classes, or for other data; fewer real images in a
            class than IPC; or memory too small for a group.
        NonFiniteLoss: the teacher gives NaN.
    """
    check(cfg, ipc=ipc, size=real.size, per_class=real.counts("train"))
    targets = Targets(cfg, real, teacher, ipc, seed)
    recovery = declare(cfg, targets, real.size, seed)
    images_u8 = _recover.recover(recovery, real, teacher, part, seed, track)
    if not cfg.weighted:
        return _recover.as_set(images_u8, part)
    classes = sorted({cls for cls, _ in in_order(part)})
    weights = torch.cat([targets.weights(cls) for cls in classes]) * ipc
    return _recover.as_set(images_u8, part, weights=weights.float())


def declare(cfg: Config, targets: Targets, size: int, seed: int) -> _recover.Recovery:
    """What the recover loop is told."""
    flip = 0.5 if cfg.crop == "rrc" else 0.0
    return _recover.Recovery(
        name="wmdd",
        iterations=cfg.iterations,
        lr=cfg.lr,
        law=ViewLaw(cfg.crop, curriculum(cfg.iterations, "constant"), flip, cfg.jitter),
        init=_recover.noise("wmdd", seed, size),
        taps=targets.taps,
        r_ce=cfg.r_ce,
        terms={"feature loss": targets.distance},
    )


class Targets:
    """What the images of a pack are pulled towards: atoms and class statistics."""

    def __init__(self, cfg: Config, real: Real, teacher: Teacher, ipc: int, seed: int) -> None:
        self.cfg, self.real, self.teacher, self.ipc, self.seed = cfg, real, teacher, ipc, seed
        self._atoms: dict[tuple[Group, ...], Tensor] = {}
        self._weights: dict[int, Tensor] = {}

    def taps(self, member: Teacher, groups: Sequence[Group]) -> tuple[list[_matching.Tap], int]:
        """Taps with the statistics of the classes of a pack, one segment a class; prepares its atoms."""
        mean, var = _class_statistics(member, len(self.real.classes))
        rows = [cls for group in groups for cls in group.classes]
        found = [self.barycenter(cls) for cls in rows]
        atoms = torch.cat([own for own, _ in found]).view(len(groups), -1, found[0][0].shape[1])
        self._atoms[tuple(groups)] = atoms
        taps = _matching.norm_taps(
            member.net,
            r_bn=self.cfg.r_bn,
            first_bn=self.cfg.first_bn,
            per_class=(mean[rows], var[rows]),
            share=1 / len(groups[0].classes),
        )
        if self.cfg.weighted:
            shares = torch.stack([weights for _, weights in found])
            taps = [weighted_tap(tap, shares) for tap in taps]
        return taps, len(groups[0].classes)

    def distance(self, seen: _recover.Seen) -> Tensor:
        """The feature loss of each group, [G]."""
        groups = tuple(seen.groups)
        atoms = self._atoms[groups] = self._atoms[groups].to(seen.features)  # once: a copy to a GPU makes it wait
        return distance(seen.features, atoms, self.cfg.feature_loss)

    def weights(self, cls: int) -> Tensor:
        """Weights of a class's images [s], sum 1; found again where a continued run has not needed them."""
        return self._weights[cls] if cls in self._weights else self.barycenter(cls)[1]

    def barycenter(self, cls: int) -> tuple[Tensor, Tensor]:
        """Atoms [s, D] and weights [s] of a class, float64."""
        images_u8 = _selection.by_class(self.real)[cls][:]
        atoms, weights = _barycenter.barycenter(
            features(self.teacher, images_u8),
            self.ipc,
            generator(self.seed, "wmdd", "barycenter", cls),
            of=f"class {cls} ({self.real.classes[cls]})",
            weighted=self.cfg.weighted,
        )
        self._weights[cls] = weights
        return atoms, weights


def distance(features: Tensor, atoms: Tensor, kind: Literal["squared", "frobenius"]) -> Tensor:
    """Distance of features [G, n, D] to their atoms [G, n, D]: summed squares, or one norm for each group; [G]."""
    far = features - atoms
    return far.square().sum((1, 2)) if kind == "squared" else torch.linalg.vector_norm(far, dim=(1, 2))


@torch.no_grad()
def features(teacher: Teacher, images_u8: Tensor) -> Tensor:
    """What goes into the teacher's last layer for images in the evaluation view: [N, 3, R, R] uint8 -> [N, D]."""
    found = []
    for part in images_u8.split(AT_ONCE[teacher.compute.device.type]):
        x_norm = augment.evaluation_view(teacher.compute.images(part), teacher.size, teacher.mean, teacher.std)
        with teacher.compute.autocast():
            found.append(head.features(teacher.net, x_norm))
    return torch.cat(found)


def _class_statistics(member: Teacher, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [classes, channels of all BatchNorm2d] that the teacher carries."""
    try:
        mean, var = member.statistics["class_bn/mean"], member.statistics["class_bn/var"]
    except KeyError as error:
        raise UserError(
            f"wmdd reads the statistics {error} of the classes inside the teacher, and this teacher has only "
            f"{sorted(member.statistics)}; give it those of distillery.statistics.collect with kind class_bn"
        ) from error
    wanted = classes, sum(layer.num_features for layer in _matching.norms(member.net))
    if mean.shape != wanted or var.shape != wanted:
        raise UserError(
            f"wmdd: the teacher {type(member.net).__name__} has {wanted[1]} BatchNorm channels and the data set "
            f"{classes} classes, and its statistics are of {list(mean.shape)[::-1]}; they are of another net or data "
            "set: collect this teacher's own (distillery.statistics.collect)"
        )
    return mean, var


@dataclass
class WeightedTap:
    """A `MomentTap` whose images count by their weights: m = sum_i w_i m_i, v = sum_i w_i (v_i + (m_i - m)^2).

    The gradient is affine in x again, for each image by itself.

    Attributes:
        module: whose input is watched.
        mean, var: targets [K, C].
        weight: of both norms, for one segment.
        shares: weights w [K, s] of the images of a segment, sum 1.
    """

    module: nn.Module
    mean: Tensor
    var: Tensor
    weight: float
    shares: Tensor
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    state: dict[str, Tensor] = field(default_factory=dict)

    def pull(self, x: Tensor, segments: int, step: int = 0) -> Tensor:
        """See `_matching.Tap`."""
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        shares = self.shares.to(wide)[:, :, None]
        own_var, own_mean = (part.unflatten(0, (segments, -1)) for part in torch.var_mean(wide, (2, 3), correction=0))
        mean = (shares * own_mean).sum(1)
        var = (shares * (own_var + (own_mean - mean[:, None]).square())).sum(1)
        to_mean, far_mean = _matching.direction(mean - self.mean)
        to_var, far_var = _matching.direction(var - self.var)
        self.values = self.weight * (far_mean + far_var)
        each = shares * (self.weight / x[0, 0].numel())
        slope = each * 2 * to_var[:, None]
        offset = each * to_mean[:, None] - slope * mean[:, None]
        pulled: Tensor = _matching.Affine.apply(x, offset.flatten(0, 1), slope.flatten(0, 1))
        return pulled


def weighted_tap(tap: _matching.Tap, shares: Tensor) -> WeightedTap:
    """A tap with the same targets that weights its images."""
    assert isinstance(tap, _matching.MomentTap)
    return WeightedTap(tap.module, tap.mean, tap.var, tap.weight, shares)
