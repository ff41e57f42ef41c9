"""The measurements of the use cases: rank correlation, herding, and what a buffer may see."""

import pytest
import torch

from benchmarks import use_cases
from distillery.data.real import Real
from distillery.rng import generator


def test_rank_correlation_knows_order_ties_and_sameness() -> None:
    assert use_cases.spearman([0.1, 0.5, 0.9], [10.0, 20.0, 21.0]) == pytest.approx(1.0)
    assert use_cases.spearman([0.1, 0.5, 0.9], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert use_cases.ranks([5.0, 1.0, 5.0]) == [2.5, 1.0, 2.5]
    assert use_cases.spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)  # 1 - 6 * 2 / 60
    assert use_cases.spearman([1.0, 2.0], [1.0, 1.0]) == 0.0


def test_nearest_real_image_and_copies() -> None:
    base = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    assert use_cases._nearest(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), base).tolist() == [0.0, 1.0]
    assert use_cases._nearest(base, base, skip_self=True).tolist() == [5.0, 0.5, 0.5]


def test_a_step_of_continual_learning_sees_its_own_classes_alone() -> None:
    labels = torch.arange(10).repeat_interleave(3)
    images = labels[:, None, None, None].expand(-1, 3, 16, 16).to(torch.uint8)
    pixels, local = use_cases._only((images, labels), [2, 7])
    assert local.tolist() == [0, 0, 0, 1, 1, 1]
    assert pixels[:, 0, 0, 0].tolist() == [2, 2, 2, 7, 7, 7]


def test_herding_brings_the_mean_nearer_than_the_first_images_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Real.of(
        torch.randint(0, 255, (80, 3, 16, 16), generator=generator("herd"), dtype=torch.uint8),
        torch.arange(2).repeat_interleave(40),
    )
    monkeypatch.setattr(use_cases.head, "features", lambda net, x: x.flatten(1))

    class Taught:
        net = None

    chosen, labels = use_cases.herd(stage, Taught())  # type: ignore[arg-type]
    assert labels.tolist() == [0] * use_cases.BUFFER + [1] * use_cases.BUFFER
    every, own = stage.pixels("train")
    space = torch.nn.functional.normalize(use_cases.normalised(every).flatten(1), dim=1)
    picked = torch.nn.functional.normalize(use_cases.normalised(chosen).flatten(1), dim=1)
    for cls in (0, 1):
        centre = space[own == cls].mean(0)
        herded = (picked[labels == cls].mean(0) - centre).norm()
        assert herded < (space[own == cls][: use_cases.BUFFER].mean(0) - centre).norm()
    assert len({tuple(image.flatten().tolist()) for image in chosen}) == 2 * use_cases.BUFFER
