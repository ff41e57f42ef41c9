"""The recover loop against a plain one, in float64; what a pack, a kill, a NaN and little memory do to it."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _plain import HIGH, LOW, SIZE, Several, deep_teacher, labels_of, plain, steps, through, to_u8
from _toys import CPU, MEAN, STD, Killed, ToyTeacher, ToyTrack, toy_pixels
from torch import Tensor, nn

from distillery import nets
from distillery.device import Compute
from distillery.errors import NonFiniteLoss, UserError
from distillery.methods import Group, _packs, _recover, config_of, in_order, sre2l
from distillery.methods._matching import MomentTap, Tap, norms
from distillery.methods._recover import Recovery, Seen
from distillery.methods._views import ViewLaw, curriculum, draw
from distillery.rng import generator, seeded
from distillery.teacher import Card, Frozen
from distillery.track import Track

pytestmark = pytest.mark.usefixtures("watched_closely")

M = 10
ONE, TWO = Group((0, 1, 2, 3), range(1)), Group((0, 1, 2, 3), range(1, 2))


def law(crop: str = "none", flip: float = 0.5, jitter: int = 2, iterations: int = M, pad: int = 0) -> ViewLaw:
    return ViewLaw(crop, curriculum(iterations, "constant"), flip, jitter, pad)  # type: ignore[arg-type]


STILL = law(flip=0.0, jitter=0)


def recovery(**changes: Any) -> Recovery:
    """SRe2L's, short."""
    base = Recovery(name="toy", iterations=M, lr=0.25, law=law(), init=_recover.noise("toy", 0, SIZE), r_bn=0.3)
    return replace(base, **changes)


def views_of(wanted: Recovery, group: Group, seed: int = 0, exactly: bool = False) -> Callable[[Tensor, int], Tensor]:
    stream = generator(seed, wanted.name, "views", group.name)
    return through(draw(wanted.law, wanted.iterations, SIZE, stream), exactly)


