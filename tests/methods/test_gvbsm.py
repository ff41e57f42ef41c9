"""G-VBSM against autograd of its definition (reference 7.1) in float64: densification, taps, and the whole loop."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _toys import MEAN, STD, ToyTeacher, toy_pixels, toy_teacher
from torch import Tensor, nn
from torch.nn import functional

from distillery import statistics
from distillery.errors import UserError
from distillery.methods import Group, _matching, _packs, _recover, _selection, _views, gvbsm
from distillery.methods.gvbsm import Config, PatchTap
from distillery.rng import generator
from distillery.track import Track


def random(*shape: int, name: str = "gvbsm") -> Tensor:
    return torch.randn(shape, generator=generator(name, *shape), dtype=torch.float64)


# --- data densification


def defined_densification(views: Tensor, tau: float) -> Tensor:
    """Class by class; the eigenvalues of Z Z^T are the squared singular values of Z."""
    each = []
    for images in views:
        flat = functional.adaptive_avg_pool2d(images, (32, 32)).reshape(len(images), -1)
        spectrum = torch.linalg.svdvals(flat) ** 2
        target = torch.softmax(spectrum / tau, 0).detach()
        each.append((target * (target.log() - torch.log_softmax(spectrum, 0))).sum())
    return torch.stack(each)


@pytest.mark.parametrize("side", [8, 32, 40])
def test_densification_has_value_and_gradient_of_the_definition(side: int) -> None:
    views = (random(3, 5, 3, side, side) * 0.1).requires_grad_()
    found, wanted = gvbsm.densification(views, 4.0), defined_densification(views, 4.0)
    assert float(wanted.detach().min()) > 1e-3, "nothing to compare"
    assert torch.allclose(found, wanted, rtol=1e-9)
    got, given = (torch.autograd.grad(value.sum(), views)[0] for value in (found, wanted))
    assert torch.allclose(got, given, rtol=1e-7, atol=1e-12 * float(given.abs().max()))


def test_equal_eigenvalues_have_a_gradient() -> None:
    """Images of lengths 1, 1, 2 on pixels of their own: l = 1, 1, 4, and dDD/dz_i = 2 (q_i - p_i) z_i."""
    views = torch.zeros(1, 3, 3, 32, 32, dtype=torch.float64)
    for place, length in enumerate((1.0, 1.0, 2.0)):
        views[0, place, 0, 0, place] = length
    views.requires_grad_()
    (found,) = torch.autograd.grad(gvbsm.densification(views, 4.0).sum(), views)
    spectrum = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    pull = torch.softmax(spectrum, 0) - torch.softmax(spectrum / 4, 0)
    assert torch.allclose(found, 2 * pull[None, :, None, None, None] * views.detach(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("views", [torch.zeros(2, 4, 3, 8, 8), torch.ones(2, 4, 3, 8, 8), torch.ones(2, 1, 3, 8, 8)])
def test_zero_spectra_same_images_and_single_images_give_numbers(views: Tensor) -> None:
    leaf = views.clone().requires_grad_()
    value = gvbsm.densification(leaf, 4.0)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_an_image_that_is_no_number_is_reported_and_not_raised() -> None:
    views = random(2, 3, 3, 8, 8)
    views[1, 0, 0, 0, 0] = torch.nan
    assert gvbsm.densification(views, 4.0).isnan().tolist() == [False, True]


# --- patch statistics


def defined_patches(x: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each patch of the resized map over images, channels and pixels."""
    rows, columns = math.ceil(x.shape[2] / p), math.ceil(x.shape[3] / p)
    if (rows * p, columns * p) != tuple(x.shape[2:]):
        x = functional.interpolate(x, (rows * p, columns * p), mode="bilinear", align_corners=False)
    cut = [x[:, :, r * p : r * p + p, c * p : c * p + p] for r in range(rows) for c in range(columns)]
    means = torch.stack([patch.sum() / patch.numel() for patch in cut])
    return means, torch.stack([((patch - patch.mean()) ** 2).sum() / patch.numel() for patch in cut])


