"""Recipes: the tables of the papers, the fairness rule, and overrides that cannot go wrong silently."""

import math
from typing import Any

import pytest

from distillery import nets, recipes
from distillery.config import Recipe
from distillery.data.batches import slices
from distillery.errors import UserError
from distillery.train import lr_factor

SETS = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny_imagenet": (200, 64), "imagenette": (10, 224)}
SETS |= {"imagenet100": (100, 224), "imagenet": (1000, 224)}


def get(preset: str, dataset: str = "cifar10", ipc: int = 10, net: str = "resnet18_modified", **changes: Any) -> Recipe:
    """A resolved recipe."""
    classes, size = SETS[dataset]
    return recipes.resolve(preset, changes, dataset, classes, ipc, size, net)


@pytest.mark.parametrize("preset", list(recipes.PRESETS))
@pytest.mark.parametrize("dataset", list(SETS))
def test_every_preset_resolves_for_every_case(preset: str, dataset: str) -> None:
    for ipc in (1, 7, 10, 50, 100):
        for net in ("convnet3", "resnet18_modified", "resnet101", "swin_v2_t"):
            recipe = get(preset, dataset, ipc, net)
            assert recipe.name == preset
            assert (recipe.regime == "hard") == (preset == "fair-hard")
            assert not recipes.without_effect(recipe, {})


@pytest.mark.parametrize(
    ("dataset", "ipc", "net", "batch", "lr"),
    [
        ("cifar10", 1, "convnet3", 10, 1e-3),
        ("cifar10", 10, "convnet3", 50, 1e-3),
        ("cifar10", 50, "resnet18_modified", 100, 1e-3),
        ("cifar100", 10, "resnet18_modified", 100, 1e-3),
        ("cifar100", 50, "convnet3", 25, 2e-3),
        ("tiny_imagenet", 1, "convnet4", 100, 1e-3),
        ("tiny_imagenet", 50, "convnet4", 100, 1e-3),
        ("imagenette", 10, "mobilenet_v2", 50, 2.5e-3),
        ("imagenette", 1, "vgg11", 10, 5e-4),
        ("imagenet", 10, "efficientnet_b0", 100, 2e-3),
        ("imagenet", 50, "swin_v2_t", 200, 1e-4),
    ],
)
def test_rded_batches_and_rates(dataset: str, ipc: int, net: str, batch: int, lr: float) -> None:
    recipe = get("rded", dataset, ipc, net)
    assert (recipe.batch, recipe.lr) == (batch, lr)


def test_rded_is_the_official_recipe() -> None:
    small, photos = get("rded"), get("rded", "imagenette")
    assert (small.epochs, small.optimizer, small.weight_decay, small.decay_filter) == (300, "adamw", 0.01, "matrices")
    assert (small.loss, small.temperature, small.kl_t2, small.teacher_mode) == ("kl", 20.0, False, "eval")
    assert small.bn_momentum == pytest.approx(1 - 0.9**2)  # two forwards with momentum 0.1
    assert (small.views.crop, small.views.shuffle_patches, small.views.mix) == ("none", 1, "cutmix")
    assert (photos.views.crop, photos.views.crop_scale, photos.views.shuffle_patches) == ("rrc", (0.5, 1.0), 2)
    assert photos.views.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    for epoch in (0, 100, 299):
        assert lr_factor(small, epoch) == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 600)))


