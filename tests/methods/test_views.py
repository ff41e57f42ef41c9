"""Views of the recover methods: their law, and their two matrices against torchvision's and torch's own operations."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from distillery.methods import _views
from distillery.methods._views import ViewLaw, Views, back, curriculum, draw, matrices, see
from distillery.rng import generator

CPU = torch.device("cpu")
SIDE, MANY = 100_000, 40_000  # a side so large that rounding to pixels hides no law


def drawn(law: ViewLaw, iterations: int, size: int = SIDE) -> Views:
    return draw(law, iterations, size, generator("views test", law.crop, iterations))


def resized_crops(smallest: float, iterations: int = MANY) -> Tensor:
    """Boxes [iterations, 4] float64 in a unit square: top, left, height, width."""
    law = ViewLaw("rrc", torch.full((iterations,), smallest, dtype=torch.float64), 0.5, 0)
    boxes = drawn(law, iterations).boxes
    assert ((boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] > 0).all(1)).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= SIDE).all()
    return boxes.double() / SIDE


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test at a level of one in a million."""
    share = ((values.double() - low) / (high - low)).sort().values
    assert share[0] >= -0.01
    assert share[-1] <= 1.01
    wanted = (torch.arange(len(share), dtype=torch.float64) + 0.5) / len(share)
    assert float((share - wanted).abs().max()) < 2.7 / math.sqrt(len(share))


def chain(image: Tensor, box: list[int], flip: bool, roll: list[int]) -> Tensor:
    """One view as the official code makes it: crop, antialiased resize, flip, roll."""
    size = image.shape[-1]
    view = vision.resized_crop(image, *box, [size, size], antialias=True)
    view = vision.horizontal_flip(view) if flip else view
    return torch.roll(view, roll, dims=(-2, -1))


@pytest.mark.parametrize("smallest", [0.08, 0.4])
def test_boxes_of_up_to_seven_tenths_have_uniform_area_and_log_uniform_ratio(smallest: float) -> None:
    """They always fit, so that rejection cannot bend their law."""
    boxes = resized_crops(smallest)
    area, ratio = boxes[:, 2] * boxes[:, 3], boxes[:, 3] / boxes[:, 2]
    small = area < 0.7
    assert_uniform(area[small], smallest, 0.7)
    assert_uniform(ratio[small].log(), math.log(3 / 4), math.log(4 / 3))
    assert float(torch.corrcoef(torch.stack([area[small], ratio[small].log()]))[0, 1]) == pytest.approx(0, abs=0.03)
    for start, length in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        assert_uniform(start[small] / (1 - length[small] + 1 / SIDE), 0, 1)


def fits(smallest: float) -> float:
    """The chance that one try fits: |log ratio| <= -log area, so -log(a) / log(4/3) at an area a above 3/4."""
    integral = lambda a: a - a * math.log(a)  # noqa: E731 - of -log
    low = max(smallest, 3 / 4)
    above = (integral(1.0) - integral(low)) / math.log(4 / 3)
    return (above + low - smallest) / (1 - smallest)