def held(average: Tensor | None, now: Tensor, alpha: float, from_zero: bool) -> Tensor:
    """The running average after one more batch."""
    if average is None:
        average = torch.zeros_like(now) if from_zero else now.detach()
    return alpha * average + (1 - alpha) * now.detach()


SHAPES = [(8, 8, 4), (6, 6, 4), (1, 1, 4), (7, 5, 4), (14, 14, 16)]


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize(("height", "width", "p"), SHAPES)
def test_patches_have_value_and_gradient_of_the_definition(
    height: int, width: int, p: int, alpha: float, from_zero: bool
) -> None:
    positions = math.ceil(height / p) * math.ceil(width / p)
    mean, var = random(1, positions, name="mean"), random(1, positions, name="var").abs()
    tap = PatchTap(nn.Identity(), mean, var, 0.7, 0.3, alpha, from_zero, p=p)
    averages: list[list[Tensor | None]] = [[None, None], [None, None]]
    for step in range(3):
        x = random(6, 5, height, width, name=f"maps {step}")
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        beside = random(6, 5, height, width, name="beside")
        (found,) = torch.autograd.grad((tap.pull(leaf, 2) * beside).sum(), leaf)
        losses = []
        for segment, part in enumerate(other.chunk(2)):
            loss = torch.zeros((), dtype=torch.float64)
            for place, (now, target, weight) in enumerate(
                zip(defined_patches(part, p), (mean[0], var[0]), (0.7, 0.3), strict=True)
            ):
                average = held(averages[segment][place], now, alpha, from_zero)
                averages[segment][place] = average
                loss = loss + weight * (average + now - now.detach() - target).norm()
            losses.append(loss)
        assert torch.allclose(tap.values, torch.stack(losses), rtol=1e-10)
        (wanted,) = torch.autograd.grad(sum(losses) + (other * beside).sum(), other)  # type: ignore[arg-type]
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", [8, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_maps_get_gradients_of_their_kind(side: int, layout: torch.memory_format) -> None:
    x = random(4, 5, side, side)
    gradients = []
    for kind in (torch.float64, torch.bfloat16):
        target = torch.zeros(1, 4, dtype=torch.float64 if kind == torch.float64 else torch.float32)
        tap = PatchTap(nn.Identity(), target, target, 1.0, 1.0)
        leaf = x.to(kind).contiguous(memory_format=layout).requires_grad_()
        gradients.append(torch.autograd.grad((tap.pull(leaf, 2) * 0).sum(), leaf)[0])
        assert gradients[-1].dtype == kind
        assert tap.values.dtype == target.dtype
    error = (gradients[1].double() - gradients[0]).norm() / gradients[0].norm()
    assert float(error) < 0.02


def test_a_skipped_iteration_leaves_gradient_and_average_alone() -> None:
    target = torch.zeros(1, 4, dtype=torch.float64)
    tap = PatchTap(nn.Identity(), target, target, 1.0, 1.0, ema=0.5, skips={1})
    x = random(4, 5, 8, 8).requires_grad_()
    tap.pull(x, 2, 0)
    before = {name: tensor.clone() for name, tensor in tap.state.items()}
    (gradient,) = torch.autograd.grad(tap.pull(x, 2, 1).sum(), x)
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert tap.values.tolist() == [0, 0]
    assert all(torch.equal(tap.state[name], tensor) for name, tensor in before.items())
    tap.pull(x, 2, 2)
    assert tap.values.min() > 0


# --- layers


def test_layers_are_in_module_order_and_the_first_weighs_more() -> None:
    teacher = toy_teacher(toy_pixels())
    taps: list[Any] = gvbsm.layer_taps(Config(training_momentum=0.3), teacher, seed=0)
    net: Any = teacher.net
    assert [(tap.module, type(tap)) for tap in taps] == [
        (net[0], _matching.MomentTap),
        (net[0], PatchTap),
        (net[1], _matching.MomentTap),
    ]
    assert [(tap.weight, tap.weight_var) for tap in taps] == [(0.1, 0.1), (0.1, 0.1), (0.01, 0.01)]
    assert {tap.ema for tap in taps} == {0.3}
    assert taps[1].p == 4
    assert torch.equal(taps[0].var[0], teacher.statistics["conv/0/var"])
    assert torch.equal(taps[1].mean[0], teacher.statistics["conv/0/patch_mean"])
    assert torch.equal(taps[2].mean[0], net[1].running_mean)


