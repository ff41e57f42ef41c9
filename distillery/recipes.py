"""Named recipes: how students are trained in the papers, and the two fair ones every method is compared under.

A preset is a function of the case (data set, IPC, image size, net), because the papers choose batch, learning rate
and schedule by it. Numbers come from the official code or the paper named at each preset; where a paper is silent the
line says "ours". Image sizes decide the column: up to 48 px the CIFAR one, up to 64 px Tiny-ImageNet's, above it
ImageNet's. Every preset uses one teacher and the teacher's normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distillery.config import Recipe, ViewPolicy, parse
from distillery.data import dsa, randaugment
from distillery.errors import UserError, choices, nearest

Fields = dict[str, Any]


class Case(NamedTuple):
    """What a preset may look at."""

    dataset: str
    classes: int
    ipc: int
    size: int
    net: str

    @property
    def column(self) -> str:
        """The column of the papers' tables: cifar, tiny or photos."""
        return "cifar" if self.size <= 48 else "tiny" if self.size <= 64 else "photos"

    @property
    def images(self) -> int:
        """Synthetic images in the whole set."""
        return self.classes * self.ipc


def by_ipc(ipc: int, one: Any, ten: Any, fifty: Any) -> Any:
    """The entry for IPC 1, 10 or 50; other values take the largest published IPC below them (ours)."""
    return one if ipc < 10 else ten if ipc < 50 else fifty


ADAMW: Fields = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
RRC: Fields = {"crop": "rrc", "crop_scale": [0.08, 1.0], "flip": 0.5}
PAD: Fields = {"crop": "pad", "crop_pad": 4, "flip": 0.5}
CUTMIX: Fields = {"mix": "cutmix", "mix_alpha": 1.0}
MIXUP: Fields = {"mix": "mixup", "mix_alpha": 0.8}

RDED_LR = {  # RDED argument.py; everything else 1e-3
    "vgg11": 5e-4,
    "efficientnet_b0": 2e-3,
    "mobilenet_v2": 2.5e-3,
    "alexnet": 1e-4,
    "vit_b_16": 1e-4,
    "swin_v2_t": 1e-4,
}


def rded(case: Case) -> Fields:
    """RDED (arXiv 2312.03526), validation/main.py and argument.py.

    The official loop forwards each batch twice in train mode, so its BatchNorm statistics move as with momentum
    1 - 0.9^2 = 0.19. The mosaic factor f is 1 up to 64 px and 2 above: patches are shuffled and crops keep at least
    1/f of the area; with f = 1 only flip and CutMix remain.
    """
    batch = by_ipc(case.ipc, 10, 50, 100) * (2 if case.classes in (100, 1000) else 1)
    lr = RDED_LR.get(case.net, 1e-3)
    if case.column == "tiny":
        batch = 100
    if case.classes == 100 and case.column == "cifar" and case.net == "convnet3":
        batch, lr = 25, 2e-3
    crop: Fields = {"crop": "none"}
    if case.column == "photos":
        crop = {"crop": "rrc", "crop_scale": [0.5, 1.0], "shuffle_patches": 2}
    return {
        **ADAMW,
        "lr": lr,
        "decay_filter": "matrices",
        "batch": batch,
        "zeta": 2.0,
        "bn_momentum": 0.19,
        "views": {"flip": 0.5, **crop, **CUTMIX},
    }


def sre2l(case: Case) -> Fields:
    """SRe2L (NeurIPS 2023): FKD for photos, train_kd.py for Tiny, and on CIFAR a teacher that stays in train mode."""
    if case.column == "cifar":
        mixed = {"temperature": 30.0, "teacher_mode": "train", "views": {**PAD, **MIXUP}}
        return {**ADAMW, "epochs": 400, "batch": 128, **mixed}
    if case.column == "tiny":
        return {**_tiny_sgd(), "epochs": 100, "batch": 256, "views": RRC}
    return {**ADAMW, "batch": 1024, "views": {**RRC, **CUTMIX}}


def _tiny_sgd() -> Fields:
    """Student of the Tiny-ImageNet code of SRe2L and DWA: SGD, five warm-up epochs from lr / 100, KL times T^2."""
    sgd = {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4}
    return {**sgd, "warmup_epochs": 5, "kl_t2": True}


