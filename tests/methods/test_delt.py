"""DELT: who is optimised when and how long, its first steps, and both schedules against a plain loop (6.1)."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from _plain import SIZE, deep_teacher, labels_of, plain, steps, through, to_u8
from _toys import ToyTeacher, toy_pixels
from torch import Tensor, nn

from distillery.errors import UserError
from distillery.methods import METHODS, Group, _packs, _recover, delt, median
from distillery.methods._recover import Recovery
from distillery.methods._views import ViewLaw, curriculum, draw
from distillery.rng import generator
from distillery.track import Track

M, RI, SEED = 12, 3, 1
OPTIONS: dict[str, Any] = {"iterations": M, "round_iterations": RI, "batch": 12, "jitter": 1}
IPC = 6
PART = [Group((0, 1), range(IPC)), Group((2, 3), range(IPC))]
STARTS = [0, 0, 3, 3, 6, 9]  # four rounds for six images: the first two rounds get one more


def made(teacher: ToyTeacher, **options: Any) -> Tensor:
    cfg = delt.Config(**OPTIONS | options)
    part = delt.groups(cfg, ipc=IPC, classes=4)
    assert part == PART
    return delt.synthesize(cfg, toy_pixels(), teacher, ipc=IPC, seed=SEED, part=part, track=Track.quiet()).images_u8


def declared(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Recovery:
    """What DELT asks of the engine."""
    asked: list[Recovery] = []

    def asking(recovery: Recovery, _real: Any, _teacher: Any, part: Sequence[Group], *_: object) -> Tensor:
        asked.append(recovery)
        return torch.zeros(sum(len(group.images) for group in part), 3, SIZE, SIZE, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(_recover, "recover", asking)
        made(deep_teacher(), **options)
    return asked[0]


@pytest.mark.parametrize(
    ("ipc", "round_iterations", "mean"),
    [(10, 500, 2550), (50, 500, 2310), (100, 500, 2290), (10, 1000, 2700), (50, 1000, 2540), (100, 1000, 2500)],
)
def test_mean_iterations_are_the_papers(ipc: int, round_iterations: int, mean: float) -> None:
    starts = delt.starts(delt.Config(round_iterations=round_iterations), ipc)
    assert len(starts) == ipc
    assert sum(4000 - start for start in starts) / ipc == mean
    estimate = delt.estimate(delt.Config(round_iterations=round_iterations), ipc=ipc, classes=3, size=32, train=7)
    assert estimate["forwards"] == 7 + 3 * ipc * mean


@pytest.mark.parametrize(
    ("ipc", "sizes"), [(10, [2, 2, 1, 1, 1, 1, 1, 1]), (50, [7, 7, 6, 6, 6, 6, 6, 6]), (3, [1, 1, 1]), (8, [1] * 8)]
)
def test_rounds_are_nearly_equal_and_the_first_get_the_rest(ipc: int, sizes: list[int]) -> None:
    starts = delt.starts(delt.Config(), ipc)
    assert list(starts) == [500 * place for place, size in enumerate(sizes) for _ in range(size)]


def test_without_early_late_every_image_has_all_iterations() -> None:
    assert delt.starts(delt.Config(early_late=False, iterations=2300), 5) == (0,) * 5
    delt.check(delt.Config(early_late=False, iterations=2300), ipc=5, size=32, per_class=None)
    with pytest.raises(UserError, match=r"iterations 2300 is not a multiple of round_iterations 500; set .* to 2000,"):
        delt.check(delt.Config(iterations=2300), ipc=5, size=32, per_class=None)
    with pytest.raises(UserError, match=r"iterations 300 .* set iterations to 500, or early_late to false"):
        delt.check(delt.Config(iterations=300), ipc=5, size=32, per_class=None)


class Counting(nn.Module):
    """Remembers how many images each call brought."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.batches = net, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("schedule", ["global", "phase"])
def test_the_teacher_sees_only_images_whose_time_has_come(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packs, "SMALL_PIXELS", 0)  # one group after the other, by this very teacher
    net = Counting(deep_teacher(dtype=torch.float32).net)
    made(ToyTeacher(net, SIZE), schedule=schedule)
    wanted = [2 * sum(start <= step for start in STARTS) for step in range(M)]
    assert net.batches[-2 * M :] == wanted * 2
    assert sum(wanted) == 2 * sum(M - start for start in STARTS)