def test_terms_are_left_out_at_the_rate_and_by_iteration_and_layer() -> None:
    cfg = Config(iterations=4000, drop_rate=0.4)
    first, second = gvbsm.dropped(cfg, 0, 0), gvbsm.dropped(cfg, 0, 1)
    assert len(first) / 4000 == pytest.approx(0.4, abs=0.03)
    assert len(first & second) / 4000 == pytest.approx(0.16, abs=0.03), "layers are not independent"
    assert first != gvbsm.dropped(cfg, 1, 0)
    assert gvbsm.dropped(cfg.model_copy(update={"drop_rate": 0.0}), 0, 0) == frozenset()
    assert len(gvbsm.dropped(cfg.model_copy(update={"drop_rate": 1.0}), 0, 0)) == 4000


def test_a_class_can_fall_into_runs_that_meet_their_own_classes() -> None:
    """Tiny's code: 10 runs; at IPC 50 a batch of 100 is 20 classes of 5 images."""
    made = gvbsm.groups(Config(parts=10), ipc=50, classes=200)
    assert len(made) == 100
    assert made[0] == Group(tuple(range(20)), range(5))
    assert made[9] == Group(tuple(range(180, 200)), range(5))
    assert made[10] == Group(tuple(range(20)), range(5, 10))
    assert gvbsm.groups(Config(parts=10), ipc=1, classes=200)[1] == Group(tuple(range(100, 200)), range(1))
    assert gvbsm.groups(Config(), ipc=10, classes=25)[-1] == Group(tuple(range(20, 25)), range(10))


# --- the whole loop


class Stem(nn.Module):
    """Odd maps (8 -> 3), a BatchNorm, a second convolution whose input is resized to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        )
        self.head = nn.Linear(5 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)).flatten(1))


class Plain(nn.Module):
    """No BatchNorm at all, like the ConvNet of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.InstanceNorm2d(6), nn.ReLU(), nn.AvgPool2d(2))
        self.more = nn.Conv2d(6, 3, 3, padding=1)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.body(x)).flatten(1))


PATCHES = {"Stem": [4, 1], "Plain": [4, 1]}


