"""DWA: how far and where the teacher's weights go for a group, that they come back, and the loop on them (5.1)."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _plain import SIZE, Losses, deep_teacher, labels_of, plain, steps, through, to_u8
from _toys import ToyTeacher, toy_pixels
from torch import Tensor, nn
from torch.nn import functional

from distillery.data.real import Real
from distillery.methods import Group, _packs, _recover, dwa
from distillery.methods._recover import Recovery
from distillery.methods._views import ViewLaw, Views, curriculum, draw
from distillery.rng import generator
from distillery.track import Track

M, SEED = 10, 4
OPTIONS: dict[str, Any] = {"iterations": M, "batch": 2, "jitter": 2, "r_var": 11.0, "rho": 0.3, "K": 4}
FIRST, SECOND = Group((0, 1), range(1)), Group((2, 3), range(1))


def made(teacher: ToyTeacher, part: Sequence[Group] = (FIRST, SECOND), **options: Any) -> Tensor:
    cfg = dwa.Config(**OPTIONS | options)
    return dwa.synthesize(cfg, toy_pixels(), teacher, ipc=1, seed=SEED, part=part, track=Track.quiet()).images_u8


def declared(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Recovery:
    """What DWA asks of the engine."""
    asked: list[Recovery] = []

    def asking(recovery: Recovery, real: Real, teacher: Any, part: Sequence[Group], *_: object) -> Tensor:
        asked.append(recovery)
        return torch.zeros(sum(len(group.images) for group in part), 3, SIZE, SIZE, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(_recover, "recover", asking)
        made(deep_teacher(), **options)
    return asked[0]


def real_images(group: Group) -> Tensor:
    """The group's first images: a random real one of each class, normalised."""
    images_u8, labels = toy_pixels().pixels("train")
    teacher, found = deep_teacher(), []
    for cls in group.classes:
        own = images_u8[labels == cls]
        place = torch.randperm(len(own), generator=generator(SEED, "dwa", cls))[0]
        found.append(teacher.normalise(own[place].double() / 255))
    return torch.stack(found)


def views_of(group: Group, crop: str = "rrc") -> Views:
    law = ViewLaw(crop, curriculum(M, "constant"), 0.5 if crop == "rrc" else 0.0, 2)  # type: ignore[arg-type]
    return draw(law, M, SIZE, generator(SEED, "dwa", "views", group.name))


def risen(net: nn.Module, seen: Tensor, labels: Tensor, rho: float, times: int) -> nn.Module:
    """K steps of rho / K along the normalised gradient of the CE over all parameters."""
    net = copy.deepcopy(net).requires_grad_(True)
    for _ in range(times):
        net.zero_grad()
        functional.cross_entropy(net(seen), labels).backward()
        squares = [p.grad.square().sum() for p in net.parameters() if p.grad is not None]
        length = torch.stack(squares).sum().sqrt()
        with torch.no_grad():
            for p in net.parameters():
                p += rho / times * p.grad / (length + 1e-12)
    return net.requires_grad_(False)


def loss_of(net: nn.Module, seen: Tensor, group: Group) -> float:
    return float(functional.cross_entropy(net(seen), labels_of(group)))


@pytest.mark.parametrize("crop", ["rrc", "none"])
def test_weights_climb_the_loss_by_at_most_rho(crop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = deep_teacher()
    before = copy.deepcopy(teacher.net.state_dict())
    seen = through(views_of(FIRST, crop))(real_images(FIRST), 0)
    wanted = risen(teacher.net, seen, labels_of(FIRST), 0.3, 4)
    start = loss_of(teacher.net, seen, FIRST)
    recovery = declared(monkeypatch, crop=crop)
    first = recovery.init(FIRST)
    assert torch.allclose(first.double(), real_images(FIRST)[:, None], atol=1e-6)
    precise = Recovery(**{**vars(recovery), "init": lambda group: real_images(group)[:, None]})
    pack = _recover._Pack(precise, teacher, [FIRST], SEED)  # type: ignore[arg-type]
    with pack.ready():
        moved = dict(teacher.net.named_parameters())
        distance = torch.stack([(p - before[name]).square().sum() for name, p in moved.items()]).sum().sqrt()
        assert 0.2 < float(distance) <= 0.3 * (1 + 1e-9)
        assert loss_of(teacher.net, seen, FIRST) > start
        for name, p in wanted.named_parameters():
            assert torch.allclose(moved[name], p, rtol=0, atol=1e-11), name
            assert not moved[name].requires_grad
            assert not torch.equal(p, before[name]), "all parameters move"
        for name, buffer in teacher.net.named_buffers():
            assert torch.equal(buffer, before[name]), name
    after = teacher.net.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"crop": "none", "r_bn": 1.0, "first_bn": 2.0, "K": 1, "lr": 0.1}])
def test_dwa_is_the_plain_loop_on_the_risen_weights(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dwa.Config(**OPTIONS | options)
    recovery = declared(monkeypatch, **options)
    found = made(deep_teacher(), **options)
    for group in (FIRST, SECOND):
        teacher, view = deep_teacher(), through(views_of(group, cfg.crop))
        first = recovery.init(group).flatten(0, 1).double()  # as rounded to float32
        own = risen(teacher.net, view(first, 0), labels_of(group), cfg.rho, cfg.K)
        loop: list[tuple[Losses, Tensor]] = list(
            plain(
                [own],
                first,
                labels_of(group),
                view,
                iterations=M,
                lr=cfg.lr,
                r_bn=cfg.r_bn,
                first_bn=cfg.first_bn,
                r_var=cfg.r_var,
            )
        )
        for (losses, images), (wanted_losses, wanted) in zip(
            steps(recovery, teacher, [group], SEED), loop, strict=True
        ):
            assert losses[0] == pytest.approx(wanted_losses, rel=1e-9)
            assert float((images[0] - wanted).abs().max()) < 1e-8
        assert torch.equal(found[list(group.classes)], to_u8(loop[-1][1]))


@pytest.mark.parametrize("images", [1, 1000])
def test_every_group_starts_from_the_teachers_own_weights(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order and company, at the same bytes; the adjusted weights do matter."""
    monkeypatch.setattr(_packs, "CPU_IMAGES", images)
    together = made(deep_teacher(dtype=torch.float32))
    assert torch.equal(made(deep_teacher(dtype=torch.float32), [SECOND, FIRST]), together)
    assert torch.equal(made(deep_teacher(dtype=torch.float32), [SECOND]), together[2:])
    teacher = deep_teacher(dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(made(teacher), together), "one run left something to the next"
    assert not torch.equal(made(teacher, rho=1e-9), together)


class Stubborn(nn.Module):
    """A net that gives up at its n-th call."""

    def __init__(self, net: nn.Module, calls: int) -> None:
        super().__init__()
        self.net, self.calls = net, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            raise ZeroDivisionError
        return self.net(x)


@pytest.mark.parametrize("calls", [2, 4, 5, 6, 9])
def test_weights_come_back_after_an_exception_in_the_ascent_or_later(calls: int) -> None:
    """Call 1 asks for sizes, 2 to 5 climb, and the rest are iterations."""
    inner = deep_teacher(dtype=torch.float32).net
    before = copy.deepcopy(inner.state_dict())
    with pytest.raises(ZeroDivisionError):
        made(ToyTeacher(Stubborn(inner, calls), SIZE))
    assert all(torch.equal(tensor, before[name]) for name, tensor in inner.state_dict().items())
    assert not any(p.requires_grad for p in inner.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in inner.modules())
