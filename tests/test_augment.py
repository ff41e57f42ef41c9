"""Views: each transform against torchvision, a written-out loop, or its law."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision.transforms import RandAugment, RandomResizedCrop
from torchvision.transforms.autoaugment import InterpolationMode, _apply_op

from distillery.config import ViewPolicy
from distillery.data import augment, dsa, randaugment
from distillery.data.resample import crop_resize
from distillery.errors import UserError
from distillery.rng import generator

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def pictures(n: int = 6, side: int = 32) -> torch.Tensor:
    """Smooth random images, [n, 3, side, side] uint8."""
    coarse = torch.rand(n, 3, 6, 6, generator=generator(0, "pictures"))
    return (F.interpolate(coarse, size=side, mode="bilinear") * 255).to(torch.uint8)


def view(
    policy: ViewPolicy, images_u8: torch.Tensor, size: int = 0, seed: int = 0
) -> tuple[augment.Views, torch.Tensor]:
    """Drawn parameters and pixels in 0..1 (mean 0, deviation 1)."""
    side = images_u8.shape[2]
    views = augment.draw(policy, len(images_u8), size or side, generator(seed, "test"), source=side)
    return views, augment.apply(policy, images_u8, views, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (60, 47, 24), (20, 33, 56)])
def test_crop_resize_equals_torchvision(height: int, width: int, size: int) -> None:
    images = torch.rand(5, 3, height, width, generator=generator(1, "images"))
    boxes = torch.tensor([[0, 0, height, width], [3, 5, 1, 1], [2, 0, 9, width], [5, 7, 13, 11], [0, 1, height, 17]])
    expected = torch.stack(
        [TF.resized_crop(x, *box.tolist(), [size, size], antialias=True) for x, box in zip(images, boxes, strict=True)]
    )
    assert torch.allclose(crop_resize(images, boxes, size), expected, atol=1e-5)


def test_crop_resize_takes_many_boxes_of_few_images_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images_u8, source = pictures(3), torch.tensor([2, 0, 0, 1, 2])
    boxes = augment.random_boxes(5, 32, (0.08, 1.0), (1.0, 1.0), generator(2, "boxes"))
    whole = crop_resize(images_u8[source], boxes, 16)
    monkeypatch.setattr("distillery.data.resample.CHUNK_FLOATS", 1)  # one box at a time
    assert torch.allclose(crop_resize(images_u8, boxes, 16, source), whole, atol=1e-4)
    assert crop_resize(images_u8, torch.tensor([[0, 0, 32, 32]] * 3), 32).equal(images_u8.float())


def test_boxes_follow_the_law_of_torchvision() -> None:
    torch.manual_seed(0)  # torchvision draws from the global stream
    image = torch.zeros(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [0.75, 4 / 3]) for _ in range(4000)])
    ours = augment.random_boxes(4000, 32, (0.08, 1.0), (0.75, 4 / 3), generator(3, "boxes"))
    assert ((ours >= 0).all(1) & (ours[:, :2] + ours[:, 2:] <= 32).all(1)).all()
    for statistic in (lambda b: b.double().mean(0), lambda b: b.double().std(0)):
        assert torch.allclose(statistic(ours), statistic(theirs), atol=0.45)
    area = lambda b: (b[:, 2] * b[:, 3]).double() / 1024  # noqa: E731
    quantiles = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    assert torch.allclose(area(ours).quantile(quantiles), area(theirs).quantile(quantiles), atol=0.03)


def test_boxes_fall_back_to_the_centre() -> None:
    wide = augment.random_boxes(3, 30, (1.0, 1.0), (2.0, 2.0), generator(0, "wide"))
    tall = augment.random_boxes(3, 30, (1.0, 1.0), (0.5, 0.5), generator(0, "tall"))
    assert wide.tolist() == [[7, 0, 15, 30]] * 3
    assert tall.tolist() == [[0, 7, 30, 15]] * 3


def test_whole_image_crop_is_the_identity() -> None:
    images_u8 = pictures()
    views, x = view(ViewPolicy(crop="rrc", crop_scale=(1.0, 1.0), flip=0.0), images_u8)
    assert views.boxes.numel() == 0
    assert x.equal(images_u8.float() / 255)


def test_random_resized_crop_applies_its_boxes() -> None:
    images_u8 = pictures(side=40)
    views, x = view(ViewPolicy(crop="rrc", flip=0.0), images_u8, size=32)
    expected = [TF.resized_crop(i / 255, *b, [32, 32]) for i, b in zip(images_u8, views.boxes.tolist(), strict=True)]
    assert torch.allclose(x, torch.stack(expected), atol=1e-5)
    assert int(views.boxes[:, 2:].max()) > 32  # drawn over the whole source


def test_padded_crop_shows_black_pixels_and_normalises() -> None:
    images_u8, policy = pictures(64), ViewPolicy(crop="pad", crop_pad=3, flip=0.0)
    views = augment.draw(policy, 64, 32, generator(0, "pad"))
    x_norm = augment.apply(policy, images_u8, views, MEAN, STD)
    for image, shift, found in zip(images_u8, views.shift.tolist(), x_norm, strict=True):
        crop = TF.crop(TF.pad(image, [3]), shift[0], shift[1], 32, 32)
        assert found.equal(TF.normalize(crop / 255, list(MEAN), list(STD)))
    assert views.shift.unique().tolist() == list(range(7))
    assert x_norm.is_contiguous(memory_format=torch.channels_last)


def test_flip_mirrors_the_chosen_half() -> None:
    images_u8 = pictures(200)
    views, x = view(ViewPolicy(), images_u8)
    pixels = images_u8.float() / 255
    assert all(x[i].equal(pixels[i].flip(2) if views.flip[i] else pixels[i]) for i in range(200))
    assert 70 < int(views.flip.sum()) < 130


@pytest.mark.parametrize(("side", "parts"), [(32, 2), (33, 2), (32, 3)])
def test_patches_are_shuffled_columns_first(side: int, parts: int) -> None:
    images_u8 = pictures(8, side)
    views, x = view(ViewPolicy(flip=0.0, shuffle_patches=parts), images_u8)
    bounds = [i * side // parts for i in range(parts + 1)]
    for image, (columns, rows), found in zip(images_u8 / 255, views.strips.tolist(), x, strict=True):
        wide = torch.cat([image[:, :, bounds[c] : bounds[c + 1]] for c in columns], dim=2)
        assert found.equal(torch.cat([wide[:, bounds[r] : bounds[r + 1]] for r in rows], dim=1))
    assert len({str(s) for s in views.strips.tolist()}) > 1


def test_cutmix_pastes_one_box_of_the_partner() -> None:
    images_u8, shares = pictures(16), []
    for seed in range(40):
        views, x = view(ViewPolicy(flip=0.0, mix="cutmix"), images_u8, seed=seed)
        top, left, bottom, right = views.mix_box
        expected = images_u8.float() / 255
        expected[:, :, top:bottom, left:right] = expected[views.partner][:, :, top:bottom, left:right].clone()
        assert x.equal(expected)
        assert views.own == pytest.approx(1 - (bottom - top) * (right - left) / 1024)
        shares.append(views.own)
    assert min(shares) < 0.5
    assert max(shares) > 0.9


def test_mixup_weights_follow_their_beta_law() -> None:
    images_u8, policy = pictures(4), ViewPolicy(flip=0.0, mix="mixup", mix_alpha=0.8)
    views, x = view(policy, images_u8)
    pixels = images_u8.float() / 255
    assert torch.allclose(x, views.own * pixels + (1 - views.own) * pixels[views.partner], atol=1e-6)
    stream = generator(0, "beta")
    drawn = torch.tensor([augment.draw(policy, 2, 8, stream).own for _ in range(4000)])
    law = torch.distributions.Beta(0.8, 0.8)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.var()) == pytest.approx(float(law.variance), abs=0.006)


@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_randaugment_operations_equal_torchvision(magnitude: int, sign: int) -> None:
    images_u8 = pictures(5)
    images_u8[0], images_u8[1, 1] = 7, 200  # constant: nothing to stretch or equalise
    space = RandAugment()._augmentation_space(31, (32, 32))
    for code, (name, (bins, signed)) in enumerate(space.items()):
        strength = round(float(bins[magnitude]), 6) if bins.ndim else 0.0  # torchvision's table is in float32
        strength *= sign if signed else 1
        expected = torch.stack([_apply_op(i, name, strength, InterpolationMode.NEAREST, None) for i in images_u8])
        codes = torch.full((1, 5), 2 * code + (sign < 0))
        assert randaugment.apply(images_u8, codes, magnitude).equal(expected), name


def test_randaugment_gives_each_image_its_own_operations() -> None:
    images_u8 = pictures(40)
    codes = randaugment.draw(2, 40, generator(0, "ops"))
    together = randaugment.apply(images_u8, codes, 9.0)
    alone = [randaugment.apply(images_u8[i : i + 1], codes[:, i : i + 1], 9.0) for i in range(40)]
    assert together.equal(torch.cat(alone))
    assert len(codes.unique()) > 20
    policy = ViewPolicy(flip=0.0, randaugment_n=2, randaugment_m=9.0)
    views, x = view(policy, images_u8)
    assert x.equal(randaugment.apply(images_u8, views.ops, 9.0) / 255)


def plain_dsa(x: torch.Tensor, group: str, u: torch.Tensor) -> torch.Tensor:
    """DSA of one image [3, S, S], written out from its rules."""
    side = x.shape[1]
    if group == "color":
        x = x + (u[0] - 0.5)
        x = (x - x.mean(0)) * (2 * u[1]) + x.mean(0)
        return (x - x.mean()) * (u[2] + 0.5) + x.mean()
    if group == "crop":
        down, right = (int(float(v) * 9) for v in u[:2])
        return TF.crop(TF.pad(x, [4]), down, right, side, side)
    if group == "cutout":
        y, z = (int(float(v) * 33) for v in u[:2])
        x = x.clone()
        x[:, max(y - 8, 0) : max(y + 8, 0), max(z - 8, 0) : max(z + 8, 0)] = 0
        return x
    if group == "flip":
        return x.flip(2) if u[0] < 0.5 else x
    if group == "scale":
        sx, sy = (float(v) * (1.2 - 1 / 1.2) + 1 / 1.2 for v in u[:2])
        theta = torch.tensor([[[sx, 0.0, 0.0], [0.0, sy, 0.0]]])
    else:
        turn = (float(u[0]) - 0.5) * 30 * math.pi / 180
        theta = torch.tensor([[[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0]]])
    return F.grid_sample(x[None], F.affine_grid(theta, [1, *x.shape], align_corners=True), align_corners=True)[0]


@pytest.mark.parametrize("group", list(dsa.GROUPS))
def test_dsa_groups_follow_their_rules(group: str) -> None:
    x_norm = torch.randn(12, 3, 32, 32, generator=generator(0, "x"))
    uniform = torch.rand(12, 3, generator=generator(1, "u"))
    expected = torch.stack([plain_dsa(x, group, u) for x, u in zip(x_norm, uniform, strict=True)])
    assert torch.allclose(dsa.apply(x_norm, group, uniform), expected, atol=2e-5)


def test_dsa_draws_one_group_per_batch_and_refuses_unknown_ones() -> None:
    policy = ViewPolicy(flip=0.0, dsa=dsa.DEFAULT)
    stream = generator(0, "dsa")
    assert {augment.draw(policy, 2, 32, stream).dsa_group for _ in range(100)} == set(dsa.GROUPS)
    images_u8, views = pictures(), augment.draw(policy, 6, 32, generator(0, "one"))
    clean = augment.normalise(images_u8, MEAN, STD)
    assert augment.apply(policy, images_u8, views, MEAN, STD).equal(dsa.apply(clean, views.dsa_group, views.dsa_u))
    with pytest.raises(UserError, match=r"'cutuot' in 'color_cutuot' is not one of .*did you mean 'cutout'"):
        dsa.groups("color_cutuot")


def test_views_depend_on_their_seed_alone_and_leave_the_images_alone() -> None:
    policy = ViewPolicy(
        crop="rrc", shuffle_patches=2, randaugment_n=2, randaugment_m=9.0, dsa=dsa.DEFAULT, mix="cutmix"
    )
    images_u8 = pictures()
    before = images_u8.clone()
    (_, first), (_, again), (_, other) = (view(policy, images_u8, seed=s) for s in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    assert images_u8.equal(before)


def test_evaluation_view_is_the_normalised_centre() -> None:
    images_u8 = pictures(side=64)
    expected = TF.normalize(TF.center_crop(images_u8, [56, 56]) / 255, list(MEAN), list(STD))
    assert augment.evaluation_view(images_u8, 56, MEAN, STD).equal(expected)
    assert augment.evaluation_view(images_u8, 64, (0.0,) * 3, (1.0,) * 3).equal(images_u8 / 255)