@pytest.mark.parametrize("schedule", ["global", "phase"])
def test_delt_is_the_plain_loop_where_waiting_images_have_no_gradient(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official code's Adam over the whole batch; in phases also a new rate, curriculum and optimiser each round."""
    teacher, options = deep_teacher(), {"schedule": schedule, "r_bn": 0.5, "first_bn": 4.0}
    recovery, found = declared(monkeypatch, **options), made(teacher, **options)
    length = RI if schedule == "phase" else M
    bounds = torch.cat([curriculum(length, "cosine")] * (M // length))
    for group in PART:
        views = draw(ViewLaw("rrc", bounds, 0.5, 1), M, SIZE, generator(SEED, "delt", "views", group.name))
        first = recovery.init(group).flatten(0, 1).double()
        loop = plain(
            [teacher.net],
            first,
            labels_of(group),
            through(views),
            iterations=M,
            lr=0.25,
            r_bn=0.5,
            first_bn=4.0,
            active=lambda step: [place for place in range(2 * IPC) if STARTS[place % IPC] <= step],
            round_length=length,
        )
        for step, ((losses, images), (wanted_losses, wanted)) in enumerate(
            zip(steps(recovery, teacher, [group], SEED), loop, strict=True)
        ):
            active = [place for place in range(2 * IPC) if STARTS[place % IPC] <= step]
            waiting = [place for place in range(2 * IPC) if STARTS[place % IPC] > step]
            assert losses[0] == pytest.approx(wanted_losses, rel=1e-9)
            assert len(images[0]) == len(active)
            assert float((images[0] - wanted[active]).abs().max()) < 1e-8
            assert torch.allclose(wanted[waiting], first[waiting], atol=1e-6), "a waiting image moved"
        own = [cls * IPC + slot for cls, slot in group.images]
        assert torch.equal(found[own], to_u8(wanted))


@pytest.mark.parametrize("schedule", ["global", "phase"])
def test_first_steps_of_late_images_are_158_rates_long_under_the_global_schedule(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1 - b1) / sqrt(1 - b2) = 1.58; in phases every image takes its first step with the others, one rate long."""
    options = {"iterations": 120, "round_iterations": 60, "schedule": schedule, "lr": 0.001}
    recovery = declared(monkeypatch, **options)
    starts = delt.starts(delt.Config(**OPTIONS | options), IPC)
    assert starts == (0, 0, 0, 60, 60, 60)
    first = recovery.init(PART[0])
    rates = recovery.rates()
    before: Tensor | None = None
    for step, (_, images) in enumerate(steps(recovery, deep_teacher(), PART[:1], SEED)):
        x = images[0].unflatten(0, (2, -1))
        if step in (0, 60):
            late = slice(0, 3) if step == 0 else slice(3, 6)
            moved = (x[:, late] - first[:, late].double()).abs() / float(rates[step])
            wanted = 1.0 if step == 0 or schedule == "phase" else 0.5 / math.sqrt(0.1)
            assert float(moved.median()) == pytest.approx(wanted, rel=0.02)
        if step == 60 and before is not None:
            early = (x[:, :3] - before).abs() / float(rates[step])
            assert float(early.median()) < 1.1
        before = x
    assert 0.5 / math.sqrt(0.1) == pytest.approx(1.58, abs=0.002)
    assert float(rates[60]) == pytest.approx(0.001 if schedule == "phase" else 0.0005)


def test_first_images_are_those_around_the_median_in_the_order_of_selection() -> None:
    """At a rate of all but nothing the set is that of the method median."""
    teacher, real = deep_teacher(dtype=torch.float32), toy_pixels()
    wanted = METHODS["median"].synthesize(
        median.Config(),
        real,
        teacher,
        ipc=IPC,
        seed=0,
        part=[Group((cls,), range(IPC)) for cls in range(4)],
        track=Track.quiet(),
    )
    assert torch.equal(made(teacher, lr=1e-9), wanted.images_u8)


def test_a_batch_holds_whole_classes() -> None:
    cfg = delt.Config(batch=100)
    assert [group.classes for group in delt.groups(cfg, ipc=50, classes=5)] == [(0, 1), (2, 3), (4,)]
    assert [len(group.classes) for group in delt.groups(cfg, ipc=10, classes=100)] == [10] * 10
