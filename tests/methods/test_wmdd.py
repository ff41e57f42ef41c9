"""WMDD: the first steps against a plain transcription with autograd, its groups, its weights, and what is refused."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from _toys import CPU, MEAN, STD, ToyTeacher, toy_net, toy_pixels
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distillery import statistics
from distillery.data import augment
from distillery.data.real import Real
from distillery.errors import UserError
from distillery.methods import Group, _barycenter, _matching, _recover, _views, config_of, wmdd
from distillery.rng import generator, seeded
from distillery.track import Track

IPC, STEPS, SEED = 3, 10, 5
PAPER = {"crop": "rrc", "jitter": 2, "iterations": 40, "batch": 6, "r_bn": 0.7, "first_bn": 2.0}
CODE = PAPER | {"feature_loss": "frobenius", "r_ce": 1.0, "weighted": True}


def two_norms(real: Real) -> ToyTeacher:
    """A net with two BatchNorm layers of different width, and its statistics."""
    with seeded("wmdd"):
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, len(real.classes)))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    teacher = ToyTeacher(net.eval().requires_grad_(False), real.size)
    teacher.statistics.update(statistics.collect([teacher], real, ("class_bn",), seed=0, track=Track.quiet())[0])
    return teacher


def of_class(real: Real, cls: int) -> Tensor:
    images_u8, labels = real.pixels("train")
    return images_u8[labels == cls]


def passed(net: nn.Sequential, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs of the BatchNorm layers, input of the last layer, logits."""
    before = []
    for layer in net[:-1]:
        if isinstance(layer, nn.BatchNorm2d):
            before.append(x)
        x = layer(x)
    return before, x, net[-1](x)


def plain_loss(
    cfg: Any, teacher: ToyTeacher, views: Tensor, classes: Sequence[int], atoms: Tensor, weights: Tensor
) -> Tensor:
    """The loss of one group by its definition, image by image; views [n, 3, S, S], atoms [c, s, D], weights [c, s]."""
    before, features, logits = passed(teacher.net, views)
    distance = (features - atoms.flatten(0, 1)).square().sum()
    loss = distance if cfg.feature_loss == "squared" else distance.sqrt()
    targets = torch.tensor(classes).repeat_interleave(IPC)
    loss = loss + cfg.r_ce * cross_entropy(logits, targets)
    start = 0
    for number, x in enumerate(before):
        columns = slice(start, start + x.shape[1])
        start += x.shape[1]
        norms = []
        for place, cls in enumerate(classes):
            own, share = x[place * IPC : (place + 1) * IPC], weights[place]
            mean = sum(w * image.mean((1, 2)) for w, image in zip(share, own, strict=True))
            off = [(image - mean[:, None, None]).square().mean((1, 2)) for image in own]
            var = sum(w * each for w, each in zip(share, off, strict=True))
            want = (teacher.statistics[f"class_bn/{what}"][cls, columns].double() for what in ("mean", "var"))
            norms += [(mean - next(want)).square().sum().sqrt() + (var - next(want)).square().sum().sqrt()]
        loss = loss + cfg.r_bn * (cfg.first_bn if number == 0 else 1.0) * sum(norms) / len(norms)
    return loss