def run(wanted: Recovery, teacher: Any, part: Sequence[Group] = (ONE, TWO), track: Track | None = None) -> Tensor:
    return _recover.recover(wanted, toy_pixels(), teacher, part, 0, track or Track.quiet())


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The packs that will be run."""
    packs: list[list[Group]] = []

    class Spy(_recover._Pack):
        def __init__(self, *arguments: Any) -> None:
            packs.append(arguments[2])
            super().__init__(*arguments)

    monkeypatch.setattr(_recover, "_Pack", Spy)
    return packs


@pytest.mark.parametrize("crop", ["none", "rrc", "pad"])
def test_every_step_is_that_of_a_plain_loop(crop: str) -> None:
    """Losses and images of a pack of two groups against each group in autograd, torch's Adam and torch's hooks."""
    teacher, wanted = deep_teacher(), recovery(law=law(crop, pad=2))
    loops = [
        plain(
            [teacher.net],
            wanted.init(group).flatten(0, 1).double(),
            labels_of(group),
            views_of(wanted, group, exactly=crop == "none"),
            iterations=M,
            lr=0.25,
            r_bn=0.3,
        )
        for group in (ONE, TWO)
    ]
    for (losses, images), *theirs in zip(steps(wanted, teacher, [ONE, TWO]), *loops, strict=True):
        for own, x, (wanted_losses, wanted_x) in zip(losses, images, theirs, strict=True):
            assert own == pytest.approx(wanted_losses, rel=1e-10)
            assert float((x - wanted_x).abs().max()) < 1e-9


@pytest.mark.parametrize("options", [{}, {"crop": "none", "lr": 0.1, "r_bn": 2.0, "first_bn": 3.0, "jitter": 1}])
def test_sre2l_is_the_plain_loop(options: dict[str, Any]) -> None:
    teacher, real = deep_teacher(), toy_pixels()
    cfg = sre2l.Config(**{"iterations": M, "jitter": 3, "batch": 2} | options)
    part = sre2l.groups(cfg, ipc=2, classes=4)
    assert [group.classes for group in part] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    found = sre2l.synthesize(cfg, real, teacher, ipc=2, seed=5, part=part, track=Track.quiet())
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    flip = 0.0 if options else 0.5
    for group in part:
        noise = torch.randn(2, 1, 3, SIZE, SIZE, generator=generator(5, "sre2l", "init", group.name))
        stream = generator(5, "sre2l", "views", group.name)
        views = draw(ViewLaw(cfg.crop, curriculum(M, "constant"), flip, cfg.jitter), M, SIZE, stream)
        *_, (_, last) = plain(
            [teacher.net],
            noise.flatten(0, 1).double(),
            labels_of(group),
            through(views),
            iterations=M,
            lr=cfg.lr,
            r_bn=cfg.r_bn,
            first_bn=cfg.first_bn,
        )
        own = [cls * 2 + slot for cls, slot in group.images]
        assert torch.equal(found.images_u8[own], to_u8(last))


class Odd(nn.Module):
    """Runs one BatchNorm twice and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(5)
        self.last = nn.Linear(3 * SIZE**2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        return self.last(self.twice(x.tanh()).sigmoid().flatten(1))


def test_a_layer_counts_as_often_as_it_runs() -> None:
    with seeded(0, "odd"):
        teacher = ToyTeacher(Odd().double().eval().requires_grad_(False), SIZE)
    is_the_plain_loop(teacher)


def test_teachers_take_turns() -> None:
    is_the_plain_loop(Several((deep_teacher(), deep_teacher(name="other"))))


def is_the_plain_loop(teacher: Any) -> None:
    """With these members, losses and images of every step are those of plain autograd."""
    wanted = recovery()
    loop = plain(
        [member.net for member in teacher.members],
        wanted.init(ONE).flatten(0, 1).double(),
        labels_of(ONE),
        views_of(wanted, ONE),
        iterations=M,
        lr=0.25,
        r_bn=0.3,
    )
    for (losses, images), (wanted_losses, wanted_x) in zip(steps(wanted, teacher, [ONE]), loop, strict=True):
        assert losses[0] == pytest.approx(wanted_losses, rel=1e-10)
        assert float((images[0] - wanted_x).abs().max()) < 1e-9


def pushed(gradients: Sequence[float], **changes: Any) -> list[float]:
    """One pixel's path when its gradient at each step is given; the teacher says nothing."""
    term = lambda seen: gradients[seen.step] * seen.views.sum((1, 2, 3, 4))  # noqa: E731
    centre = lambda group: torch.zeros(len(group.classes), 1, 3, SIZE, SIZE)  # noqa: E731
    wanted = recovery(law=STILL, init=centre, r_bn=0.0, r_ce=0.0, terms={"push": term}, **changes)
    return [float(images[0][0, 0, 0, 0]) for _, images in steps(wanted, deep_teacher(), [ONE])]


def test_each_iteration_has_its_own_rate() -> None:
    """Under a constant gradient each of Adam's steps is as long as the learning rate."""
    path = [0.0, *pushed([1.0] * M)]
    for t in range(M):
        assert path[t] - path[t + 1] == pytest.approx(0.25 * (1 + math.cos(math.pi * t / M)) / 2, rel=1e-6)


def test_a_method_may_set_the_rates_itself() -> None:
    factor = torch.tensor([1.0, 0.5, 0.0, 2.0] + [0.1] * 6, dtype=torch.float64)
    path = [0.0, *pushed([1.0] * M, factor=factor, lr=0.1)]
    assert [path[t] - path[t + 1] for t in range(M)] == pytest.approx((0.1 * factor).tolist(), rel=1e-6)


@pytest.mark.parametrize("restarts", [(), (4,), (3, 7)])
def test_the_optimiser_is_adam_and_starts_anew_where_asked(restarts: tuple[int, ...]) -> None:
    gradients = [1.0, -2.0, 0.5, 3.0, -0.1, 0.2, 4.0, -1.0, 0.3, 0.01]
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    wanted = []
    for t in range(M):
        if t == 0 or t in restarts:
            adam = torch.optim.Adam([x], lr=0.0, betas=(0.5, 0.9))
        adam.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * t / M)) / 2
        x.grad = torch.tensor([gradients[t]], dtype=torch.float64)
        adam.step()
        wanted.append(x.item())
    assert pushed(gradients, restarts=restarts) == pytest.approx(wanted, abs=1e-12)


def test_pixels_stay_among_those_of_real_images() -> None:
    bounds = [torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (LOW, HIGH)]
    for step, (_, images) in enumerate(steps(recovery(lr=5.0), deep_teacher(), [ONE])):
        low, high = (float(edge) for edge in ((images[0] - bounds[0]).min(), (bounds[1] - images[0]).min()))
        assert min(low, high) > -1e-12
        assert step > 0 or low == high == 0.0, "nothing was held back"


