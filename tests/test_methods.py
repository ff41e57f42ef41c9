"""The contract in `distillery/methods/__init__.py`, over all of METHODS: a new method needs no new test here."""

import importlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _toys import Killed, ToyTeacher, ToyTrack, toy_net, toy_photos, toy_pixels, toy_teacher
from torch import Tensor, nn

from distillery import methods
from distillery.data import DATASETS, synthetic
from distillery.data.real import Real
from distillery.data.synthetic import Synthetic
from distillery.errors import CorruptArtifact, NonFiniteLoss, UserError
from distillery.methods import METHODS, Group, _selection
from distillery.track import Track

pytestmark = pytest.mark.usefixtures("watched_closely")

NAMES = sorted(METHODS)
SEEDLESS = {"median"}  # methods without randomness
NO_REAL = {"sre2l", "cda", "gvbsm"}  # methods whose images come from noise: no class is too small for them
TOY: dict[str, dict[str, Any]] = {  # options that suit toy data
    "rded": {"mipc": 10, "num_crop": 3, "factor": 1},
    "sre2l": {"iterations": 4, "jitter": 1},
    "cda": {"iterations": 4, "jitter": 1},
    "sre2lpp": {"iterations": 4, "jitter": 1, "mipc": 10, "num_crop": 3, "factor": 1},
    "dwa": {"iterations": 4, "K": 2, "jitter": 1},
    "delt": {"iterations": 6, "round_iterations": 2},
    "wmdd": {"iterations": 4, "jitter": 1, "weighted": True, "batch": 8},
    "gvbsm": {"iterations": 4, "drop_rate": 0.4, "batch": 6},
}
KINDS = {"pixels": toy_pixels, "photos": toy_photos}
IPC = 3

every_method = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def made(
    name: str,
    real: Real,
    *,
    seed: int = 0,
    part: Sequence[Group] | None = None,
    track: Track | None = None,
    teacher: ToyTeacher | None = None,
    ipc: int = IPC,
) -> Synthetic:
    cfg = methods.config_of(name, TOY.get(name, {}), real.name, ipc)
    return METHODS[name].synthesize(
        cfg,
        real,
        teacher or toy_teacher(real),
        ipc=ipc,
        seed=seed,
        part=METHODS[name].groups(cfg, ipc=ipc, classes=len(real.classes)) if part is None else part,
        track=track or Track.quiet(),
    )


def assert_same(left: Synthetic, right: Synthetic) -> None:
    assert torch.equal(left.images_u8, right.images_u8)
    assert torch.equal(left.labels, right.labels)
    assert left.extras.keys() == right.extras.keys()
    for key, value in left.extras.items():
        assert torch.equal(value, right.extras[key]), key


@every_kind
@every_method
def test_gives_ipc_images_of_every_class_quickly(name: str, kind: str) -> None:
    real = KINDS[kind]()
    made(name, real)  # what a method imports at its first use is not its speed
    started = time.process_time()
    found = made(name, real)
    seconds = time.process_time() - started
    classes = len(real.classes)
    assert found.images_u8.shape == (classes * IPC, 3, real.size, real.size)
    assert found.images_u8.dtype == torch.uint8
    assert found.images_u8.is_contiguous()
    assert found.labels.tolist() == [cls for cls in range(classes) for _ in range(IPC)]
    assert found.images_u8.float().std() > 10, "the images are all but blank"
    assert seconds < 2, f"{seconds:.1f} s on toy data"


@every_kind
@every_method
def test_same_seed_same_set_other_seed_another(name: str, kind: str) -> None:
    real = KINDS[kind]()
    first = made(name, real)
    assert_same(first, made(name, real))
    same = torch.equal(first.images_u8, made(name, real, seed=1).images_u8)
    assert same == (name in SEEDLESS)


@every_kind
@every_method
def test_any_group_alone_is_the_same_part_of_the_whole(name: str, kind: str) -> None:
    real = KINDS[kind]()
    whole = made(name, real)
    cfg = methods.config_of(name, TOY.get(name, {}), real.name, IPC)
    groups = METHODS[name].groups(cfg, ipc=IPC, classes=len(real.classes))
    assert methods.in_order(groups) == [(cls, slot) for cls in range(len(real.classes)) for slot in range(IPC)]
    for group in groups:
        own = torch.tensor([cls * IPC + slot for cls, slot in methods.in_order([group])])
        alone = made(name, real, part=[group])
        extras = {key: value[own] for key, value in whole.extras.items()}
        assert_same(alone, Synthetic(whole.images_u8[own], whole.labels[own], extras))


@every_kind
@every_method
def test_progress_ends_at_its_total(name: str, kind: str) -> None:
    track = ToyTrack()
    made(name, KINDS[kind](), track=track)
    done, total = track.progress[-1]
    assert done == total > 0
    assert track.progress == sorted(track.progress), "progress runs backwards"


@every_kind
@every_method
def test_a_killed_run_continues_to_the_same_set(name: str, kind: str) -> None:
    real = KINDS[kind]()
    whole = ToyTrack()
    wanted = made(name, real, track=whole)
    assert whole.saves > 0 or not METHODS[name].NEEDS.teacher, "no checkpoint in a loop that runs the teacher"
    for after in range(1, whole.saves + 1):
        track = ToyTrack(kill_after=after)
        with pytest.raises(Killed):
            made(name, real, track=track)
        track.kill_after = 0
        track.progress.clear()
        assert_same(wanted, made(name, real, track=track))
        assert len(track.progress) == len(whole.progress) - after, "work was done again"