def dwa(case: Case) -> Fields:
    """DWA (NeurIPS 2024), validation scripts; the CIFAR teacher never leaves train mode; CIFAR crop as SRe2L (ours)."""
    if case.column == "cifar":
        return {**sre2l(case), "epochs": 400, "batch": 128}
    if case.column == "tiny":
        return {**_tiny_sgd(), "epochs": 200, "batch": 64, "views": {**RRC, **CUTMIX}}
    return {**ADAMW, "batch": 128, "views": {**RRC, **CUTMIX}}


def delt(case: Case) -> Fields:
    """DELT (CVPR 2025), evaluation scripts: RDED's recipe with RandAugment before it and crops of area .25 to 1.

    timm's magnitudes (of 10) become torchvision's bins (of 30); each of timm's n operations runs with probability
    1/2, so half as many run here (rounded up); see `data/randaugment.py`.
    """
    operations, magnitude = {"cifar": (4, 5), "tiny": (3, 4), "photos": (2, 6)}[case.column]
    batch = by_ipc(case.ipc, 10, 50, 100) * (2 if case.classes >= 100 else 1)
    if case.net.startswith("resnet101") and case.column == "photos" and case.classes >= 100:
        batch //= 2
    views = {**RRC, **CUTMIX, "crop_scale": [0.25, 1.0]}
    views |= {"randaugment_n": math.ceil(operations / 2), "randaugment_m": 3.0 * magnitude}
    lr = 2.5e-3 if case.net == "mobilenet_v2" else 1e-3
    return {**rded(case), "lr": lr, "batch": batch, "views": views}


def gvbsm(case: Case) -> Fields:
    """G-VBSM (CVPR 2024), train_FKD.py: MSE to the (mean of the teachers') logits plus gamma CE."""
    views = {**RRC, **CUTMIX}
    sgd = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    if case.column == "cifar":
        few = {**ADAMW, "weight_decay": 0.0, "batch": 100} if case.classes < 100 else {**sgd, "batch": 64}
        return {**few, "loss": "mse_ce", "ce_weight": 0.15, "epochs": 1000, "views": views}
    if case.column == "tiny":
        return {**sgd, "loss": "mse_ce", "ce_weight": 0.1, "epochs": 100, "batch": 100, "views": views}
    return {**ADAMW, "loss": "mse_ce", "ce_weight": 0.1, "epochs": 300, "batch": 1024, "views": views}


def edc(case: Case) -> Fields:
    """EDC (NeurIPS 2024), paper table of student settings; one teacher; without the SSRS tail of the schedule."""
    many = case.column == "photos" and case.classes >= 1000
    long = case.column == "cifar" or (case.column == "photos" and not many) or (case.column == "tiny" and case.ipc < 10)
    batch = 100 if many or case.column == "tiny" else 25 if case.column == "cifar" and case.classes < 100 else 50
    views = {**RRC, **CUTMIX, "crop_scale": [0.5, 1.0]}
    views |= {} if many else {"randaugment_n": 2, "randaugment_m": 9.0}  # torchvision's defaults
    schedule: Fields = {"schedule": "cosine", "zeta": 2.0}
    if case.column == "cifar" and case.classes < 100:
        schedule = {"schedule": "step", "step_at": [0.8, 0.9, 0.95], "step_gamma": 0.5}
    loss = {"loss": "mse_ce", "ce_weight": 0.025, "ema": 0.99}
    lr = 1e-4 if case.net.startswith("swin") else 1e-3
    return {**ADAMW, **schedule, **loss, "lr": lr, "epochs": 1000 if long else 300, "batch": batch, "views": views}


def wmdd(case: Case) -> Fields:
    """WMDD (arXiv 2311.18531), run.sh: FKD with CutMix; batch 100, or 10 IPC for small sets; at the set's own size."""
    return {**ADAMW, "batch": min(100, 10 * case.ipc), "views": {**RRC, **CUTMIX}}


def sre2lpp(case: Case) -> Fields:
    """SRe2L++ (CV-DD scripts): batch 16, teacher with batch statistics in two halves.

    The official student accumulates two gradients of 8 images; here its BatchNorm sees all 16 (ours).
    """
    lr, zeta = _sre2lpp_schedule(case)
    batch = 10 if case.ipc == 1 else 16
    return {**ADAMW, "lr": lr, "zeta": zeta, "batch": batch, "teacher_mode": "bssl", "views": {**RRC, **CUTMIX}}