@pytest.mark.parametrize("options", [PAPER, CODE], ids=["paper", "code"])
def test_the_first_steps_are_those_of_a_plain_transcription(options: dict[str, Any]) -> None:
    real = toy_pixels(classes=4)
    cfg: Any = config_of("wmdd", options, real.name, IPC)
    teacher = two_norms(real)
    double = replace(teacher, net=deepcopy(teacher.net).double())
    groups = wmdd.groups(cfg, ipc=IPC, classes=4)
    assert groups == [Group((0, 1), range(IPC)), Group((2, 3), range(IPC))]
    recovery = wmdd.declare(cfg, wmdd.Targets(cfg, real, teacher, IPC, SEED), real.size, SEED)
    run = _recover._Pack(recovery, double, groups, SEED)

    atoms, weights, x, views = [], [], [], []
    for group in groups:
        found = []
        for cls in group.classes:
            x_norm = augment.evaluation_view(of_class(real, cls), real.size, MEAN, STD)
            features = passed(teacher.net, x_norm)[1]
            stream = generator(SEED, "wmdd", "barycenter", cls)
            found.append(_barycenter.barycenter(features, IPC, stream, of="it", weighted=cfg.weighted))
        atoms.append(torch.stack([b for b, _ in found]))
        weights.append(torch.stack([w for _, w in found]))
        x.append(_recover.noise("wmdd", SEED, real.size)(group).double().requires_grad_())
        law = recovery.law
        views.append(_views.draw(law, cfg.iterations, real.size, generator(SEED, "wmdd", "views", group.name)))
    adam = torch.optim.Adam(x, lr=cfg.lr, betas=(0.5, 0.9), eps=1e-8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with run.ready():
        for step in range(STEPS):
            losses = []
            for place, group in enumerate(groups):
                rows, columns = _views.matrices([views[place]], step, real.size, torch.device("cpu"))
                seen = _views.see(x[place].flatten(0, 1)[None], rows, columns)[0]
                losses.append(plain_loss(cfg, double, seen, group.classes, atoms[place], weights[place]))
            adam.zero_grad()
            sum(losses).backward()  # type: ignore[union-attr]
            adam.param_groups[0]["lr"] = cfg.lr * (1 + torch.cos(torch.tensor(torch.pi * step / cfg.iterations))) / 2
            adam.step()
            run.advance()
            with torch.no_grad():
                for images in x:
                    images.clamp_(-mean / std, (1 - mean) / std)
            torch.testing.assert_close(run.records[-1][2].sum(0), torch.stack(losses).detach(), rtol=1e-5, atol=0)
            moments = torch.stack([adam.state[images]["exp_avg"] for images in x])  # sums up all gradients so far
            torch.testing.assert_close(run.m, moments, rtol=1e-4, atol=1e-6 * float(moments.abs().max()))
            torch.testing.assert_close(run.x, torch.stack([images.detach() for images in x]), rtol=0, atol=1e-4)
    assert float((run.x - run.first).abs().mean()) > 0.1, "the images have hardly moved"


def test_the_images_come_nearer_to_their_atoms() -> None:
    real = toy_pixels(classes=3)
    teacher = two_norms(real)
    far = []
    for iterations in (1, 100):
        cfg: Any = config_of("wmdd", PAPER | {"iterations": iterations, "r_bn": 0.0, "crop": "none"}, "cifar10", IPC)
        part = wmdd.groups(cfg, ipc=IPC, classes=3)
        made = wmdd.synthesize(cfg, real, teacher, ipc=IPC, seed=SEED, part=part, track=Track.quiet())
        found = wmdd.features(teacher, made.images_u8)
        targets = wmdd.Targets(cfg, real, teacher, IPC, SEED)
        atoms = torch.cat([targets.barycenter(cls)[0] for cls in range(3)])
        far.append(float(wmdd.distance(found[None], atoms[None], "squared")))
    assert far[1] < 0.3 * far[0], far


def test_groups_hold_whole_classes_and_the_last_may_be_smaller() -> None:
    cfg: Any = config_of("wmdd", {}, "imagenette", 10)
    assert [len(g.classes) for g in wmdd.groups(cfg, ipc=40, classes=5)] == [2, 2, 1]
    assert [g.slots for g in wmdd.groups(cfg, ipc=200, classes=2)] == [range(200)] * 2
    assert len(wmdd.groups(cfg, ipc=10, classes=10)) == 1
    real = toy_pixels(classes=3)
    small: Any = config_of("wmdd", {"batch": 2 * IPC, "iterations": 2}, real.name, IPC)
    part = wmdd.groups(small, ipc=IPC, classes=3)
    made = wmdd.synthesize(small, real, two_norms(real), ipc=IPC, seed=0, part=part, track=Track.quiet())
    assert made.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert made.extras == {}


def test_weights_come_with_the_set_and_are_one_on_average() -> None:
    real = toy_pixels(classes=3)
    cfg: Any = config_of("wmdd", {"weighted": True, "iterations": 2, "batch": IPC}, real.name, IPC)
    part = wmdd.groups(cfg, ipc=IPC, classes=3)
    made = wmdd.synthesize(cfg, real, two_norms(real), ipc=IPC, seed=0, part=part[1:], track=Track.quiet())
    weights = made.extras["weights"]
    assert (weights.shape, weights.dtype) == ((2 * IPC,), torch.float32)
    torch.testing.assert_close(weights.view(2, IPC).mean(1), torch.ones(2))
    targets = wmdd.Targets(cfg, real, two_norms(real), IPC, 0)
    torch.testing.assert_close(weights, torch.cat([targets.weights(cls) for cls in (1, 2)]).float() * IPC)


def test_equal_weights_match_like_no_weights() -> None:
    x = torch.randn(6, 4, 5, 5, generator=generator("tap"), dtype=torch.float64)
    mean, var = torch.randn(2, 3, 4, generator=generator("targets"), dtype=torch.float64)
    plain = _matching.MomentTap(nn.Identity(), mean, var, 0.3, 0.3)
    weighted = wmdd.weighted_tap(plain, torch.full((3, 2), 0.5, dtype=torch.float64))
    gradients = []
    for tap in (plain, weighted):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(tap.pull(leaf, 3).sin().sum(), leaf)[0])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(plain.values, weighted.values)


def test_what_cannot_work_is_refused() -> None:
    real = toy_pixels(classes=3)
    bare = ToyTeacher(toy_net(3), real.size, compute=CPU)
    cfg: Any = config_of("wmdd", {"iterations": 2}, real.name, IPC)
    part = wmdd.groups(cfg, ipc=IPC, classes=3)
    with pytest.raises(UserError, match=r"'class_bn/mean' .* has only \[\].*statistics.collect"):
        wmdd.synthesize(cfg, real, bare, ipc=IPC, seed=0, part=part, track=Track.quiet())
    for shape in ((2, 4), (3, 5)):  # another data set's, another net's
        other = replace(bare, statistics={f"class_bn/{what}": torch.ones(shape) for what in ("mean", "var")})
        with pytest.raises(UserError, match=rf"4 BatchNorm .* 3 classes, .* of \[{shape[1]}, {shape[0]}\]; .*collect"):
            wmdd.synthesize(cfg, real, other, ipc=IPC, seed=0, part=part, track=Track.quiet())
    with pytest.raises(UserError, match=r"ipc 13 .* 12 real training images of class 0"):
        wmdd.synthesize(cfg, real, bare, ipc=13, seed=0, part=part, track=Track.quiet())


def test_the_estimate_grows_with_iterations_and_with_the_data() -> None:
    def forwards(iterations: int, train: int) -> int:
        cfg: Any = config_of("wmdd", {"iterations": iterations}, "cifar10", 10)
        return wmdd.estimate(cfg, ipc=10, classes=10, size=32, train=train)["forwards"]

    assert forwards(2000, 50_000) == 10 * 10 * 2000 + 50_000
    assert all(a < b for a, b in pairwise([forwards(1, 0), forwards(1, 5), forwards(2, 5)]))