def test_images_at_rest_come_back_as_they_were() -> None:
    """All 256 levels of each channel survive normalisation and rounding."""
    levels = torch.arange(4 * 2 * 3 * 64).remainder(256).to(torch.uint8).view(4, 2, 3, SIZE, SIZE)
    init = _recover.given(dict(enumerate(levels)), deep_teacher(dtype=torch.float32))
    wanted = recovery(init=init, factor=torch.zeros(M))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(run(wanted, deep_teacher(dtype=dtype)), levels.flatten(0, 1))


def test_noise_is_standard_normal_and_its_own_for_each_group() -> None:
    init = _recover.noise("toy", 3, 32)
    first, other = init(Group(tuple(range(10)), range(2))), init(Group(tuple(range(10)), range(2, 4)))
    assert first.shape == (10, 2, 3, 32, 32)
    assert float(first.mean()) == pytest.approx(0, abs=5 / math.sqrt(first.numel()))
    assert float(first.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.02
    assert torch.equal(first, _recover.noise("toy", 3, 32)(Group(tuple(range(10)), range(2))))
    assert not torch.equal(first, _recover.noise("toy", 4, 32)(Group(tuple(range(10)), range(2))))
    assert not torch.equal(first, _recover.noise("yot", 3, 32)(Group(tuple(range(10)), range(2))))


def test_first_images_are_chosen_once(tmp_path: Path) -> None:
    """A killed step neither chooses again nor forgets how far it was in choosing."""
    images, calls = {2: torch.ones(1, 3, 2, 2, dtype=torch.uint8), 5: torch.zeros(2, 3, 2, 2, dtype=torch.uint8)}, []

    def choose(own: Track) -> dict[int, Tensor]:
        calls.append(own.load(quiet=True))
        own.save({"scores": torch.ones(3)}, {"units": 1})
        if len(calls) == 1:
            raise Killed
        return images

    for _ in range(4):
        try:
            found = _recover.once(Track(folder=tmp_path), choose)
        except Killed:
            assert len(calls) == 1
    assert [call and call[1] for call in calls] == [None, {"units": 1}]
    assert found.keys() == images.keys()
    assert all(torch.equal(found[cls], images[cls]) for cls in images)
    assert Track(folder=tmp_path).child("choosing").load() is None


def test_groups_hold_one_image_of_each_class_or_all_images_of_few() -> None:
    assert _recover.one_per_class(5, 2, 3) == [
        Group((0, 1, 2), range(1)),
        Group((0, 1, 2), range(1, 2)),
        Group((3, 4), range(1)),
        Group((3, 4), range(1, 2)),
    ]
    assert _recover.class_major(5, 3, 7) == [
        Group((0, 1), range(3)),
        Group((2, 3), range(3)),
        Group((4,), range(3)),
    ]
    assert _recover.class_major(2, 50, 10) == [Group((0,), range(50)), Group((1,), range(50))]


def test_images_come_in_the_order_of_class_and_slot() -> None:
    part = [Group((2, 3), range(1)), Group((0, 1), range(1, 2)), Group((0, 1), range(1))]
    place = lambda cls, slot: (10 * cls + slot + 1) / 255  # noqa: E731

    def init(group: Group) -> Tensor:
        own = torch.tensor([place(*image) for image in group.images]).view(-1, 1, 1, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return ((own - mean) / std).expand(-1, 3, SIZE, SIZE).unflatten(0, (2, 1))

    found = run(recovery(init=init, factor=torch.zeros(M)), deep_teacher(), part)
    assert found[:, 0, 0, 0].tolist() == [1, 2, 11, 12, 21, 31]
    assert in_order(part) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]


GROUPS = [Group((0, 1), range(slot, slot + 1)) for slot in range(5)] + [Group((2,), range(1)), Group((3,), range(1))]


@pytest.mark.parametrize("images", [1, 4, 7, 1000])
def test_a_pack_of_any_size_gives_the_same_bytes(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; in float32 a CPU's kernels differ in the last bit from batch to batch (see the next test)."""
    alone = torch.cat([run(recovery(), deep_teacher(), [group]) for group in GROUPS[:5]])
    monkeypatch.setattr(_packs, "CPU_IMAGES", images)
    packs = spied(monkeypatch)
    found = run(recovery(), deep_teacher(), GROUPS)
    assert [image for pack in packs for group in pack for image in group.images] == [
        image for group in GROUPS for image in group.images
    ]
    for pack in packs:
        assert len({(len(group.classes), len(group.slots)) for group in pack}) == 1
        assert len(pack) == 1 or sum(len(group.images) for group in pack) <= images
    assert len(packs) == {1: 7, 4: 4, 7: 3, 1000: 2}[images]
    assert torch.equal(found[:10], alone.view(5, 2, 3, SIZE, SIZE).transpose(0, 1).flatten(0, 1))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine: the order of additions depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def wide_teacher() -> ToyTeacher:
    """Layers whose kernels change with the number of images and of threads."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)
    )
    net.extend([nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 4)])
    stream = generator("wide")
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream) / 8
    return ToyTeacher(CPU.place(net).eval().requires_grad_(False), SIZE)


def last_pixels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The last iterate of each group before it is rounded."""
    found: dict[str, Tensor] = {}

    class Spy(_recover._Pack):
        def images_u8(self) -> Tensor:
            found.update(zip([group.name for group in self.groups], self.x.clone(), strict=True))
            return super().images_u8()

    monkeypatch.setattr(_recover, "_Pack", Spy)
    return found


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("changes", [{}, {"ascent": (0.5, 3)}], ids=["plain", "ascent"])
@pytest.mark.parametrize("small", [0, 4, 100], ids=lambda images: f"up to {images} images are few")
def test_a_group_alone_is_the_same_to_the_last_bit(
    small: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, whatever else is made, before it or beside it, larger or smaller."""
    monkeypatch.setattr(_packs, "SMALL_PIXELS", small * SIZE**2)
    wanted, found = recovery(iterations=4, **changes), last_pixels(monkeypatch)
    part = [Group((0, 1, 2, 3), range(slot, slot + 3)) for slot in (0, 3)]
    part += [Group(tuple(range(classes)), range(slot, slot + 1)) for classes in (3, 2, 1) for slot in (6, 7)]
    run(wanted, wide_teacher(), part)
    whole = found.copy()
    for group in (part[0], *part[2::2]):
        found.clear()
        run(wanted, wide_teacher(), [group])
        assert torch.equal(found[group.name], whole[group.name]), group


def test_memory_too_small_for_one_group_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packs, "free_bytes", lambda _device: 10_000)
    with pytest.raises(
        UserError, match=r"toy: one group of 4 images needs about .* GiB .*lower its option batch \(now"
    ):
        run(recovery(), deep_teacher())


def test_a_group_of_one_class_too_large_for_the_memory_needs_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packs, "free_bytes", lambda _device: 10_000)
    with pytest.raises(UserError, match=r"one group of 9 images .*; lower ipc \(a group holds 9 images of one class\)"):
        run(recovery(), deep_teacher(), [Group((0,), range(9)), Group((1,), range(9))])


def test_a_pack_fills_its_share_of_the_memory_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packs, "CPU_IMAGES", 1000)
    packs, track = spied(monkeypatch), ToyTrack()
    part = [Group((0, 1, 2, 3), range(slot, slot + 1)) for slot in range(6)]
    net_bytes = _recover._selection.look(deep_teacher(), toy_pixels()).all_bytes
    eight = _packs.planned_bytes(8, SIZE, net_bytes)
    monkeypatch.setattr(_packs, "free_bytes", lambda _device: int(eight / _packs.MEMORY_SHARE) + 8)
    run(recovery(), deep_teacher(), part, track)
    assert [len(pack) for pack in packs] == [2, 2, 2]
    assert track.notes == ["toy: 6 groups of up to 4 images in 3 packs, planned peak 0.00 of 0.0 GiB"]


def test_half_precision_halves_the_planned_memory() -> None:
    real, exact = toy_pixels(), deep_teacher(dtype=torch.float32)
    card = Card("toy", {}, ["a", "b", "c", "d"], SIZE, list(MEAN), list(STD), 1.0, 1.0, [], [])
    rough = Frozen(exact.net, card, Compute(torch.device("cpu"), torch.bfloat16))
    full, half = (_recover._selection.look(teacher, real) for teacher in (exact, rough))
    first = 4 * 3 * SIZE**2
    assert half.all_bytes - first == pytest.approx((full.all_bytes - first) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("1000", "anon 300\nfile 600\n", 700), ("10", "anon 30\n", 0), ("max", "", None)]
)
def test_a_pods_limit_counts_and_its_pages_of_files_do_not(
    limit: str, used: str, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.stat").write_text(used)
    monkeypatch.setattr(_packs, "CGROUP", tmp_path)
    monkeypatch.setattr(_packs, "machine_bytes", lambda: 5000)
    assert _packs.free_bytes(torch.device("cpu")) == (5000 if free is None else free)


def test_a_gpus_memory_that_earlier_work_freed_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert _packs.free_bytes(torch.device("cuda")) == 750


def test_every_gpu_has_the_teacher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "cuda" means the current device, which needs no copy."""
    teacher = replace(deep_teacher(), compute=Compute(torch.device("cuda"), torch.float32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_packs, "copy_of", lambda _teacher, device: device)
    assert _packs.crew(teacher, [[ONE], [TWO]]) == [teacher, torch.device("cuda", 0)]
    assert _packs.crew(teacher, [[ONE]]) == [teacher]


def nan_at(step: int, group: Group) -> Callable[[Seen], Tensor]:
    def term(seen: Seen) -> Tensor:
        bad = torch.tensor([own == group and seen.step >= step for own in seen.groups])
        return torch.where(bad, torch.nan, seen.views.square().mean((1, 2, 3, 4)))

    return term


@pytest.mark.parametrize(("step", "group"), [(0, ONE), (7, TWO)])
def test_nan_names_group_step_and_term(step: int, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packs, "CPU_IMAGES", 1000)
    wanted = recovery(terms={"calm": lambda seen: seen.views.mean((1, 2, 3, 4)), "wild": nan_at(step, group)})
    with pytest.raises(NonFiniteLoss, match=rf"toy: wild is nan at step {step} for {group.name}; .*lr \(now 0.25\)"):
        run(wanted, deep_teacher())


@pytest.mark.parametrize(("at", "term"), [("head", "cross-entropy"), ("statistics", "statistics loss")])
def test_nan_of_the_teacher_names_where_it_shows(at: str, term: str) -> None:
    teacher = deep_teacher()
    if at == "head":
        teacher.net[-1].bias.data[1] = torch.inf  # type: ignore[index,union-attr]
        taps = None
    else:

        def taps(member: Any, groups: Sequence[Group]) -> tuple[list[Tap], int]:
            layer = norms(member.net)[1]
            return [MomentTap(layer, torch.full((1, 8), torch.nan), torch.ones(1, 8), 1.0, 1.0)], 1

    with pytest.raises(NonFiniteLoss, match=rf"toy: {term} is (nan|inf) at step 0 for {ONE.name}"):
        run(recovery(taps=taps), teacher)


def test_no_checkpoint_holds_what_a_nan_has_touched() -> None:
    track = ToyTrack()
    with pytest.raises(NonFiniteLoss, match="at step 5"):
        run(recovery(terms={"wild": nan_at(5, ONE)}), deep_teacher(), track=track)
    assert track.state is not None
    assert track.state[1]["step"] == 5
    assert all(tensor.isfinite().all() for tensor in track.state[0].values())


def without_norms() -> ToyTeacher:
    return ToyTeacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), SIZE)


def without_running() -> ToyTeacher:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(192, 4))
    return ToyTeacher(net.eval(), SIZE)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [(without_norms(), "no BatchNorm2d layer"), (without_running(), "BatchNorm layers without running statistics")],
)
def test_a_teacher_without_batchnorm_statistics_is_refused(teacher: ToyTeacher, message: str) -> None:
    with pytest.raises(UserError, match=rf"toy .*Sequential has {message}; choose"):
        run(recovery(), teacher)
    with pytest.raises(UserError, match=message):
        run(recovery(), Several((deep_teacher(), teacher)))