@dataclass(frozen=True)
class Double(ToyTeacher):
    """A toy teacher in float64, or several that take turns."""

    several: tuple[ToyTeacher, ...] = ()

    @property
    def members(self) -> tuple[ToyTeacher, ...]:
        """Itself or the several."""
        return self.several or (self,)

    def logits(self, x_norm: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C]."""
        return self.net(x_norm.double()).float()


def backbone(kind: type[nn.Module]) -> Double:
    net, stream = kind().double(), generator("backbone", kind.__name__)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=stream, dtype=torch.float64) / 2
    statistics = {}
    for place, conv in enumerate(m for m in net.modules() if isinstance(m, nn.Conv2d)):
        for name, count in (("", conv.in_channels), ("patch_", PATCHES[kind.__name__][place])):
            statistics[f"conv/{place}/{name}mean"] = torch.randn(count, generator=stream)
            statistics[f"conv/{place}/{name}var"] = torch.rand(count, generator=stream) + 0.5
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.abs_().add_(0.5)  # type: ignore[union-attr]
    return Double(net.eval().requires_grad_(False), 8, statistics=statistics)


def backbones() -> Double:
    both = backbone(Stem), backbone(Plain)
    return Double(both[0].net, 8, several=both)


# A spectrum in the thousands gives DD almost no gradient at tau 4; here it has a say.
LOUD = Config(
    iterations=9, lr=0.3, r_loss=0.5, nuc_norm=0.02, tau=300.0, training_momentum=0.8, drop_rate=0.4, batch=6, jitter=3
)


def transcribed(cfg: Config, teacher: Double, group: Group, seed: int) -> Tensor:
    """Images of one group [c, s, 3, S, S] uint8: plain autograd, one thing after the other."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    x = _recover.noise("gvbsm", seed, 8)(group).double().flatten(0, 1)
    if cfg.init == "real":
        drawn = _selection.random_images("gvbsm", toy_pixels(), group.classes, len(group.slots), seed)
        x = (torch.cat([drawn[cls] for cls in group.classes]).double() / 255 - mean) / std
    x.requires_grad_()
    law = _views.ViewLaw("pad", torch.full((cfg.iterations,), 0.08), cfg.flip, cfg.jitter, 4)
    views = _views.draw(law, cfg.iterations, 8, generator(seed, "gvbsm", "views", group.name))
    targets = torch.tensor(group.classes).repeat_interleave(len(group.slots))
    adam = torch.optim.Adam([x], lr=cfg.lr, betas=(0.5, 0.9), eps=1e-8)
    averages: dict[tuple[int, int, int], Tensor] = {}
    for step in range(cfg.iterations):
        adam.param_groups[0]["lr"] = cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.iterations))
        top, left = (int(n) + 4 for n in views.boxes[step, :2])
        view = functional.pad(x, (4, 4, 4, 4))[:, :, top : top + 8, left : left + 8]
        view = view.flip(3) if views.flip[step] else view
        view = view.roll((int(views.roll[step, 0]), int(views.roll[step, 1])), (2, 3))
        turn = step % len(teacher.members)
        member = teacher.members[turn]
        layers = [m for m in member.net.modules() if isinstance(m, (nn.BatchNorm2d, nn.Conv2d))]
        seen: dict[nn.Module, Tensor] = {}
        handles = [m.register_forward_pre_hook(lambda m, args, seen=seen: seen.update({m: args[0]})) for m in layers]
        loss = functional.cross_entropy(member.net(view), targets)
        for handle in handles:
            handle.remove()
        convs = 0
        for place, layer in enumerate(layers):
            own = seen[layer]
            pairs = [(own.mean((0, 2, 3)), own.var((0, 2, 3), correction=0))]
            if isinstance(layer, nn.BatchNorm2d):
                wanted = [(layer.running_mean, layer.running_var)]
            else:
                convs += 1
                if step in gvbsm.dropped(cfg, seed, convs - 1):
                    continue
                pairs.append(defined_patches(own, 4))
                keys = [(f"conv/{convs - 1}/{k}mean", f"conv/{convs - 1}/{k}var") for k in ("", "patch_")]
                wanted = [(member.statistics[m], member.statistics[v]) for m, v in keys]
            for number, (now, goal) in enumerate(zip(sum(pairs, ()), sum(wanted, ()), strict=True)):
                average = held(averages.get((turn, place, number)), now, cfg.training_momentum, cfg.ema_from_zero)
                averages[turn, place, number] = average
                weight = cfg.r_loss * (cfg.first_multiplier if place == 0 else 1)
                loss = loss + weight * (average + now - now.detach() - goal).norm()
        spread = defined_densification(view.unflatten(0, (len(group.classes), -1)), cfg.tau)
        loss = loss + cfg.nuc_norm * spread.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.clamp_(-mean / std, (1 - mean) / std)
    pixels = (x.detach() * std + mean) * 255
    return pixels.round().to(torch.uint8).view(len(group.classes), -1, 3, 8, 8)


def recovered(cfg: Config, teacher: Double, seed: int = 3) -> Tensor:
    """A set of two groups [classes, s, 3, S, S] uint8."""
    made = gvbsm.groups(cfg, ipc=3, classes=4)
    found = gvbsm.synthesize(cfg, toy_pixels(), teacher, ipc=3, seed=seed, part=made, track=Track.quiet())
    return found.images_u8.unflatten(0, (4, 3))


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("init", ["noise", "real"])
def test_the_loop_is_that_of_the_definition(iterations: int, from_zero: bool, init: str) -> None:
    cfg = LOUD.model_copy(update={"ema_from_zero": from_zero, "iterations": iterations, "init": init})
    made = gvbsm.groups(cfg, ipc=3, classes=4)
    assert [group.classes for group in made] == [(0, 1), (2, 3)]
    wanted = torch.cat([transcribed(cfg, backbones(), group, 3) for group in made])
    assert torch.equal(recovered(cfg, backbones()), wanted)


