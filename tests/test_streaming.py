"""Photos that do not fit in memory: the same images, in an order that data alone decides, wherever they are held."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from _pictures import config, encoded, folder, made, noise
from _toys import toy_teacher
from test_teacher import CPU, Killed, Stop

from distillery import estimate, methods, statistics, teacher
from distillery.config import TeacherConfig
from distillery.data import _photos, _shards, images, limits
from distillery.data.images import Lazy, batches, shuffled
from distillery.data.real import Real
from distillery.errors import UserError
from distillery.rng import generator
from distillery.track import Track

SIZE = 77  # photos of this size are decoded to 88 px
NET = {"net": "convnet2", "net_options": {"width": 4}, "batch": 8, "epochs": 3, "lr": 0.02}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Real:
    """27 photos of three classes in blocks of about three."""
    monkeypatch.setattr(_shards, "BLOCK", 60_000)
    monkeypatch.setattr(_photos, "BLOCK", 60_000)
    return made(
        tmp_path / "out",
        config("imagefolder", folder(tmp_path / "in", {"a": 9, "b": 11, "c": 7}, side=(90, 75)), size=SIZE),
    )


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """27 photos count as a large set."""
    monkeypatch.setattr(images, "WHOLE", 20)
    monkeypatch.setattr(images, "REACH", 9)


def streamed(monkeypatch: pytest.MonkeyPatch, real: Real) -> None:
    """From now on nothing fits in memory."""
    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1K")
    assert isinstance(real.images("train")[0], Lazy)


def test_small_sets_keep_the_order_they_always_had() -> None:
    wanted = torch.randperm(30, generator=generator("x"))
    assert torch.equal(shuffled([10, 20], 30, generator("x")), wanted)
    assert torch.equal(shuffled([], 200_000, generator("x")), torch.randperm(200_000, generator=generator("x")))


def test_large_sets_are_shuffled_well_and_need_each_block_for_a_short_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "WHOLE", 10_000)
    monkeypatch.setattr(images, "REACH", 4_000)
    runs = [20 + i % 30 for i in range(1000)]
    count = sum(runs)
    owner = torch.arange(1000).repeat_interleave(torch.tensor(runs))
    order = shuffled(runs, count, generator("epoch", 0))
    assert torch.equal(order.sort().values, torch.arange(count)), "every image once"
    assert torch.equal(order, shuffled(runs, count, generator("epoch", 0)))
    assert not torch.equal(order, shuffled(runs, count, generator("epoch", 1)))
    places = torch.empty(count, dtype=torch.int64).scatter_(0, order, torch.arange(count))
    for block in (0, 17, 999):
        own = places[owner == block]
        assert own.max() - own.min() <= 4_000 + 50, "a block is not needed for the whole epoch"
    drawn = [len(owner[part].unique()) for part in order.split(100)[:-1]]
    assert min(drawn) > 15, "the first batch and the last one too have images of many blocks"
    assert sum(drawn) / len(drawn) > 55, "about what 100 draws from 115 blocks give"
    near = (owner[order[1:]] == owner[order[:-1]]).double().mean()
    assert near < 0.03, "neighbours in a block are no neighbours in the epoch"


def test_streamed_photos_are_the_held_ones(real: Real, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    held, labels = real.pixels("train")
    assert torch.equal(real.images("train")[0], held)
    streamed(monkeypatch, real)
    lazy, owners = real.images("train")
    assert isinstance(lazy, Lazy)
    assert torch.equal(owners, labels)
    assert (lazy.shape, lazy.nbytes, len(lazy)) == (tuple(held.shape), held.nbytes, len(held))
    rows = torch.tensor([5, 0, 26, 5])
    assert torch.equal(lazy[rows], held[rows])
    assert torch.equal(lazy[3:20:4], held[3:20:4])
    assert lazy[4:4].shape == held[4:4].shape
    for part, wanted in zip(lazy.split(real.counts("train")), held.split(real.counts("train")), strict=True):
        assert torch.equal(part[torch.tensor([1, 0])], wanted[[1, 0]])
    seen = list(batches(lazy, torch.randperm(27, generator=generator("y")).split(6)))
    assert sorted(i for index, _ in seen for i in index.tolist()) == list(range(27)), "every image once"
    assert all(torch.equal(found, held[index]) for index, found in seen)


def test_no_more_is_decoded_ahead_than_allowed(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed(monkeypatch, real)
    monkeypatch.setattr(limits, "AHEAD", 5 * 3 * 88 * 88)
    decoded, lock, whole = [0], threading.Lock(), _photos.PhotoSplit._picture

    def counted(self: _photos.PhotoSplit, place: int) -> object:
        with lock:
            decoded[0] += 1
        return whole(self, place)

    monkeypatch.setattr(_photos.PhotoSplit, "_picture", counted)
    for used, _ in enumerate(batches(real.images("train")[0], torch.arange(27).split(3)), start=1):
        assert decoded[0] <= 3 * used + 5
    assert decoded[0] == 27


@pytest.mark.parametrize("is_large", [False, True])
def test_a_streamed_teacher_is_the_held_one_also_after_a_kill(
    tmp_path: Path, real: Real, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, is_large: bool
) -> None:
    if is_large:
        request.getfixturevalue("large")
    cfg = TeacherConfig(**NET)
    whole, card = teacher.make(cfg, real, CPU, Track.quiet())
    streamed(monkeypatch, real)
    monkeypatch.setattr(_photos.PhotoSplit, "pixels", pytest.fail)
    alone, found = teacher.make(cfg, real, CPU, Track.quiet())
    for after in (2, 3):  # steps 2 and 5 of three times three
        with pytest.raises(Stop):
            teacher.make(cfg, real, CPU, Killed(tmp_path / "check", after))
    again, resumed = teacher.make(cfg, real, CPU, Track(folder=tmp_path / "check", every=0.0))
    assert card == found == resumed
    for name, value in whole.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), f"{name} after a kill"


def test_a_streamed_epoch_shows_every_image_once(real: Real, large: None) -> None:
    cfg = TeacherConfig(**NET | {"batch": 9})
    parts = list(teacher._parts(cfg, real, 0, 3, 9))
    epochs = [torch.cat(parts[at : at + 3]) for at in (0, 3, 6)]
    assert all(torch.equal(epoch.sort().values, torch.arange(27)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for start in range(9):
        rest = list(teacher._parts(cfg, real, start, 3, 9))
        assert len(rest) == 9 - start
        assert all(torch.equal(a, b) for a, b in zip(rest, parts[start:], strict=True))


def test_statistics_and_methods_do_not_see_the_difference(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> list[torch.Tensor]:
        own = toy_teacher(real)
        found = list(statistics.collect([own], real, statistics.KINDS, seed=1, track=Track.quiet())[0].values())
        for name, options in {
            "random": {},
            "median": {},
            "rded": {"mipc": 6, "factor": 1},
            "wmdd": {"iterations": 2},
        }.items():
            method = methods.find(name)
            cfg = methods.config_of(name, options, "imagefolder", 2)
            part = method.groups(cfg, ipc=2, classes=3)
            made_ = method.synthesize(cfg, real, own, ipc=2, seed=0, part=part, track=Track.quiet())
            found.append(made_.images_u8)
        return found

    held = work()
    streamed(monkeypatch, real)
    monkeypatch.setattr(_photos.PhotoSplit, "pixels", pytest.fail)
    assert all(torch.equal(a, b) for a, b in zip(held, work(), strict=True))


def test_sizes_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, wanted in {"1000": 1000, "2K": 2000, "20Gi": 20 * 2**30, "1.5 GiB": 3 * 2**29, "3t": 3 * 10**12}.items():
        monkeypatch.setenv("DISTILLERY_CACHE_BYTES", text)
        assert limits.cache_bytes() == wanted
    for text in ("0", "-1", "much", "5X", "1e9", "Gi"):
        monkeypatch.setenv("DISTILLERY_CACHE_BYTES", text)
        with pytest.raises(UserError, match=f"DISTILLERY_CACHE_BYTES is '{text}'.*20Gi"):
            limits.cache_bytes()


def test_plan_says_what_photos_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
name: t
dataset: {{name: imagenette, root: {tmp_path}}}
teacher: {{net: convnet2, net_options: {{width: 4}}}}
methods: [{{method: random, ipc: [1]}}]
students: [{{net: convnet2, net_options: {{width: 4}}, recipe: {{preset: rded, epochs: 1}}}}]
"""
    monkeypatch.setattr(estimate, "_rate", lambda *_: 100.0)
    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1Gi")
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "7Gi")
    said = estimate.table(text)
    assert f"data cache at most 7.0 GiB in {tmp_path / 'cache'}" in said
    assert "training photos: 9,469, decoded 1.7 GiB, more than 1.0 GiB" in said
    assert "validation photos: 3,925, decoded once and kept: 735.9 MiB" in said


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_streamed_photos(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from distillery.data import limits; from distillery.data.images import batches\n"
        "from distillery.data.real import load\n"
        "limits.AHEAD = 16 * 3 * 256 * 256\n"
        "real = load(Path(sys.argv[1]))\n"
        "parts = torch.arange(int(sys.argv[2])).split(32)\n"
        "count = sum(len(part) for part, _ in batches(real.images('train')[0], parts))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    for cls in "ab":
        for split in ("train", "val"):
            (tmp_path / "in" / split / cls).mkdir(parents=True)
            first = tmp_path / "in" / split / cls / "0.jpg"
            first.write_bytes(encoded(noise(1, 320, 280), "JPEG"))
            for i in range(1, 500 if split == "train" else 1):
                os.link(first, first.with_name(f"{i}.jpg"))
    made(tmp_path / "out", config("imagefolder", tmp_path / "in", size=224))
    peaks = []
    for images_ in (100, 1000):
        command = [sys.executable, "-c", code, str(tmp_path / "out"), str(images_)]
        environment = os.environ | {"DISTILLERY_MEMORY_BYTES": "1M", "MALLOC_ARENA_MAX": "2"}
        count, peak = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout.split()
        assert int(count) == images_
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 60 * 1024, f"900 more photos are 169 MiB decoded; peaks {peaks} KiB"