@pytest.mark.parametrize(
    ("preset", "dataset", "ipc", "expected"),
    [
        (
            "sre2l",
            "cifar100",
            50,
            {"epochs": 400, "batch": 128, "temperature": 30.0, "teacher_mode": "train", "zeta": 1.0},
        ),
        ("sre2l", "tiny_imagenet", 50, {"epochs": 100, "batch": 256, "optimizer": "sgd", "lr": 0.2, "kl_t2": True}),
        ("sre2l", "imagenet", 50, {"epochs": 300, "batch": 1024, "temperature": 20.0, "decay_filter": "all"}),
        ("dwa", "cifar10", 10, {"epochs": 400, "batch": 128, "teacher_mode": "train", "temperature": 30.0}),
        ("dwa", "tiny_imagenet", 50, {"epochs": 200, "batch": 64, "warmup_epochs": 5, "weight_decay": 1e-4}),
        ("dwa", "imagenet", 10, {"epochs": 300, "batch": 128, "teacher_mode": "eval"}),
        ("delt", "cifar10", 10, {"epochs": 300, "batch": 50, "zeta": 2.0, "bn_momentum": 0.19}),
        ("delt", "imagenet", 50, {"batch": 200, "lr": 1e-3, "decay_filter": "matrices"}),
        (
            "gvbsm",
            "cifar10",
            10,
            {"epochs": 1000, "batch": 100, "weight_decay": 0.0, "ce_weight": 0.15, "loss": "mse_ce"},
        ),
        ("gvbsm", "cifar100", 10, {"batch": 64, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}),
        ("gvbsm", "tiny_imagenet", 50, {"epochs": 100, "batch": 100, "ce_weight": 0.1}),
        ("gvbsm", "imagenet", 50, {"epochs": 300, "batch": 1024, "optimizer": "adamw"}),
        ("edc", "cifar10", 10, {"epochs": 1000, "batch": 25, "schedule": "step", "step_gamma": 0.5, "ema": 0.99}),
        ("edc", "cifar100", 10, {"epochs": 1000, "batch": 50, "zeta": 2.0, "ce_weight": 0.025}),
        ("edc", "tiny_imagenet", 10, {"epochs": 300, "batch": 100}),
        ("edc", "tiny_imagenet", 1, {"epochs": 1000}),
        ("edc", "imagenette", 10, {"epochs": 1000, "batch": 50}),
        ("edc", "imagenet", 10, {"epochs": 300, "batch": 100}),
        ("wmdd", "imagenette", 1, {"batch": 10, "zeta": 1.0, "epochs": 300}),
        ("wmdd", "imagenet", 50, {"batch": 100, "temperature": 20.0}),
        ("sre2lpp", "cifar10", 10, {"batch": 16, "teacher_mode": "bssl", "lr": 1e-3, "zeta": 1.0}),
        ("sre2lpp", "cifar100", 10, {"zeta": 2.0}),
        ("sre2lpp", "cifar100", 50, {"zeta": 1.0}),
        ("sre2lpp", "tiny_imagenet", 50, {"zeta": 2.0}),
        ("sre2lpp", "imagenette", 1, {"batch": 10, "lr": 5e-4, "zeta": 2.0}),
        ("sre2lpp", "imagenet", 50, {"lr": 1e-3, "zeta": 1.0}),
    ],
)
def test_tables_of_the_papers(preset: str, dataset: str, ipc: int, expected: dict[str, Any]) -> None:
    recipe = get(preset, dataset, ipc)
    assert {key: getattr(recipe, key) for key in expected} == expected


def test_views_of_the_papers() -> None:
    assert (get("sre2l").views.crop, get("sre2l").views.mix, get("sre2l").views.mix_alpha) == ("pad", "mixup", 0.8)
    assert (get("sre2l", "tiny_imagenet").views.crop, get("sre2l", "tiny_imagenet").views.mix) == ("rrc", "none")
    delt = get("delt").views  # timm m5 n4: half its operations run, and its scale ends at 10
    assert (delt.randaugment_n, delt.randaugment_m, delt.crop_scale, delt.shuffle_patches) == (2, 15.0, (0.25, 1.0), 1)
    assert (get("delt", "imagenette").views.randaugment_n, get("delt", "imagenette").views.randaugment_m) == (1, 18.0)
    edc = get("edc").views  # torchvision's defaults
    assert (edc.randaugment_n, edc.randaugment_m, edc.crop_scale) == (2, 9.0, (0.5, 1.0))
    assert get("edc", "imagenet").views.randaugment_n == 0


@pytest.mark.parametrize(
    ("net", "dataset", "ipc", "lr", "zeta"),
    [
        ("resnet101_modified", "cifar10", 10, 5e-4, 1.0),
        ("resnet50_modified", "tiny_imagenet", 50, 1e-3, 1.0),
        ("resnet101_modified", "tiny_imagenet", 10, 5e-4, 2.0),
        ("resnet50", "imagenette", 1, 5e-4, 2.0),
        ("resnet50", "imagenette", 10, 1e-3, 1.0),
        ("resnet101", "imagenette", 50, 1e-3, 2.0),
        ("resnet101", "imagenet", 50, 5e-4, 2.0),
        ("resnet101", "imagenet", 10, 1e-3, 2.0),
    ],
)
def test_sre2lpp_schedule_by_net(net: str, dataset: str, ipc: int, lr: float, zeta: float) -> None:
    recipe = get("sre2lpp", dataset, ipc, net)
    assert (recipe.lr, recipe.zeta) == (lr, zeta)


@pytest.mark.parametrize(
    ("dataset", "ipc", "steps", "views"),
    [
        ("cifar10", 1, 1000, 10_000),
        ("cifar10", 10, 1000, 100_000),
        ("cifar10", 50, 1000, 250_000),
        ("cifar100", 1, 1000, 100_000),
        ("cifar100", 10, 1200, 300_000),
        ("cifar100", 50, 6000, 1_500_000),
    ],
)
def test_fair_views_are_those_of_the_protocol(dataset: str, ipc: int, steps: int, views: int) -> None:
    images = SETS[dataset][0] * ipc
    hard, soft = get("fair-hard", dataset, ipc), get("fair-soft", dataset, ipc)
    assert hard.epochs * images == soft.epochs * images == views
    assert hard.epochs * len(slices(images, hard.batch)) == steps
    assert (hard.batch, soft.batch) == (min(256, images), min(50, images))


