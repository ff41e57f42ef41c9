"""Statistics of the training images: against plain loops in float64, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from _toys import CPU, MEAN, STD, ToyTrack, toy_photos, toy_pixels
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillery import statistics
from distillery.data import augment
from distillery.data.real import Real
from distillery.errors import NonFiniteLoss, UserError
from distillery.rng import generator, seeded
from distillery.statistics import channel_moments, collect, patch_moments, patch_side, view_policy
from distillery.teacher import Card, Frozen
from distillery.track import Track


def frozen(real: Real, seed: int = 0, size: int = 0) -> Frozen:
    """Two convolutions with BatchNorm whose running means are far from what they see."""
    with seeded(seed, "statistics"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        net.extend([nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(inplace=True)])
        net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, len(real.classes))])
        for norm in (net[1], net[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    names = [str(name) for name in real.classes]
    card = Card(f"toy{seed}", {}, names, size or real.size, list(MEAN), list(STD), 1.0, 1.0, [], [])
    return Frozen(net, card, CPU)


def inputs(net: nn.Module, kind: type[nn.Module], x_norm: Tensor) -> list[Tensor]:
    """What goes into every layer of a kind, in float64."""
    net, kept = copy.deepcopy(net).double(), []
    for module in net.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda _, given: kept.append(given[0].clone()))
    net(x_norm.double())
    return kept


def population(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("make", [toy_pixels, toy_photos])
def test_class_bn_is_the_population_of_each_class(make: Callable[[], Real]) -> None:
    real = make()
    members = [frozen(real, 0), frozen(real, 1)]
    found = collect(members, real, ("class_bn",), seed=0, track=Track.quiet())
    images_u8, labels = real.pixels("train")
    for member, own in zip(members, found, strict=True):
        assert set(own) == {"class_bn/mean", "class_bn/var"}
        x_norm = augment.evaluation_view(images_u8, real.size, MEAN, STD)
        maps = inputs(member.net, nn.BatchNorm2d, x_norm)
        for cls in range(len(real.classes)):
            columns = [x[labels == cls, channel] for x in maps for channel in range(x.shape[1])]
            want = [population(values.flatten().tolist()) for values in columns]
            mean, var = (torch.tensor(side) for side in zip(*want, strict=True))
            torch.testing.assert_close(own["class_bn/mean"][cls], mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(own["class_bn/var"][cls], var, rtol=1e-5, atol=1e-6)


def test_conv_is_the_weighted_average_over_batches_of_views() -> None:
    real = toy_pixels(classes=3, per_class=95, size=10)  # two batches: 256 and the rest; 10 is no multiple of p
    member = frozen(real)
    assert torch.equal(real.pixels("train")[1], real.pixels("train")[1].sort().values)
    found = collect([member], real, ("conv",), seed=4, track=Track.quiet())[0]
    images_u8, _ = real.pixels("train")
    order = torch.randperm(len(images_u8), generator=generator(4, "statistics", "order"))
    want: dict[str, Tensor] = {}
    for number, index in enumerate([order[:256], order[256:]]):
        stream = generator(4, "statistics", "views", number)
        policy = view_policy(real)
        views = augment.draw(policy, len(index), real.size, stream)
        x_norm = augment.apply(policy, images_u8[index], views, MEAN, STD)
        for layer, x in enumerate(inputs(member.net, nn.Conv2d, x_norm)):
            for name, moments in (("", channel_moments(x)), ("patch_", patch_moments(x, 4))):
                for what, value in zip(("mean", "var"), moments, strict=True):
                    key = f"conv/{layer}/{name}{what}"
                    want[key] = want.get(key, 0) + value * len(index) / len(order)
    assert len(order) > 256
    assert set(found) == set(want)
    assert found["conv/0/patch_mean"].shape == (9,)
    for key, value in want.items():
        torch.testing.assert_close(found[key], value.float(), rtol=1e-5, atol=1e-6, msg=key)


def test_a_layer_that_runs_twice_counts_each_time() -> None:
    """Two runs of one convolution over the same maps say what one run says."""
    real = toy_pixels()
    once, twice = frozen(real), frozen(real)

    class Again(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            return self.net(x)

    twice.net = Again(twice.net)
    found = collect([once, twice], real, statistics.KINDS, seed=0, track=Track.quiet())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_one_pass_gives_all_kinds_and_forward_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    real, track = toy_pixels(), ToyTrack()
    member = frozen(real)
    both = collect([member], real, statistics.KINDS, seed=0, track=track)[0]
    assert track.progress == [(54, 54)]
    apart = [collect([member], real, (kind,), seed=0, track=track)[0] for kind in statistics.KINDS]
    monkeypatch.setattr(statistics, "AT_ONCE", {"cpu": 5})
    small = collect([member], real, statistics.KINDS, seed=0, track=track)[0]
    assert both.keys() == (apart[0] | apart[1]).keys() == small.keys()
    for key, value in both.items():
        torch.testing.assert_close((apart[0] | apart[1])[key], value, rtol=1e-5, atol=1e-6, msg=key)
        torch.testing.assert_close(small[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_photos_and_large_images_have_other_views_and_patches() -> None:
    photos = toy_photos()
    assert (view_policy(photos).crop, view_policy(photos).crop_scale) == ("rrc", (0.08, 1.0))
    assert (view_policy(toy_pixels(size=32)).crop_pad, view_policy(toy_pixels(size=64)).crop_pad) == (4, 8)
    assert (patch_side(64), patch_side(66)) == (4, 16)
    found = collect([frozen(photos)], photos, ("conv",), seed=0, track=Track.quiet())[0]
    assert found["conv/0/patch_mean"].shape == (25,)  # 66 px are resized to 80


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 6, 9), (3, 2, 1, 1)])
def test_patch_moments_are_those_of_each_patch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator("patches", *shape), dtype=torch.float64)
    rows, columns = (shape[2] + 3) // 4, (shape[3] + 3) // 4
    grown = interpolate(x, size=(4 * rows, 4 * columns), mode="bilinear", align_corners=False)
    want = [
        population(grown[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten().tolist())
        for i in range(rows)
        for j in range(columns)
    ]
    mean, var = patch_moments(x, 4)
    torch.testing.assert_close(torch.stack([mean, var], 1), torch.tensor(want, dtype=torch.float64))


def test_moments_are_differentiable_and_widen_half_precision() -> None:
    x = torch.randn(2, 2, 3, 3, generator=generator("grad"), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_moments, x)
    assert torch.autograd.gradcheck(lambda y: patch_moments(y, 2), x)
    half = x.detach().bfloat16()
    assert torch.equal(patch_moments(half, 2)[1], patch_moments(half.float(), 2)[1])
    assert torch.equal(channel_moments(half)[0], channel_moments(half.float())[0])


def test_a_teacher_that_gives_nan_is_named_with_its_layer() -> None:
    real = toy_pixels()
    broken = frozen(real, 7)
    broken.net[3].bias.data[2] = torch.nan  # type: ignore[index,union-attr,operator]
    with pytest.raises(NonFiniteLoss, match=r"teacher toy7, layer 4: .*normalisation"):
        collect([frozen(real), broken], real, ("class_bn",), seed=0, track=Track.quiet())
    broken.net[0].bias.data[2] = torch.inf  # type: ignore[index,union-attr,operator]
    with pytest.raises(NonFiniteLoss, match=r"teacher toy7, layer 3: "):
        collect([broken], real, ("conv",), seed=0, track=Track.quiet())


def test_what_cannot_work_is_refused_by_name() -> None:
    real = toy_pixels()
    bare = frozen(real)
    bare.net[1], bare.net[4] = nn.Identity(), nn.Identity()  # type: ignore[operator]
    with pytest.raises(UserError, match=r"teacher toy0 has no BatchNorm2d.*norm: batch"):
        collect([bare], real, ("class_bn",), seed=0, track=Track.quiet())
    assert "conv/1/var" in collect([bare], real, ("conv",), seed=0, track=Track.quiet())[0]
    with pytest.raises(UserError, match=r"toy0 takes images of 16 px .* 8 px"):
        collect([frozen(real, size=16)], real, ("conv",), seed=0, track=Track.quiet())
    images_u8, labels = real.pixels("train")
    gap = Real.of(images_u8, labels + (labels > 1), val=(images_u8[:1], labels[:1]))
    with pytest.raises(UserError, match=r"class 2 \(2\) has no training images \(of 54\)"):
        collect([frozen(gap)], gap, ("class_bn",), seed=0, track=Track.quiet())