def test_real_first_images_are_of_their_classes_and_drawn_once() -> None:
    still, real = LOUD.model_copy(update={"init": "real", "lr": 1e-9}), toy_pixels()
    pixels, labels = real.pixels("train")
    found = recovered(still, backbones())
    for cls, images in enumerate(found):
        rows = [int((pixels == image).flatten(1).all(1).nonzero()) for image in images]
        assert len(set(rows)) == 3
        assert labels[rows].tolist() == [cls] * 3
    assert not torch.equal(found, recovered(still, backbones(), seed=4))
    last = gvbsm.groups(still, ipc=3, classes=4)[1:]
    alone = gvbsm.synthesize(still, real, backbones(), ipc=3, seed=3, part=last, track=Track.quiet())
    assert torch.equal(alone.images_u8, found[2:].flatten(0, 1))


def test_real_first_images_need_enough_of_them() -> None:
    gvbsm.check(LOUD, ipc=21, size=8, per_class=[40, 20])
    with pytest.raises(UserError, match=r"gvbsm.*ipc 21.* 20 .*training images of class 1"):
        gvbsm.check(LOUD.model_copy(update={"init": "real"}), ipc=21, size=8, per_class=[40, 20])


@pytest.mark.parametrize(
    "change",
    [("r_loss", 0.4), ("nuc_norm", 0.0), ("training_momentum", 0.5), ("drop_rate", 0.0), ("first_multiplier", 1.0)],
)
def test_every_part_of_the_loss_has_a_say_in_that_loop(change: tuple[str, float]) -> None:
    assert not torch.equal(recovered(LOUD, backbones()), recovered(LOUD.model_copy(update=dict([change])), backbones()))


def test_packs_change_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = []
    for images in (1, 100):
        monkeypatch.setattr(_packs, "CPU_IMAGES", images)
        sets.append(recovered(LOUD, backbones()))
    assert torch.equal(*sets)


# --- what is refused


def with_statistics(change: dict[str, Tensor | None]) -> Double:
    good = backbone(Stem)
    changed = {key: value for key, value in (good.statistics | change).items() if value is not None}
    return Double(good.net, 8, statistics=changed)


def test_a_teacher_without_statistics_is_refused() -> None:
    with pytest.raises(UserError, match=r"Stem carries no conv/0/mean and conv/0/var \(it has 0 other.*collect"):
        recovered(LOUD, Double(backbone(Stem).net, 8))
    with pytest.raises(UserError, match="conv/1/patch_mean"):
        recovered(LOUD, with_statistics({"conv/1/patch_var": None}))


def test_statistics_of_another_net_or_other_images_are_refused() -> None:
    with pytest.raises(UserError, match="convolution 1 of the teacher Stem has 4 input channels and statistics of 9"):
        recovered(LOUD, with_statistics({"conv/1/mean": torch.zeros(9), "conv/1/var": torch.ones(9)}))
    patches = {"conv/0/patch_mean": torch.zeros(9), "conv/0/patch_var": torch.ones(9)}
    with pytest.raises(UserError, match=r"8 x 8 have 4 patches of 4 x 4 and its statistics 9.*collect them"):
        recovered(LOUD.model_copy(update={"drop_rate": 0.0}), with_statistics(patches))


def test_a_teacher_without_anything_to_match_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    with pytest.raises(UserError, match="Sequential has no Conv2d"):
        recovered(LOUD, Double(flat, 8))
    forgetful = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), flat).double().eval()
    with pytest.raises(UserError, match="without running statistics"):
        recovered(LOUD, Double(forgetful, 8))


def test_a_teacher_whose_logits_come_from_a_convolution_can_be_matched() -> None:
    """SqueezeNet has no linear layer."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    real = toy_pixels()
    teacher = ToyTeacher(net.eval().requires_grad_(False), real.size)
    teacher.statistics.update(statistics.collect([teacher], real, ["conv"], seed=0, track=Track.quiet())[0])
    cfg = gvbsm.Config(iterations=2, batch=8)
    part = gvbsm.groups(cfg, ipc=2, classes=4)
    found = gvbsm.synthesize(cfg, real, teacher, ipc=2, seed=0, part=part, track=Track.quiet())
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