@pytest.mark.parametrize("smallest", [0.7, 0.9, 0.95])
def test_after_ten_tries_the_whole_image_is_the_view(smallest: float) -> None:
    boxes = resized_crops(smallest)
    whole = (boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all(1).double()
    missed = (1 - fits(smallest)) ** 10
    assert float(whole.mean()) == pytest.approx(missed, abs=5 * math.sqrt(missed * (1 - missed) / MANY) + 1e-3)
    area = boxes[:, 2] * boxes[:, 3]
    assert float(area[whole == 0].min()) > smallest - 2 / SIDE


def test_each_iteration_has_its_own_smallest_area() -> None:
    boxes = drawn(ViewLaw("rrc", curriculum(2000, "step", 0.5), 0.0, 0), 2000, 64).boxes
    assert boxes[:1000].unique(dim=0).tolist() == [[0, 0, 64, 64]]
    area = (boxes[1000:, 2] * boxes[1000:, 3]).double() / 64**2
    assert_uniform(area[area < 0.7], 0.08, 0.7)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_flips_have_their_probability(flip: float) -> None:
    rate = float(drawn(ViewLaw("none", curriculum(4000, "constant"), flip, 0), 4000, 8).flip.double().mean())
    assert rate == pytest.approx(flip, abs=5 * math.sqrt(flip * (1 - flip) / 4000))


@pytest.mark.parametrize("jitter", [0, 1, 4])
def test_rolls_are_uniform_from_nought_to_the_jitter_along_each_axis(jitter: int) -> None:
    roll = drawn(ViewLaw("none", curriculum(5000, "constant"), 0.5, jitter), 5000, 8).roll
    pairs = torch.bincount(roll[:, 0] * (jitter + 1) + roll[:, 1], minlength=(jitter + 1) ** 2)
    assert int(roll.min()) == 0
    assert int(roll.max()) == jitter
    wanted = 5000 / (jitter + 1) ** 2
    assert float((pairs - wanted).abs().max()) < 5 * math.sqrt(wanted)


def test_padded_crops_shift_by_up_to_the_padding_either_way() -> None:
    boxes = drawn(ViewLaw("pad", curriculum(5000, "constant"), 0.5, 0, pad=2), 5000, 8).boxes
    assert boxes[:, 2:].unique().tolist() == [8]
    places = torch.bincount((boxes[:, 0] + 2) * 5 + boxes[:, 1] + 2, minlength=25)
    assert len(places) == 25
    assert float((places - 200).abs().max()) < 5 * math.sqrt(200)


def test_without_a_crop_every_view_is_whole() -> None:
    law = ViewLaw("none", curriculum(9, "constant"), 0.5, 2)
    assert drawn(law, 9, 8).boxes.unique(dim=0).tolist() == [[0, 0, 8, 8]]


@pytest.mark.parametrize("size", [8, 15, 32])
def test_matrices_are_crop_resize_flip_and_roll(size: int) -> None:
    stream = generator("chain", size)
    laws = [ViewLaw("rrc", curriculum(20, "constant"), 0.5, size // 4), ViewLaw("none", torch.zeros(20), 0.5, 3)]
    views = [draw(law, 20, size, stream) for law in laws]
    images = torch.randn(2, 3, 3, size, size, generator=stream)  # two groups of three images
    flips, rolls = torch.stack([v.flip for v in views]), torch.stack([v.roll for v in views])
    assert flips.unique().tolist() == [False, True]
    assert int(rolls.amin()) == 0 < int(rolls.amax())
    for step in range(20):
        rows, columns = matrices(views, step, size, CPU)
        assert rows.shape == columns.shape == (2, size, size)
        found = see(images, rows, columns)
        for group, v in enumerate(views):
            wanted = chain(images[group], v.boxes[step].tolist(), bool(v.flip[step]), v.roll[step].tolist())
            assert float((found[group] - wanted).abs().max()) < 5e-6


def test_the_smallest_and_the_largest_box_are_resized_as_torchvision_does() -> None:
    image = torch.randn(3, 12, 12, generator=generator("edge boxes"))
    boxes = torch.tensor([[0, 0, 12, 12], [5, 7, 1, 1], [11, 0, 1, 12], [0, 3, 12, 2]])
    views = Views(boxes, torch.zeros(4, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.long))
    for step, box in enumerate(boxes.tolist()):
        rows, columns = matrices([views], step, 12, CPU)
        found = see(image[None, None], rows, columns)[0, 0]
        assert float((found - chain(image, box, False, [0, 0])).abs().max()) < 5e-6


def test_padded_crops_are_zeros_then_a_crop() -> None:
    law = ViewLaw("pad", curriculum(60, "constant"), 0.5, 3, pad=4)
    views = drawn(law, 60, 8)
    image = torch.randn(2, 3, 8, 8, generator=generator("pad"))
    for step in range(60):
        rows, columns = matrices([views], step, 8, CPU)
        top, left = (views.boxes[step, :2] + 4).tolist()
        wanted = functional.pad(image, [4] * 4)[:, :, top : top + 8, left : left + 8]
        wanted = wanted.flip(3) if views.flip[step] else wanted
        assert torch.equal(see(image[None], rows, columns)[0], wanted.roll(views.roll[step].tolist(), (2, 3)))


@pytest.mark.parametrize(("crop", "pad"), [("rrc", 0), ("pad", 3), ("none", 0)])
def test_back_is_the_adjoint_of_see(crop: str, pad: int) -> None:
    stream = generator("adjoint", crop)
    views = [draw(ViewLaw(crop, curriculum(8, "constant"), 0.5, 4, pad), 8, 9, stream) for _ in range(3)]  # type: ignore[arg-type]
    for step in range(8):
        x, y = torch.randn(2, 3, 2, 3, 9, 9, generator=stream, dtype=torch.float64)
        rows, columns = matrices(views, step, 9, CPU)
        left, right = (see(x, rows, columns) * y).sum((1, 2, 3, 4)), (x * back(y, rows, columns)).sum((1, 2, 3, 4))
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-12)
        assert (left != 0).all()


def test_one_view_is_shared_by_a_group_and_groups_differ() -> None:
    law = ViewLaw("rrc", curriculum(4, "constant"), 0.5, 4)
    views = [draw(law, 4, 8, generator("group", group)) for group in range(2)]
    image = torch.randn(3, 8, 8, generator=generator("same"))
    found = see(image.expand(2, 5, 3, 8, 8).contiguous(), *matrices(views, 1, 8, CPU))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert not torch.allclose(found[0], found[1])


def test_a_view_of_float64_images_is_float64() -> None:
    x = torch.ones(1, 1, 3, 4, 4, dtype=torch.float64)
    views = drawn(ViewLaw("none", torch.zeros(1), 0.0, 0), 1, 4)
    rows, columns = matrices([views], 0, 4, CPU)
    assert see(x, rows, columns).dtype == back(x, rows, columns).dtype == torch.float64


@pytest.mark.parametrize("milestone", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("mode", ["cosine", "linear", "step"])
def test_curricula_fall_from_one_to_eight_hundredths(mode: str, milestone: float) -> None:
    iterations = 4000
    found, last = curriculum(iterations, mode, milestone).tolist(), milestone * iterations
    assert len(found) == iterations
    for t in (0, 1, 17, 999, 1000, 1999, 2000, 2001, 3999):
        height = {
            "cosine": (1 + math.cos(math.pi * t / last)) / 2,
            "linear": 1 - t / last,
            "step": 1.0,
        }[mode]
        assert found[t] == pytest.approx(0.08 + 0.92 * height if t < last else 0.08, abs=1e-12)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1.0 if (mode, milestone) == ("step", 1.0) else 0.08, abs=3e-4)


def test_without_a_curriculum_the_bound_is_torchvisions() -> None:
    assert curriculum(50, "constant").unique().tolist() == [0.08]
    assert _views.SMALLEST_AREA == 0.08
    assert _views.RATIO == (3 / 4, 4 / 3)
