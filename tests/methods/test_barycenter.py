"""The Wasserstein barycenter of one point cloud: known solutions, exact plans, weights, and what is refused."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from distillery.errors import DistilleryError, NonFiniteLoss, UserError
from distillery.methods import _barycenter
from distillery.methods._barycenter import FLOOR, barycenter, pot, settle, squared_distances, transport, weigh
from distillery.rng import generator

CENTRES = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10]], dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("barycenter", *shape), dtype=torch.float64)


def clusters(*sizes: int) -> list[Tensor]:
    return [centre + 0.3 * noise(size, 3) for centre, size in zip(CENTRES, sizes, strict=True)]


def equal(k: int) -> Tensor:
    return torch.full((k,), 1 / k, dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_atom_with_all_mass_goes_to_the_mean(weighted: bool) -> None:
    y = noise(17, 5).float()
    atoms, weights = barycenter(y, 1, generator(0), of="class 0", weighted=weighted)
    assert weights.tolist() == [1.0]
    start = torch.randn(1, 5, generator=generator(0), dtype=torch.float64)
    mean = y.double().mean(0)
    left = 0.8 ** _alternations() if weighted else 0.0  # damped: a share of the start remains
    torch.testing.assert_close(atoms, left * start + (1 - left) * mean[None])
    assert atoms.dtype == weights.dtype == torch.float64


def _alternations() -> int:
    return 1  # the weight of a single atom cannot change, so the second alternation finds it settled


def test_equal_clusters_give_their_means() -> None:
    parts = clusters(4, 4, 4)
    order = torch.randperm(12, generator=generator("order"))
    found = settle(CENTRES + noise(3, 3), equal(3), torch.cat(parts)[order])
    torch.testing.assert_close(found, torch.stack([part.mean(0) for part in parts]))


def test_atoms_share_points_when_their_number_does_not_divide() -> None:
    y = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    found = settle(torch.tensor([[0.0], [4.0]], dtype=torch.float64), equal(2), y)
    want = torch.tensor([[(0 + 0.5 * 1) / 1.5], [(0.5 * 1 + 5) / 1.5]], dtype=torch.float64)
    torch.testing.assert_close(found, want)


def test_plans_have_their_marginals_and_are_optimal() -> None:
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    plan = transport(weights, squared_distances(noise(3, 4), noise(7, 4)))
    torch.testing.assert_close(plan.sum(1), weights)
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64))
    assert (plan >= 0).all()
    cost = squared_distances(noise(4, 4), noise(5, 4)[:4])
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in permutations(range(4)))
    assert float((transport(equal(4), cost) * cost).sum()) == pytest.approx(best / 4)


def test_the_answer_is_a_fixed_point_no_worse_than_its_start() -> None:
    y, start = noise(40, 6), noise(5, 6)
    found = settle(start, equal(5), y)
    torch.testing.assert_close(transport(equal(5), squared_distances(found, y)) @ y * 5, found)
    after, before = (
        float((transport(equal(5), m) * m).sum()) for m in (squared_distances(b, y) for b in (found, start))
    )
    assert after < before


def mirror_descent(atoms: Tensor, y: Tensor, steps: int) -> Tensor:
    """The official code's way to the weights, with a step that falls as 10 / t so that it arrives."""
    cost = squared_distances(atoms, y)
    cost /= cost.max()
    weights = equal(len(atoms))
    for step in range(steps):
        _, log = pot().emd(weights.numpy(), equal(len(y)).numpy(), cost.numpy(), log=True)
        weights = weights * torch.exp(-10 / (step + 1) * torch.from_numpy(log["u"]))
        weights /= weights.sum()
    return weights


def test_weights_are_those_that_mirror_descent_looks_for() -> None:
    parts = clusters(12, 6, 2)
    found = weigh(torch.stack([part.mean(0) for part in parts]), torch.cat(parts))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    atoms, y = noise(4, 3), noise(60, 3)
    torch.testing.assert_close(weigh(atoms, y), mirror_descent(atoms, y, 300), atol=0.01, rtol=0)


def test_free_weights_follow_the_sizes_of_clusters() -> None:
    y = torch.cat(clusters(12, 6, 2))
    atoms, weights = barycenter(y, 3, generator(3), of="class 0", weighted=True)
    assert float(weights.sum()) == pytest.approx(1)
    assert sorted(weights.tolist()) == pytest.approx([0.1, 0.3, 0.6], abs=0.001)
    near = squared_distances(atoms, CENTRES).argmin(1)
    assert weights[near.argsort()].tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.001)


def test_an_atom_far_from_all_points_keeps_a_little_mass_and_comes_back() -> None:
    y = noise(20, 3)
    atoms = torch.cat([noise(2, 3), torch.full((1, 3), 1e3, dtype=torch.float64)])
    weights = weigh(atoms, y)
    assert float(weights.min()) == pytest.approx(FLOOR / 3, rel=1e-3)
    assert float(weights.sum()) == pytest.approx(1)
    moved = settle(atoms, weights, y)
    assert float(moved[2].norm()) < float(y.norm(dim=1).max()) + 1e-9


def test_the_stream_decides() -> None:
    y = noise(30, 4)
    first, again, other = (barycenter(y, 4, generator(seed), of="class 0")[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_cannot_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ipc 6 is more than the 5 .* of class 2 \(cat\)"):
        barycenter(noise(5, 2), 6, generator(0), of="class 2 (cat)")
    broken = noise(5, 2)
    broken[3, 1] = torch.nan
    with pytest.raises(NonFiniteLoss, match=r"1 features of 10 .* class 0.*normalisation"):
        barycenter(broken, 2, generator(0), of="class 0")
    monkeypatch.setattr(_barycenter, "SIMPLEX_STEPS", 1)
    with pytest.warns(UserWarning, match="numItermax"), pytest.raises(DistilleryError, match="60 images of class 0"):
        barycenter(noise(60, 2), 20, generator(0), of="class 0")
