"""The batches of a student: which images, in which view, at every step.

Everything is addressed by (seed, epoch, step) and never by what was drawn before, so labels made beforehand and a
training resumed in the middle see the same views; and by nothing of the method, so every method's images are seen
through the same views.

Ragged sets: an epoch shows every image once, in ceil(N / batch) batches whose sizes differ by at most one. No image is
dropped, and the number of views is epochs * N whatever the batch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distillery.config import Recipe
from distillery.data import augment
from distillery.device import Compute
from distillery.rng import generator

Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        part: positions of these images in the epoch's order.
        x_norm: [B, 3, S, S] views.
        targets: [B] classes of the images.
        partners: [B] classes of the images mixed into them (the same where nothing is mixed).
        own: share of the image itself in its view.
        weights: [B] how much each image counts in the loss (a mixed view counts as its image); None = all the same.
    """

    part: slice
    x_norm: Tensor
    targets: Tensor
    partners: Tensor
    own: float
    weights: Tensor | None = None


def slices(n: int, batch: int) -> list[slice]:
    """ceil(n / batch) consecutive slices over n images, sizes differing by at most one."""
    count = math.ceil(n / batch)
    bounds = [i * n // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class Batches:
    """All batches of one student run over a set that stays on the device as uint8."""

    def __init__(
        self,
        images_u8: Tensor,
        labels: Tensor,
        recipe: Recipe,
        seed: int,
        norm: Norm,
        compute: Compute,
        weights: Tensor | None = None,
    ) -> None:
        self._images_u8, self._labels = compute.images(images_u8), labels.to(compute.device)
        self._weights = None if weights is None else weights.to(compute.device)
        self._policy, self._seed, self._norm = recipe.views, seed, norm
        self.slices = slices(len(labels), recipe.batch)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def order(self, epoch: int) -> Tensor:
        """Image index at each position of an epoch, [N] on the device."""
        if self._order[0] != epoch:
            drawn = torch.randperm(len(self._labels), generator=generator(self._seed, "order", epoch))
            self._order = (epoch, drawn.to(self._labels.device))
        return self._order[1]

    def views(self, epoch: int, step: int) -> augment.Views:
        """How the images of one step are seen."""
        part, side = self.slices[step], self._images_u8.shape[2]
        return augment.draw(self._policy, part.stop - part.start, side, generator(self._seed, "views", epoch, step))

    def get(self, epoch: int, step: int) -> Batch:
        """The batch of one step of one epoch (both from 0)."""
        part = self.slices[step]
        index, views = self.order(epoch)[part], self.views(epoch, step)
        x_norm = augment.apply(self._policy, self._images_u8[index], views, *self._norm)
        targets = self._labels[index]
        mixed = targets[views.partner.to(targets.device)] if views.partner.numel() else targets
        weights = None if self._weights is None else self._weights[index]
        return Batch(part, x_norm, targets, mixed, views.own, weights)