def _sre2lpp_schedule(case: Case) -> tuple[float, float]:
    """lr and zeta per data set, net and IPC (CV-DD scripts); other nets as ResNet-18 (ours)."""
    depth = "101" if "101" in case.net else "50" if "resnet50" in case.net else "18"
    ten, fifty = 10 <= case.ipc < 50, case.ipc >= 50
    if case.column == "cifar":
        return (5e-4 if depth == "101" else 1e-3), (2.0 if case.classes >= 100 and ten else 1.0)
    if case.column == "tiny":
        return {"18": (1e-3, 1.0 if ten else 2.0), "50": (1e-3, 1.0), "101": (5e-4, 2.0)}[depth]
    if case.classes >= 1000:
        return (5e-4 if fifty else 1e-3, 2.0) if depth == "101" else (1e-3, 1.0 if fifty else 2.0)
    return {
        "18": (5e-4, 1.0 if ten else 2.0),
        "50": (1e-3 if ten else 5e-4, 1.0 if ten or fifty else 2.0),
        "101": (1e-3 if fifty else 5e-4, 2.0),
    }[depth]


def fair_epochs(case: Case) -> int:
    """Passes over the set so that the number of student views V depends on (data set, IPC) alone.

    Up to 64 px: T = max(1000, 300 ceil(N / 256)) steps at batch min(256, N), that is T / ceil(N / 256) passes; above:
    300 passes, and at least 100,000 views. V = passes * N whatever the batch.
    """
    if case.column == "photos":
        return max(300, math.ceil(100_000 / case.images))
    steps = math.ceil(case.images / 256)
    return math.ceil(max(1000, 300 * steps) / steps)


def fair_hard(case: Case) -> Fields:
    """Hard labels, equal views: SGD with DSA as in DC-Bench (up to 64 px), AdamW with crops as in PCA (photos)."""
    hard: Fields = {"regime": "hard", "loss": "ce", "epochs": fair_epochs(case)}
    if case.column == "photos":
        return {**ADAMW, **hard, "batch": min(128, case.images), "views": RRC}
    strategy = dsa.DEFAULT.replace("flip_", "") if case.dataset == "digits" else dsa.DEFAULT  # a mirrored 2 is no 2
    sgd = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    step = {"schedule": "step", "step_at": [0.5], "step_gamma": 0.1}
    return {**sgd, **step, **hard, "batch": min(256, case.images), "views": {"flip": 0.0, "dsa": strategy}}


def fair_soft(case: Case) -> Fields:
    """Labels on the fly, equal views: RD3's rectified recipe with KL at T = 20 and small batches."""
    zeta = 1.0 if case.net.startswith("resnet18") or case.column == "photos" else 2.0
    flip: Fields = {"flip": 0.0 if case.dataset == "digits" else 0.5}
    views = {**(RRC if case.column == "photos" else {}), **flip, **CUTMIX}
    return {**ADAMW, "zeta": zeta, "epochs": fair_epochs(case), "batch": min(50, case.images), "views": views}


PRESETS: dict[str, Callable[[Case], Fields]] = {
    "fair-soft": fair_soft,
    "fair-hard": fair_hard,
    "rded": rded,
    "sre2l": sre2l,
    "delt": delt,
    "dwa": dwa,
    "gvbsm": gvbsm,
    "edc": edc,
    "wmdd": wmdd,
    "sre2lpp": sre2lpp,
}


def check_preset(name: str) -> None:
    """Raise UserError for an unknown preset, with the nearest known one."""
    if name not in PRESETS:
        raise UserError(f"recipe: {name!r} is not one of {choices(PRESETS)}{nearest(name, PRESETS)}")


def split(choice: str | Mapping[str, Any]) -> tuple[str, Fields]:
    """A preset's name and the overrides of a recipe as written in an experiment.

    Raises:
        UserError: a mapping without `preset`, or an unknown preset.
    """
    fields = {"preset": choice} if isinstance(choice, str) else dict(choice)
    if not isinstance(fields.get("preset"), str):
        raise UserError(f"recipe: {fields!r} needs the key preset with one of {choices(PRESETS)}")
    preset = fields.pop("preset")
    check_preset(preset)
    return preset, fields