@every_method
def test_a_teacher_that_gives_nan_stops_the_method(name: str) -> None:
    real = toy_pixels()
    broken = toy_teacher(real, broken=True)
    if METHODS[name].NEEDS.teacher:
        with pytest.raises(NonFiniteLoss, match=r"class(es)? 0.*normalisation"):
            made(name, real, teacher=broken)
    else:
        assert_same(made(name, real), made(name, real, teacher=broken))


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].NEEDS.teacher])
def test_a_teacher_for_other_data_is_refused(name: str) -> None:
    real = toy_pixels()
    with pytest.raises(UserError, match=r"7 outputs .* 4 classes"):
        made(name, real, teacher=ToyTeacher(toy_net(7), real.size))
    with pytest.raises(UserError, match=r"16 px .* 8 px"):
        made(name, real, teacher=ToyTeacher(toy_net(4), 16))


class Counting(nn.Module):
    """Counts the images that pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.net(x)


@every_kind
@every_method
def test_estimate_counts_the_teachers_images(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # side by side, copies of the net would count
    real = KINDS[kind]()
    net = Counting(toy_net(len(real.classes)))
    made(name, real, teacher=replace(toy_teacher(real), net=net))
    train = sum(real.counts("train"))
    said = METHODS[name].estimate(
        methods.config_of(name, TOY.get(name, {}), real.name, IPC),
        ipc=IPC,
        classes=len(real.classes),
        size=real.size,
        train=train,
    )
    looks = net.images - said["forwards"]  # images that ask the net for its sizes, once in choosing, once in a loop
    assert looks in ((1, 2) if METHODS[name].NEEDS.teacher else (0,))
    assert said["peak_bytes"] >= len(real.classes) * IPC * 3 * real.size**2
    assert set(said) - {"backwards"} == {"forwards", "peak_bytes"}
    assert said.get("backwards", 0) <= said["forwards"]


@every_method
def test_more_images_than_the_smallest_class_has_are_refused(name: str) -> None:
    cfg = methods.config_of(name, {}, "cifar10", 20)
    METHODS[name].check(cfg, ipc=20, size=32, per_class=[40, 20, 30])
    METHODS[name].check(cfg, ipc=20, size=32, per_class=None)
    if name in NO_REAL:
        return
    with pytest.raises(UserError, match=r"ipc 21.* 20 .*training images of class 1.*lower ipc to.* 20"):
        METHODS[name].check(cfg, ipc=21, size=32, per_class=[40, 20, 30])
    with pytest.raises(UserError, match="class 0"):
        made(name, toy_pixels(per_class=2))


@every_method
def test_real_images_are_not_changed(name: str) -> None:
    real = toy_pixels()
    before = real.pixels("train")[0].clone()
    made(name, real).images_u8.zero_()
    assert torch.equal(before, real.pixels("train")[0])


@every_method
def test_the_size_of_a_batch_changes_no_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toy_pixels()
    wanted = made(name, real)
    monkeypatch.setattr(_selection, "ACTIVATION_BYTES", {"cpu": 1})  # one image at a time
    assert torch.equal(wanted.images_u8, made(name, real).images_u8)


@every_method
def test_options_are_strict_and_described(name: str) -> None:
    method = METHODS[name]
    with pytest.raises(UserError, match=f"options of {name}: no_such_key: unknown key"):
        methods.config_of(name, {"no_such_key": 1}, "cifar10", 10)
    for key, info in method.Config.model_fields.items():
        assert info.description, f"{name}.{key} has no description"
        assert not info.is_required(), f"{name}.{key} has no default"


@every_method
def test_recipes_are_for_known_data_sets_and_valid(name: str) -> None:
    for dataset, ipc in METHODS[name].RECIPES:
        assert dataset in DATASETS
        methods.config_of(name, {}, dataset, ipc)


@every_method
def test_a_method_says_what_it_implements(name: str) -> None:
    module = importlib.import_module(f"distillery.{methods.module_name(name)}")
    headings = re.findall(r"^(Paper|Implements|Code|Differs|Target): ", module.__doc__ or "", re.MULTILINE)
    assert headings == ["Paper", "Implements", "Code", "Differs", "Target"]


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'rdde' is unknown; did you mean 'rded'\?; known: random, median, rded, "):
        methods.find("rdde")
    with pytest.raises(UserError, match="did you mean 'median'"):
        methods.config_of("medain", {}, "cifar10", 10)


def test_options_beat_the_recipe_of_the_ipc_which_beats_the_recipe_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {("cifar10", 0): {"mipc": 10, "num_crop": 2}, ("cifar10", 5): {"mipc": 20}}
    monkeypatch.setattr(METHODS["rded"], "RECIPES", table)

    def resolved(options: dict[str, Any], dataset: str, ipc: int) -> tuple[int, int]:
        cfg: Any = methods.config_of("rded", options, dataset, ipc)
        return cfg.mipc, cfg.num_crop

    assert resolved({}, "cifar100", 5) == (300, 5)
    assert resolved({}, "cifar10", 1) == (10, 2)
    assert resolved({}, "cifar10", 5) == (20, 2)
    assert resolved({"num_crop": 7}, "cifar10", 5) == (20, 7)


def test_a_set_comes_back_from_its_folder_as_it_was(tmp_path: Path) -> None:
    found = made("rded", toy_pixels())
    found.save(tmp_path / "a")
    found.save(tmp_path / "b")
    assert_same(found, synthetic.load(tmp_path / "a"))
    files = [(tmp_path / folder / synthetic.FILE).read_bytes() for folder in "ab"]
    assert files[0] == files[1]


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=re.escape(synthetic.FILE)):
        synthetic.load(tmp_path)
    made("random", toy_pixels()).save(tmp_path)
    path = tmp_path / synthetic.FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match=f"{re.escape(str(path))}.*synthesize it again"):
        synthetic.load(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        made("random", toy_pixels()).save(tmp_path / "file")
