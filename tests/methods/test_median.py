"""Median-probability images against plain sorting."""

import pytest
import torch
from _toys import toy_photos, toy_pixels, toy_teacher

from distillery.data.augment import centre_crop
from distillery.data.real import Real
from distillery.methods import _selection, median
from distillery.rng import generator
from distillery.track import Track


@pytest.mark.parametrize("real", [toy_pixels(), toy_photos()], ids=["pixels", "photos"])
def test_images_are_those_nearest_to_the_median_rank(real: Real) -> None:
    teacher, ipc = toy_teacher(real), 4
    classes = range(len(real.classes))
    part = median.groups(median.Config(), ipc=ipc, classes=len(classes))
    found = median.synthesize(median.Config(), real, teacher, ipc=ipc, seed=0, part=part, track=Track.quiet())
    images, labels = real.pixels("train")
    for cls in classes:
        own = centre_crop(images[labels == cls], real.size)
        probability = [
            float(teacher.logits(teacher.normalise(image[None] / 255)).softmax(dim=1)[0, cls]) for image in own
        ]
        order = sorted(range(len(own)), key=lambda i: probability[i])
        middle = (len(order) - 1) / 2
        nearest = sorted(
            range(len(order)), key=lambda rank: (abs(rank - middle), -rank if len(order) % 2 == 0 else rank)
        )
        wanted = [order[rank] for rank in nearest[:ipc]]
        mine = found.labels == cls
        assert found.extras["sources"][mine, 0].tolist() == wanted
        assert torch.equal(found.images_u8[mine], own[wanted])
        scores = -torch.tensor(probability)[wanted].log()
        assert torch.allclose(found.extras["scores"][mine, 0], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_the_choice_grows_around_the_middle(n: int) -> None:
    losses = torch.rand(n, generator=generator("losses", n))
    rank = losses.argsort(descending=True).argsort()
    whole = _selection.around_median(losses, n)
    assert sorted(whole.tolist()) == list(range(n))
    distance = (rank[whole] - (n - 1) / 2).abs()
    assert (distance.diff() >= 0).all(), "a nearer image comes later"
    for ipc in range(1, n + 1):
        chosen = _selection.around_median(losses, ipc)
        assert torch.equal(chosen, whole[:ipc])
        assert rank[chosen].max() - rank[chosen].min() == ipc - 1, "the chosen ranks have a gap"


def test_ties_keep_the_order_of_the_files() -> None:
    assert _selection.around_median(torch.zeros(5), 5).tolist() == [2, 1, 3, 0, 4]
    assert _selection.around_median(torch.zeros(4), 4).tolist() == [2, 1, 3, 0]
