"""RDED against plain loops: the crops, the score, the ranking and the mosaic, as reference 2.1 has them."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from _toys import MEAN, STD, ToyTeacher, ToyTrack, toy_net, toy_photos, toy_pixels, toy_teacher
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.v2 import functional

from distillery.data.real import Real
from distillery.errors import UserError
from distillery.methods import Group, _crops, _patches, _selection, rded
from distillery.methods.rded import Config
from distillery.rng import generator
from distillery.track import Track

Patch = tuple[float, int, tuple[int, int, int, int], Tensor]


def parts(classes: Iterable[int], ipc: int) -> list[Group]:
    return [Group((cls,), range(ipc)) for cls in classes]


def naive_box(areas: list[float], place: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    for area in areas:
        side = round(math.sqrt(area * height * width))
        if 0 < side <= min(height, width):
            return int(place[0] * (height - side + 1)), int(place[1] * (width - side + 1)), side, side
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def naive_patches(cfg: Config, real: Real, teacher: ToyTeacher, cls: int, factor: int, seed: int) -> list[Patch]:
    """The best crop of each drawn image, best first: one image and one crop at a time."""
    drawn = _patches.draw(cfg, seed, cls, real.counts("train")[cls])
    small, best = real.size // factor, []
    for row, index in enumerate(drawn.order.tolist()):
        image = real.read("train", cls, [index])[0]
        candidates = []
        for crop in range(cfg.num_crop):
            box = naive_box(drawn.area[row, crop].tolist(), drawn.place[row, crop].tolist(), *image.shape[1:])
            patch = functional.resized_crop(image.float() / 255, *box, [small, small], antialias=True)
            x_norm = torch.zeros(3, real.size, real.size)
            edge = (real.size - small) // 2
            for channel in range(3):
                inner = (patch[channel] - MEAN[channel]) / STD[channel]
                x_norm[channel, edge : edge + small, edge : edge + small] = inner
            probability = teacher.logits(x_norm[None]).softmax(dim=1)[0, cls]
            candidates.append((-math.log(float(probability)), index, box, patch))
        best.append(min(candidates, key=lambda candidate: candidate[0]))
    return sorted(best, key=lambda candidate: candidate[0])


def naive_mosaic(patches: list[Patch], ipc: int, factor: int, size: int) -> Tensor:
    images, small = torch.zeros(ipc, 3, size, size), size // factor
    for image in range(ipc):
        for tile in range(factor**2):
            top, left = tile // factor * small, tile % factor * small
            images[image, :, top : top + small, left : left + small] = patches[tile * ipc + image][3]
    return images


@pytest.mark.parametrize(
    ("real", "factor", "ipc"),
    [(toy_pixels(), 1, 4), (toy_pixels(), 2, 2), (toy_photos(), 2, 1), (toy_photos(), 1, 5)],
    ids=["pixels", "pixels-mosaic", "photos-mosaic", "photos"],
)
def test_selection_equals_plain_loops(real: Real, factor: int, ipc: int) -> None:
    cfg = Config(mipc=9, num_crop=4, factor=factor)
    teacher, classes = toy_teacher(real), range(len(real.classes))
    found = rded.synthesize(cfg, real, teacher, ipc=ipc, seed=3, part=parts(classes, ipc), track=Track.quiet())
    for cls in classes:
        ranked = naive_patches(cfg, real, teacher, cls, factor, seed=3)
        own = found.labels == cls
        image = naive_mosaic(ranked, ipc, factor, real.size) * 255
        # 1e-3 of a level may tip a value that lies on the edge of rounding.
        assert (found.images_u8[own].float() - image).abs().max() <= 0.5 + 1e-3
        for k in range(ipc):
            for tile in range(factor**2):
                score, index, box, _ = ranked[tile * ipc + k]
                assert int(found.extras["sources"][own][k, tile]) == index
                assert tuple(found.extras["boxes"][own][k, tile].tolist()) == box
                assert math.isclose(float(found.extras["scores"][own][k, tile]), score, rel_tol=1e-4, abs_tol=1e-5)


def test_boxes_equal_plain_loops() -> None:
    stream = generator("boxes")
    heights, widths = torch.randint(5, 90, (2, 60), generator=stream)
    area = 0.08 + 0.92 * torch.rand(60, 4, 10, generator=stream, dtype=torch.float64)
    place = torch.rand(60, 4, 2, generator=stream, dtype=torch.float64)
    boxes = _crops.boxes_of(area, place, heights, widths)
    for i in range(60):
        for j in range(4):
            wanted = naive_box(area[i, j].tolist(), place[i, j].tolist(), int(heights[i]), int(widths[i]))
            assert tuple(boxes[i, j].tolist()) == wanted


def test_an_image_no_attempt_fits_gives_its_central_square() -> None:
    area, place = torch.full((1, 1, 10), 0.5, dtype=torch.float64), torch.rand(1, 1, 2, dtype=torch.float64)
    assert _crops.boxes_of(area, place, torch.tensor([10]), torch.tensor([201])).tolist() == [[[0, 95, 10, 10]]]
    assert _crops.boxes_of(area, place, torch.tensor([201]), torch.tensor([10])).tolist() == [[[95, 0, 10, 10]]]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 90)])
def test_boxes_follow_torchvisions_law(height: int, width: int) -> None:
    n = 4000
    drawn = _patches.draw(Config(mipc=n, num_crop=1), 0, 0, n)
    ours = _crops.boxes_of(drawn.area, drawn.place, torch.full((n,), height), torch.full((n,), width))[:, 0].double()
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [1.0, 1.0]) for _ in range(n)]
    wanted = torch.tensor(theirs, dtype=torch.float64)
    error = (ours.var(dim=0) / n + wanted.var(dim=0) / n).sqrt()
    assert ((ours.mean(dim=0) - wanted.mean(dim=0)).abs() < 4 * error).all()
    assert torch.allclose(ours.std(dim=0), wanted.std(dim=0), rtol=0.06)
    assert (ours.amin(dim=0) - wanted.amin(dim=0)).abs().max() <= 1
    assert (ours.amax(dim=0) - wanted.amax(dim=0)).abs().max() <= 1


@pytest.mark.parametrize("side", [8, 16, 24])
def test_crops_equal_torchvision(side: int) -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator("crops"))
    drawn = _patches.draw(Config(mipc=6, num_crop=5), 0, 0, 6)
    boxes = _crops.boxes_of(drawn.area, drawn.place, torch.full((6,), 16), torch.full((6,), 16))
    wanted = torch.stack(
        [
            functional.resized_crop(image.float() / 255, *box, [side, side], antialias=True)
            for image, own in zip(images, boxes.tolist(), strict=True)
            for box in own
        ]
    )
    for given in (images, list(images)):
        found = _crops.crops(given, boxes, side, torch.device("cpu")) / 255
        assert (found - wanted).abs().max() < 1e-6


class Seen(nn.Module):
    """Remembers what it was shown; every class is equally likely."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.clone()
        return torch.zeros(len(x), 4)