def averaging(member: Any, groups: Sequence[Group]) -> tuple[list[Tap], int]:
    """Taps with a state of their own."""
    found: list[Tap] = []
    for layer in norms(member.net):
        found.append(MomentTap(layer, layer.running_mean[None], layer.running_var[None], 0.3, 0.3, 0.8))  # type: ignore[index]
    return found, 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"taps": averaging}, {"restarts": (3, 6)}, {"starts": (0, 0, 4, 8)}, {"ascent": (0.5, 3)}],
    ids=["plain", "averages", "restarts", "starts", "ascent"],
)
def test_a_killed_run_continues_to_the_same_bytes_whatever_memory_is_left(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = [Group((cls, cls + 1), range(4)) for cls in (0, 2)] * ("starts" in changes) or GROUPS[:4]
    wanted, packs = recovery(**changes), spied(monkeypatch)
    monkeypatch.setattr(_packs, "SMALL_PIXELS", 0)  # one pack after the other
    monkeypatch.setattr(_packs, "CPU_IMAGES", 4)
    whole = run(wanted, deep_teacher(dtype=torch.float32), part)
    every = packs.copy()
    for after in (3, 9, 10, 14):
        packs.clear()
        track = ToyTrack(kill_after=after)
        with pytest.raises(Killed):
            run(wanted, deep_teacher(dtype=torch.float32), part, track)
        track.kill_after = 0
        packs.clear()
        with monkeypatch.context() as later:
            later.setattr(_packs, "CPU_IMAGES", 1)
            later.setattr(_packs, "free_bytes", lambda _device: 0)
            assert torch.equal(run(wanted, deep_teacher(dtype=torch.float32), part, track), whole)
        assert packs == every[after // M :], "packs were cut anew, or made twice"
        packs.clear()
        assert torch.equal(run(wanted, deep_teacher(dtype=torch.float32), part, track), whole)
        assert not packs, "finished images were made again before the caller could write them"


class Weighed(ToyTrack):
    """Remembers how large its checkpoints were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().save(tensors, values)
        self.sizes.append(sum(tensor.nbytes for tensor in tensors.values()))

    def child(self, name: str) -> ToyTrack:
        return self.children.setdefault(name, Weighed())


def test_checkpoints_do_not_grow_with_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished images are written once; 50,000 of 224 px are 7 GiB."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    track = Weighed()
    found = run(recovery(), deep_teacher(), GROUPS[:5], track)
    assert len(track.sizes) == 5 * M
    assert len(set(track.sizes)) == 2, "those within a group are alike, those between groups are empty"
    kept = [size for child in track.children.values() for size in child.sizes]  # type: ignore[attr-defined]
    assert sum(kept) == found.numel(), "an image was written twice"


def test_finished_images_that_are_lost_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one group after the other
    wanted = run(recovery(), deep_teacher(), GROUPS[:3])
    track = ToyTrack(kill_after=2 * M + 3)
    with pytest.raises(Killed):
        run(recovery(), deep_teacher(), GROUPS[:3], track)
    track.children.clear()
    track.kill_after = 0
    assert torch.equal(run(recovery(), deep_teacher(), GROUPS[:3], track), wanted)
    assert any("lost" in note for note in track.notes)


def state_of(net: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[int], bool]:
    """Everything of a net that a run could leave changed."""
    hooked = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    return copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()], hooked, net.training


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("ending", ["well", "nan", "killed"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"ascent": (0.5, 3)}, {"starts": (0, 5)}, {"terms": {"deep": lambda seen: seen.features.mean((1, 2))}}],
    ids=["plain", "ascent", "starts", "terms"],
)
def test_the_teacher_is_left_as_it_was(changes: dict[str, Any], ending: str) -> None:
    teacher, track = deep_teacher(), ToyTrack(kill_after=4 if ending == "killed" else 0)
    part, before = [Group((0, 1), range(2)), Group((2, 3), range(2))], state_of(teacher.net)
    if ending == "nan":
        changes = {**changes, "terms": {"wild": nan_at(3, part[1])}}
    if ending == "well":
        run(recovery(**changes), teacher, part)
    else:
        with pytest.raises(NonFiniteLoss if ending == "nan" else Killed):
            run(recovery(**changes), teacher, part, track)
    after = state_of(teacher.net)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert all(p.grad is None for p in teacher.net.parameters())


def test_a_methods_own_term_sees_views_features_and_logits_with_their_gradients() -> None:
    """Its value joins the loss, and its gradient reaches the pixels through the teacher."""
    teacher, said = deep_teacher(), list[Seen]()

    def term(seen: Seen) -> Tensor:
        said.append(seen)
        return seen.features.square().mean((1, 2)) + seen.logits[:, :, 0].sum(1) + seen.views.mean((1, 2, 3, 4))

    wanted = recovery(law=STILL, iterations=1, r_bn=0.0, r_ce=0.0, terms={"own": term})
    pack = _recover._Pack(wanted, teacher, [ONE, TWO], 0)
    x = pack.x.flatten(1, 2).clone().requires_grad_()
    with pack.ready():
        pack.advance()
    features = teacher.net[:-1](x.flatten(0, 1)).view(2, 4, 20)  # type: ignore[index]
    logits = teacher.net(x.flatten(0, 1)).view(2, 4, 4)
    each = features.square().mean((1, 2)) + logits[:, :, 0].sum(1) + x.mean((1, 2, 3, 4))
    (gradient,) = torch.autograd.grad(each.sum(), x)
    _, names, values = pack.records[-1]
    assert torch.allclose(values[names.index("own")], each.detach(), rtol=1e-6)
    assert torch.allclose(pack.m, 0.5 * gradient.view_as(pack.m), rtol=1e-5, atol=1e-7)
    assert [seen.groups for seen in said] == [[ONE, TWO]]
    assert (said[0].slots, said[0].step) == (1, 0)
    assert torch.allclose(said[0].features.double(), features.detach(), rtol=1e-5)


def test_slots_join_at_their_time_and_count_only_then() -> None:
    """Statistics and cross-entropy are those of the active images alone; the others rest at their first pixels."""
    teacher, group = deep_teacher(), Group((1, 3), range(4))
    starts = (0, 0, 4, 8)
    wanted = recovery(starts=starts)
    first = wanted.init(group).double()
    loop = plain(
        [teacher.net],
        first.flatten(0, 1),
        labels_of(group),
        views_of(wanted, group),
        iterations=M,
        lr=0.25,
        r_bn=0.3,
        active=lambda step: [place for place in range(8) if starts[place % 4] <= step],
    )
    for step, ((losses, images), (wanted_losses, _)) in enumerate(
        zip(steps(wanted, teacher, [group]), loop, strict=True)
    ):
        count = sum(start <= step for start in starts)
        assert len(images[0]) == 2 * count
        if step < 4:
            assert losses[0] == pytest.approx(wanted_losses, rel=1e-10)
    assert [wanted.active(range(4), step) for step in (0, 3, 4, 7, 8, 9)] == [2, 2, 3, 3, 4, 4]


def test_losses_are_looked_at_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Said(ToyTrack):
        def __init__(self) -> None:
            super().__init__()
            self.values: list[dict[str, float | str]] = []

        def log(self, done: int, total: int, **values: float | str) -> None:
            super().log(done, total, **values)
            self.values.append(values)

        def due(self) -> bool:
            return False

    monkeypatch.setattr(_recover, "LOOK", 4)
    track = Said()
    run(recovery(), deep_teacher(), [ONE], track)
    looked = [t for t in range(M) if t in (3, 7, 9)]
    every = [losses[0] for losses, _ in steps(recovery(), deep_teacher(), [ONE])]
    for t in looked:
        assert track.values[t] == pytest.approx(every[t], abs=6e-5)
    assert track.values[:3] == [{}, {}, {}]


def test_bf16_stays_near_fp32() -> None:
    exact = deep_teacher(dtype=torch.float32)
    rough = replace(exact, compute=Compute(torch.device("cpu"), torch.bfloat16))
    pairs = list(zip(*[steps(recovery(), teacher, [ONE, TWO]) for teacher in (exact, rough)], strict=True))
    for (losses, _), (rough_losses, rough_images) in pairs[:3]:
        assert rough_images[0].dtype == torch.float32
        for own, other in zip(losses, rough_losses, strict=True):
            assert other == pytest.approx(own, rel=0.1)
    assert pairs[0][0][0] != pairs[0][1][0], "autocast did nothing"
    for own, other in zip(pairs[0][0][0], pairs[0][1][0], strict=True):
        assert pairs[0][1][0][0] == pytest.approx(pairs[0][0][0][0], rel=0.02), (own, other)
    found = run(recovery(), rough)
    assert found.dtype == torch.uint8
    assert float(found.float().std()) > 10


def test_fp32_stays_near_fp64() -> None:
    pairs = zip(*[steps(recovery(), deep_teacher(dtype=d), [ONE]) for d in (torch.float32, torch.float64)], strict=True)
    for step, ((losses, images), (exact, exact_images)) in enumerate(pairs):
        if step < 3:
            assert losses[0] == pytest.approx(exact[0], rel=1e-4)
            assert float((images[0] - exact_images[0]).abs().mean()) < 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"ascent": (0.5, 3)}, {"taps": averaging}], ids=["plain", "ascent", "averages"]
)
@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 3), (2, 3)])
def test_groups_side_by_side_are_the_same_bytes(
    changes: dict[str, Any], before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, wanted, threads = GROUPS[:4], recovery(**changes), torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = run(wanted, deep_teacher(dtype=torch.float32), part)
    track = ToyTrack(kill_after=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    with pytest.raises(Killed):
        run(wanted, deep_teacher(dtype=torch.float32), part, track)
    track.kill_after = 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: after)
    assert torch.equal(run(wanted, deep_teacher(dtype=torch.float32), part, track), alone)
    monkeypatch.undo()
    assert torch.get_num_threads() == threads, "a worker changed the threads of this one"


@pytest.mark.parametrize("small", [2, 4], ids=["some small", "all small"])
def test_a_group_alone_is_the_same_whatever_threads_others_would_share(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several threads: a layer's sums over them differ from one thread's in the last bit."""
    monkeypatch.setattr(_packs, "SMALL_PIXELS", small * 16**2)
    real, threads = toy_pixels(size=16), torch.get_num_threads()
    with seeded(0, "threads"):
        net = nets.build("resnet20", 4, 16)
    teacher = ToyTeacher(CPU.place(net).eval().requires_grad_(False), 16)
    wanted = recovery(law=law("rrc"), init=_recover.noise("toy", 0, 16))
    part = [Group((0, 1, 2, 3), range(1)), Group((0, 1), range(1, 2)), Group((2, 3), range(1, 2))]
    torch.set_num_threads(2)
    try:
        whole = _recover.recover(wanted, real, teacher, part, 0, Track.quiet())
        for group in part:
            own = [in_order(part).index(image) for image in group.images]
            assert torch.equal(_recover.recover(wanted, real, teacher, [group], 0, Track.quiet()), whole[own])
    finally:
        torch.set_num_threads(threads)


IMAGENET = {"iterations": 4000, "lr": 0.25, "r_bn": 0.01, "first_bn": 10.0, "batch": 100, "jitter": 32}
DWA = {"K": 12, "rho": 0.015, "r_bn": 0.01, "r_var": 11.0, "first_bn": 10.0, "jitter": 4}


@pytest.mark.parametrize(
    ("name", "dataset", "wanted"),
    [
        ("sre2l", "imagenet", IMAGENET | {"crop": "rrc"}),
        ("sre2l", "tiny_imagenet", IMAGENET | {"lr": 0.1, "r_bn": 1.0, "jitter": 4, "crop": "rrc"}),
        ("sre2l", "cifar100", IMAGENET | {"iterations": 1000, "jitter": 4, "crop": "none"}),
        ("cda", "imagenet", IMAGENET | {"mode": "cosine", "milestone": 1.0}),
        ("cda", "tiny_imagenet", IMAGENET | {"lr": 0.4, "r_bn": 0.05, "jitter": 4}),
        ("sre2lpp", "imagenet", IMAGENET),
        ("sre2lpp", "cifar10", IMAGENET | {"jitter": 4}),
        ("dwa", "imagenet", DWA | {"K": 15, "r_var": 2.0, "lr": 0.25, "iterations": 2000, "batch": 100, "jitter": 32}),
        ("dwa", "tiny_imagenet", DWA | {"lr": 0.1, "iterations": 2000, "batch": 200, "crop": "rrc"}),
        ("dwa", "cifar10", DWA | {"lr": 0.25, "iterations": 1000, "batch": 100, "crop": "none"}),
        ("delt", "imagenet", IMAGENET | {"jitter": 0, "round_iterations": 500, "mode": "cosine", "schedule": "global"}),
    ],
)
def test_settings_are_the_published_ones(name: str, dataset: str, wanted: dict[str, Any]) -> None:
    """Tables of reference 3.1, 3.5, 3.6, 5.2 and 6.1; `imagenet` stands for the defaults."""
    options = config_of(name, {}, dataset, 10).model_dump()
    assert {key: options[key] for key in wanted} == wanted