def resolve(
    preset: str, overrides: Mapping[str, Any], dataset: str, classes: int, ipc: int, size: int, net: str
) -> Recipe:
    """The recipe of one student: the preset for its case, then the overrides.

    Args:
        preset: a name in PRESETS.
        overrides: Recipe fields; `views` is merged key by key.
        dataset, classes, ipc, size, net: the case; size in pixels.

    Raises:
        UserError: unknown preset or key, wrong type, or a combination that cannot work.
    """
    check_preset(preset)
    fields = PRESETS[preset](Case(dataset, classes, ipc, size, net))
    views = overrides.get("views", {})
    merged = {"name": preset, **fields, **overrides}
    if isinstance(views, Mapping):
        merged["views"] = {**fields.get("views", {}), **views}
    if overrides and "name" not in overrides:
        merged["name"] = f"{preset}({', '.join(_written(overrides))})"
    recipe = parse(Recipe, merged, f"recipe {preset}")
    _check(recipe)
    return recipe


def _written(overrides: Mapping[str, Any], prefix: str = "") -> list[str]:
    parts: list[str] = []
    for key, value in sorted(overrides.items()):
        parts += _written(value, f"{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}={value}"]
    return parts


def _check(recipe: Recipe) -> None:
    """Refuse combinations that no training could follow."""
    where, views = f"recipe {recipe.name}", recipe.views
    if (recipe.regime == "hard") != (recipe.loss == "ce"):
        raise UserError(f"{where}: loss {recipe.loss!r} does not fit regime {recipe.regime!r}; hard goes with loss ce")
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(f"{where}: warmup_epochs {recipe.warmup_epochs} must be below epochs {recipe.epochs}")
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(views, name)
        if low > high or (name == "crop_scale" and high > 1):
            raise UserError(f"{where}: views.{name} {[low, high]} must rise, and an area is at most 1")
    if views.randaugment_m > randaugment.BINS:
        raise UserError(f"{where}: views.randaugment_m {views.randaugment_m} is above {randaugment.BINS}, the last bin")
    if views.dsa:
        dsa.groups(views.dsa)


def without_effect(recipe: Recipe, overrides: Mapping[str, Any]) -> list[str]:
    """The overrides that change nothing under the resolved recipe, each with the reason (to be said once)."""
    views = overrides.get("views", {})
    given = {*overrides, *(f"views.{key}" for key in (views if isinstance(views, Mapping) else {}))}
    return sorted(
        f"{key} has no effect {why}" for key, (used, why) in _uses(recipe).items() if key in given and not used
    )


def _uses(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    views: ViewPolicy = recipe.views
    soft = recipe.regime == "soft"
    return {
        "momentum": (recipe.optimizer == "sgd", "without optimizer: sgd"),
        "betas": (recipe.optimizer == "adamw", "without optimizer: adamw"),
        "zeta": (recipe.schedule == "cosine", "without schedule: cosine"),
        "step_at": (recipe.schedule == "step", "without schedule: step"),
        "step_gamma": (recipe.schedule == "step", "without schedule: step"),
        "temperature": (recipe.loss == "kl", "without loss: kl"),
        "kl_t2": (recipe.loss == "kl", "without loss: kl"),
        "ce_weight": (recipe.loss == "mse_ce", "without loss: mse_ce"),
        "teacher_mode": (soft, "with hard labels"),
        "views.crop_pad": (views.crop == "pad", "without views.crop: pad"),
        "views.crop_scale": (views.crop == "rrc", "without views.crop: rrc"),
        "views.crop_ratio": (views.crop == "rrc", "without views.crop: rrc"),
        "views.randaugment_m": (views.randaugment_n > 0, "without views.randaugment_n"),
        "views.mix_alpha": (views.mix != "none", "without views.mix"),
    }


def net_options(recipe: Recipe, net: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A student's net options with the regime's default norm: InstanceNorm ConvNets under hard labels (DC-Bench)."""
    default = {"norm": "instance"} if recipe.regime == "hard" and net.startswith("convnet") else {}
    return {**default, **options}
