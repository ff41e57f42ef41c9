"""The Wasserstein barycenter of one empirical measure on few atoms, as WMDD uses it (arXiv 2311.18531).

Of all measures sum_i w_i delta(B_i) with k atoms, the one nearest (W2) to the n given points of mass 1/n each. With
equal weights this is k-means in which every atom owns the same mass. Solved by the fixed-point iteration of
Alvarez-Esteban et al. (arXiv 1511.05355): an exact optimal transport plan P, then B_i <- sum_j P_ij Y_j / w_i. Free
weights alternate with damped steps of the positions.

The problem is not convex: another start may end elsewhere. Everything is float64 on the CPU.

Legend: k atoms, n points, D dimensions; B [k, D] atoms, w [k] their weights, Y [n, D] points, M [k, n] squared
distances, P [k, n] plan (rows sum to w, columns to 1/n).
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from distillery.errors import DistilleryError, NonFiniteLoss, UserError

ALTERNATIONS = 10  # of weights and positions, at most
DAMPING = 0.2  # theta: the step of an alternation towards the new positions
MOVES = 100  # updates of all positions for given weights, at most
STILL = 1e-9  # mean squared movement, relative to the variance of the points, that counts as none
SETTLED = 1e-6  # change of the weights (L2) that ends the alternations
FLOOR = 1e-4  # smallest weight, relative to 1/k
SIMPLEX_STEPS = 10_000_000


def barycenter(
    points: Tensor, k: int, stream: torch.Generator, *, of: str, weighted: bool = False
) -> tuple[Tensor, Tensor]:
    """Barycenter of a set of points; atoms start from N(0, 1).

    With free weights no weight falls below 1e-4 / k: an atom far from every point would otherwise lose all its mass,
    and with it the place it moves to. At the floor it still moves to the points cheapest for it, and may win mass
    again.

    Args:
        points: Y [n, D], any float type and device.
        k: number of atoms, at most n.
        stream: of the start.
        of: what errors call the points, such as "class 3 (cat)".
        weighted: let the weights follow the points: at most 10 alternations of weights (from equal ones) and damped
            positions; else every weight is 1/k.

    Returns:
        Atoms [k, D] and weights [k] that sum to 1, float64 on the CPU.

    Raises:
        UserError: more atoms than points.
        NonFiniteLoss: points that are not finite.
    """
    y = points.detach().to("cpu", torch.float64)
    if k > len(y):
        raise UserError(
            f"wmdd: ipc {k} is more than the {len(y)} real training images of {of}, so its barycenter would repeat "
            f"atoms; lower ipc to at most {len(y)}, or give the class more images"
        )
    if not y.isfinite().all():
        raise NonFiniteLoss(
            f"the teacher gives {int((~y.isfinite()).sum())} features of {y.numel()} that are not finite for images of "
            f"{of}; check its weights and its normalisation, or use precision: fp32"
        )
    atoms = torch.randn(k, y.shape[1], generator=stream, dtype=torch.float64)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    if not weighted:
        return settle(atoms, weights, y, of), weights
    for alternation in range(ALTERNATIONS):
        fresh = weigh(atoms, y)
        if alternation and float((fresh - weights).norm()) < SETTLED:
            break
        weights = fresh
        atoms = torch.lerp(atoms, settle(atoms, weights, y, of), DAMPING)
    return atoms, weights


def settle(atoms: Tensor, weights: Tensor, y: Tensor, of: str = "the points") -> Tensor:
    """Positions for given weights: move every atom to the mean of the mass it gets, until none moves.

    Args:
        atoms: where they start, [k, D].
        weights: [k], positive, sum 1.
        y: points [n, D].
        of: what errors call the points.

    Returns:
        Atoms [k, D].
    """
    still = STILL * float(y.var(0, correction=0).sum())
    for _ in range(MOVES):
        plan = transport(weights, squared_distances(atoms, y), of)
        moved = plan @ y / plan.sum(1, keepdim=True)
        step = float((moved - atoms).square().sum(1).mean())
        atoms = moved
        if step <= still:
            break
    return atoms


def weigh(atoms: Tensor, y: Tensor) -> Tensor:
    """The best weights for given positions: the share of the points that is nearest to each atom.

    Weights that are free put no condition on a plan's rows, so each point goes to its nearest atom. The official code
    looks for the same weights by mirror descent (step 10, at most 100 steps along the dual potentials, costs divided by
    their largest), which at that constant step still swings between far apart weights where it stops.

    Args:
        atoms: [k, D].
        y: points [n, D].

    Returns:
        Weights [k] that sum to 1, none below 1e-4 / k.
    """
    owners = squared_distances(atoms, y).argmin(0)
    weights = torch.bincount(owners, minlength=len(atoms)).double() / len(y)
    weights = weights.clamp(min=FLOOR / len(atoms))
    return weights / weights.sum()


def squared_distances(atoms: Tensor, y: Tensor) -> Tensor:
    """M [k, n]."""
    return torch.cdist(atoms, y).square_()


def transport(weights: Tensor, cost: Tensor, of: str = "the points") -> Tensor:
    """An exact optimal plan between masses `weights` and n equal masses.

    Args:
        weights: [k], sum 1.
        cost: M [k, n].
        of: what errors call the points.

    Returns:
        Plan P [k, n].

    Raises:
        DistilleryError: the solver did not reach the optimum.
    """
    masses = torch.full((cost.shape[1],), 1 / cost.shape[1], dtype=torch.float64)
    plan, log = pot().emd(weights.numpy(), masses.numpy(), cost.numpy(), numItermax=SIMPLEX_STEPS, log=True)
    if log["warning"] is not None:
        raise DistilleryError(
            f"optimal transport between {len(weights)} atoms and the {len(masses)} images of {of} did not reach its "
            f"optimum ({log['warning']}); lower ipc or check the teacher's features"
        )
    return torch.from_numpy(plan)


def pot() -> ModuleType:
    """POT, imported at first use: it takes seconds that nothing else needs to pay."""
    with warnings.catch_warnings():  # its source has escapes that newer Pythons complain about when they compile it
        warnings.simplefilter("ignore")
        import ot
    module: ModuleType = ot
    return module