def test_fair_recipes_are_those_of_the_protocol() -> None:
    hard = get("fair-hard")
    assert (hard.optimizer, hard.lr, hard.momentum, hard.weight_decay) == ("sgd", 0.01, 0.9, 5e-4)
    assert [lr_factor(hard, epoch) for epoch in (0, 499, 500, 999)] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert (hard.loss, hard.views.flip, hard.views.dsa) == ("ce", 0.0, "color_crop_cutout_flip_scale_rotate")
    soft = get("fair-soft", net="convnet3")
    assert (soft.optimizer, soft.lr, soft.weight_decay, soft.temperature) == ("adamw", 1e-3, 0.01, 20.0)
    assert (soft.zeta, get("fair-soft").zeta, get("fair-soft", net="resnet20").zeta) == (2.0, 1.0, 2.0)
    assert (soft.views.flip, soft.views.mix, soft.views.crop) == (0.5, "cutmix", "none")
    digits = recipes.resolve("fair-hard", {}, "digits", 10, 10, 16, "convnet3")
    assert digits.views.dsa == "color_crop_cutout_scale_rotate"
    assert recipes.resolve("fair-soft", {}, "digits", 10, 10, 16, "convnet3").views.flip == 0.0
    photos = get("fair-hard", "imagenette")
    assert (photos.optimizer, photos.batch, photos.epochs, photos.views.crop) == ("adamw", 100, 1000, "rrc")
    assert get("fair-soft", "imagenet").epochs == 300


def test_hard_labels_get_instance_norm_convnets_unless_told() -> None:
    assert recipes.net_options(get("fair-hard"), "convnet3", {"width": 64}) == {"norm": "instance", "width": 64}
    assert recipes.net_options(get("fair-hard"), "convnet3", {"norm": "batch"}) == {"norm": "batch"}
    assert recipes.net_options(get("fair-hard"), "resnet20", {}) == {}
    assert recipes.net_options(get("fair-soft"), "convnet3", {}) == {}
    nets.check_net("convnet3", recipes.net_options(get("fair-hard"), "convnet3", {}))


def test_overrides_change_single_fields_and_show_in_the_name() -> None:
    recipe = get("rded", epochs=3, views={"flip": 0.0})
    assert (recipe.epochs, recipe.views.flip, recipe.views.mix, recipe.zeta) == (3, 0.0, "cutmix", 2.0)
    assert recipe.name == "rded(epochs=3, views.flip=0.0)"
    assert get("rded", epochs=3, name="short").name == "short"
    assert recipes.split("rded") == ("rded", {})
    assert recipes.split({"preset": "edc", "lr": 0.1}) == ("edc", {"lr": 0.1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, r"epoch: unknown key; did you mean 'epochs'"),
        ({"epochs": 0}, r"epochs: .*greater than or equal to 1, got 0"),
        ({"lr": "fast"}, r"lr: .*number, got 'fast'"),
        ({"views": {"crop": "pda"}}, r"views\.crop: .*'none', 'pad' or 'rrc', got 'pda'"),
        ({"views": 7}, r"views: .*got 7"),
        ({"views": {"dsa": "color_rotat"}}, r"'rotat' in 'color_rotat' .*did you mean 'rotate'"),
        ({"views": {"crop": "rrc", "crop_scale": [0.9, 0.1]}}, r"crop_scale \[0\.9, 0\.1\] must rise"),
        ({"views": {"crop": "rrc", "crop_scale": [0.9, 1.5]}}, r"crop_scale \[0\.9, 1\.5\].* at most 1"),
        ({"views": {"randaugment_n": 2, "randaugment_m": 31}}, r"randaugment_m 31\.0 is above 30"),
        ({"loss": "ce"}, r"loss 'ce' does not fit regime 'soft'"),
        ({"regime": "hard"}, r"loss 'kl' does not fit regime 'hard'"),
        ({"warmup_epochs": 300}, r"warmup_epochs 300 must be below epochs 300"),
    ],
)
def test_impossible_overrides_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get("rded", **changes)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UserError, match=r"'rdde' is not one of fair-soft, .*did you mean 'rded'"):
        get("rdde")
    with pytest.raises(UserError, match=r"\{'lr': 1\} needs the key preset"):
        recipes.split({"lr": 1})
    with pytest.raises(UserError, match="did you mean 'fair-hard'"):
        recipes.split("fair-hrad")


def test_settings_without_effect_are_listed() -> None:
    changes = {"momentum": 0.5, "step_gamma": 0.5, "lr": 0.1, "views": {"crop_pad": 2, "mix_alpha": 2.0}}
    assert recipes.without_effect(get("rded", **changes), changes) == [
        "momentum has no effect without optimizer: sgd",
        "step_gamma has no effect without schedule: step",
        "views.crop_pad has no effect without views.crop: pad",
    ]