@pytest.mark.parametrize(("size", "side", "before"), [(8, 4, 2), (8, 8, 0), (9, 4, 2)])
def test_the_border_is_zero_after_normalisation(size: int, side: int, before: int) -> None:
    net = Seen()
    cut = torch.full((2, 3, side, side), 51.0)
    scores = _patches.score(_selection.Scorer(ToyTeacher(net, size), batch=2), cut, 1, size)
    inner = torch.zeros(size, size, dtype=torch.bool)
    inner[before : before + side, before : before + side] = True
    assert (net.x[:, :, ~inner] == 0).all()
    for channel in range(3):
        wanted = torch.tensor((0.2 - MEAN[channel]) / STD[channel])
        assert torch.allclose(net.x[:, channel, inner], wanted)
    assert torch.allclose(scores, torch.full((2,), math.log(4.0)))


def naive_choice(scores: list[list[float]], patches: int, per_image: int) -> list[tuple[float, int, int]]:
    kept = []
    for image, own in enumerate(scores):
        best = sorted(range(len(own)), key=lambda crop: own[crop])[:per_image]
        kept += [(own[crop], image, crop) for crop in best]
    return sorted(kept, key=lambda patch: patch[0])[:patches]


@pytest.mark.parametrize(("patches", "per_image"), [(1, 1), (5, 1), (20, 1), (9, 2), (60, 3)])
def test_choice_is_the_least_score_in_a_stable_order(patches: int, per_image: int) -> None:
    # Few distinct values, so that ties between crops and between images abound.
    scores = torch.randint(0, 6, (20, 5), generator=generator("ties", patches)).float()
    image, crop, value = _patches.choose(scores, patches, per_image)
    wanted = naive_choice(scores.tolist(), patches, per_image)
    assert list(zip(value.tolist(), image.tolist(), crop.tolist(), strict=True)) == wanted


def test_tiles_go_top_left_top_right_bottom_left_bottom_right() -> None:
    ipc = 3
    patches = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 3, 2, 2).contiguous()
    images = _patches.mosaic(patches, ipc, 2)
    for i in range(ipc):
        corners = [images[i, 0, 0, 0], images[i, 0, 0, 3], images[i, 0, 3, 0], images[i, 0, 3, 3]]
        assert corners == [i, ipc + i, 2 * ipc + i, 3 * ipc + i]
        assert torch.equal(images[i, 0, :2, :2], torch.full((2, 2), float(i)))
    assert torch.equal(_patches.mosaic(patches, 12, 1), patches)


@pytest.mark.parametrize(("size", "wanted"), [(16, 1), (64, 1), (65, 2), (128, 2), (224, 2)])
def test_factor_follows_the_image_size(size: int, wanted: int) -> None:
    assert _patches.tiles_along(Config(), size) == wanted
    assert _patches.tiles_along(Config(factor=4), size) == 4


@pytest.mark.parametrize(
    ("options", "ipc", "size", "per_class", "message"),
    [
        ({}, 301, 32, None, r"301 x 1 patches = 301 .* mipc 300 x 1 .* give 300; raise mipc to 301 or"),
        (
            {},
            76,
            224,
            None,
            r"76 x 4 .* raise mipc to 304 or set patches_per_image to 2 or lower ipc to 75",
        ),
        ({}, 50, 32, [90, 20], r"20 training images of class 1 .* more images or set patches_per_image to 3 or lower"),
        (
            {"mipc": 10, "patches_per_image": "auto"},
            60,
            32,
            None,
            r"10 x 5 .* 50; raise mipc .* set num_crop to 6",
        ),
        ({"mipc": 10}, 60, 32, None, r"set patches_per_image to 6 or set num_crop to 6 or lower ipc to 10"),
        ({}, 1, 224, [9, 3], r"the 3 training images of class 1 .* give 3; give the class more images"),
        ({"factor": 3}, 10, 32, None, r"factor 3 does not divide the image side 32; take one of 1, 2, 4, 8"),
        ({"patches_per_image": 6}, 10, 32, None, r"patches_per_image 6 is more than num_crop 5"),
    ],
)
def test_impossible_options_name_the_numbers_and_the_remedies(
    options: dict[str, Any], ipc: int, size: int, per_class: list[int] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rded.check(Config(**options), ipc=ipc, size=size, per_class=per_class)


def test_just_enough_patches_pass() -> None:
    rded.check(Config(), ipc=75, size=224, per_class=[300, 1300])
    rded.check(Config(patches_per_image=2), ipc=150, size=224, per_class=[300])
    rded.check(Config(patches_per_image="auto"), ipc=375, size=224, per_class=[300])
    rded.check(Config(mipc=20), ipc=20, size=32, per_class=[20, 500])


@pytest.mark.parametrize("bad", [0, -1, 1.5, "many", True])
def test_factor_and_patches_are_a_number_or_auto(bad: object) -> None:
    for key in ("factor", "patches_per_image"):
        with pytest.raises(ValueError, match="expected auto or a whole number from 1"):
            Config(**{key: bad})


def test_auto_takes_as_many_patches_of_an_image_as_are_needed() -> None:
    real = toy_pixels(per_class=5, size=32)  # large enough that no two crops of an image are the same
    cfg = Config(mipc=5, num_crop=4, patches_per_image="auto")
    found = rded.synthesize(cfg, real, toy_teacher(real), ipc=12, seed=0, part=parts([0], 12), track=Track.quiet())
    places = found.extras["sources"].flatten()
    assert torch.bincount(places).max() == 3, "ceil(12 / 5) patches of an image at most"
    pairs = torch.cat([places[:, None], found.extras["boxes"].flatten(1)], dim=1)
    assert len(pairs.unique(dim=0)) == 12, "a patch was taken twice"


def test_an_mipc_beyond_every_class_is_said_once() -> None:
    real, track = toy_pixels(), ToyTrack()
    rded.synthesize(Config(), real, toy_teacher(real), ipc=1, seed=0, part=parts(range(4), 1), track=track)
    assert track.notes == ["rded: mipc 300 is more than any class has (15): every image is looked at"]


def test_photos_are_read_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = toy_photos(classes=1, per_class=6)
    monkeypatch.setattr(_patches, "PHOTOS_AT_ONCE", 2)
    read, lengths = real.read, []

    def counted(split: str, cls: int, indices: list[int]) -> list[Tensor]:
        lengths.append(len(indices))
        return read(split, cls, indices)

    monkeypatch.setattr(real, "read", counted)
    rded.synthesize(Config(factor=1), real, toy_teacher(real), ipc=3, seed=0, part=parts([0], 3), track=Track.quiet())
    assert lengths == [2, 2, 2, 2, 1], "three pairs to score, then three photos to cut the chosen patches from"


def test_a_class_that_the_teacher_knows_is_what_it_selects() -> None:
    """With a teacher that likes bright images, the brightest crop of each image wins."""
    real = toy_pixels(classes=2)

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean(dim=(1, 2, 3))
            return torch.stack([mean, -mean], dim=1)

    cfg = Config(mipc=12, num_crop=5)
    teacher = ToyTeacher(Bright(), real.size)
    bright = rded.synthesize(cfg, real, teacher, ipc=3, seed=0, part=parts([0, 1], 3), track=Track.quiet())
    plain = ToyTeacher(toy_net(2), real.size)
    usual = rded.synthesize(cfg, real, plain, ipc=3, seed=0, part=parts([0, 1], 3), track=Track.quiet())
    mean, other = (found.images_u8.float().mean(dim=(1, 2, 3)) for found in (bright, usual))
    assert mean[:3].mean() > other[:3].mean() > mean[3:].mean() - 30
    assert mean[:3].min() > mean[3:].max()
