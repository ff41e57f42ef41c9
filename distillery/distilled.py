"""Train on an exported set: `distillery.load(uri)` gives a `torch.utils.data.Dataset` of images and soft labels.

    dataset = distillery.load("s3://bucket/sets/cifar10")   # a set, or the newest version of a published one
    image, soft_label = dataset[0]                          # float32 [3, S, S] normalised, float32 [C] probabilities

    for epoch in range(dataset.recipe.epochs):              # what the student of the report was shown, in order
        for images, target in dataset.loader(epoch=epoch):
            loss = dataset.loss(net(images), target)

The loader is a plain `DataLoader` over recorded views: any number of workers, forked or spawned; with `device="cuda"`
the views are made there. Its sampler has `set_epoch`, as that of distributed training; without it each pass is the next
epoch.

Legend: N images, C classes, B images of a step, S side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from distillery import artifact, export, labels, student
from distillery.artifact import MANIFEST
from distillery.config import Recipe, parse
from distillery.data import augment
from distillery.data.batches import Batch
from distillery.device import Compute
from distillery.errors import CorruptArtifact, UserError
from distillery.export import formats, views
from distillery.files import cache_root
from distillery.store import Store, open_store
from distillery.store.local import LocalStore

Transform = Callable[[Tensor], Any]
READ = ("images_u8", "labels", "soft_labels", "weights", "arrays")  # each process reads them itself


class Target(NamedTuple):
    """What a step's images should be taken for.

    Attributes:
        logits: [B, C] float32 of the teacher; under hard labels empty.
        labels: [B] classes of the images.
        partners: [B] classes of the images mixed into them (the same where nothing is mixed).
        own: [B] share of the image itself in its view.
        weights: [B] how much each counts.
    """

    logits: Tensor
    labels: Tensor
    partners: Tensor
    own: Tensor
    weights: Tensor

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Target:
        """All of it on another device."""
        return Target(*(each.to(device, non_blocking=non_blocking) for each in self))


class DistilledSet(Dataset[tuple[Any, Tensor]]):
    """An exported set. Picklable: another process opens the files itself.

    Attributes:
        folder: where it lies on this machine.
        facts: what set.json says: dataset, method, ipc, source and more.
        classes: names of the C classes.
        mean, std: of each channel, of pixels in 0..1; None where the export did not know them.
        recipe: how the student of the report was trained; None without one.
        transform: called with the uint8 image [3, S, S] in place of the normalisation.
        temperature: of the soft labels' softmax.
    """

    def __init__(self, folder: Path, transform: Transform | None = None, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise UserError(f"temperature {temperature} must be above 0; 1 gives the teacher's own probabilities")
        self.folder, self.transform, self.temperature = folder, transform, temperature
        try:
            self.facts: dict[str, Any] = json.loads((folder / export.FACTS).read_text(encoding="utf-8"))
            self.classes: list[str] = self.facts["classes"]
            self.recipe = parse(Recipe, self.facts["recipe"], export.FACTS) if self.facts["student"] else None
            if not views.NAMES.issuperset(self.facts["recorded"]):
                raise ValueError(f"recorded {self.facts['recorded']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(f"{folder / export.FACTS}: not readable ({error}); export the set again") from error
        self.mean, self.std = self.facts["mean"], self.facts["std"]

    def __len__(self) -> int:
        return int(self.facts["images"])

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """One image, normalised (or as `transform` gives it), and its soft label [C]: probabilities."""
        image = self.images_u8[index]
        return self.transform(image) if self.transform else self.normalise(image[None])[0], self.soft_labels[index]

    def __getstate__(self) -> dict[str, Any]:
        """The description alone: memory maps and pixels do not travel."""
        return {name: value for name, value in self.__dict__.items() if name not in READ}

    @cached_property
    def labels(self) -> Tensor:
        """[N] int64, the class of each image."""
        return torch.from_numpy(np.load(self.folder / "labels.npy"))

    @cached_property
    def images_u8(self) -> Tensor:
        """[N, 3, S, S] uint8."""
        return formats.find(self.facts["format"]).read(self.folder, self.labels, self.classes)

    @cached_property
    def soft_labels(self) -> Tensor:
        """[N, C] float32 probabilities; one-hot where the set has no soft labels."""
        if not self.facts["soft"]:
            return functional.one_hot(self.labels, len(self.classes)).float()
        logits = torch.from_numpy(np.load(self.folder / "soft.npy")).float()
        return (logits / self.temperature).softmax(1)

    @cached_property
    def weights(self) -> Tensor:
        """[N] float32, how much each image counts in the loss."""
        path = self.folder / "weights.npy"
        return torch.from_numpy(np.load(path)) if path.exists() else torch.ones(len(self))

    @cached_property
    def arrays(self) -> views.Arrays:
        """The recorded views by name (`distillery/export/views.py`), memory-mapped."""
        folder = self.folder / views.FOLDER
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.facts["recorded"]}

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32, as the student saw them; in 0..1 where the normalisation is not known."""
        return augment.normalise(images, tuple(self.mean or (0.0,) * 3), tuple(self.std or (1.0,) * 3))

    def loader(self, *, workers: int = 0, epoch: int = 0, device: str = "cpu", **options: Any) -> DataLoader[Any]:
        """A DataLoader of (images [B, 3, S, S] float32, `Target`), one batch a step of the recorded training.

        Args:
            workers: processes that make the views; 0 makes them here.
            epoch: where the first pass begins; each further pass is the next epoch.
            device: where views are made. With workers that is the CPU: move the batch, or take no workers.
            options: further options of DataLoader, such as pin_memory, persistent_workers, multiprocessing_context.

        Raises:
            UserError: the set has no recorded views, or workers and a GPU together.
        """
        if workers and torch.device(device).type != "cpu":
            raise UserError(
                f"device {device!r} with workers={workers}: on a GPU one process makes the views; workers=0"
            )
        dataset = Views(self, torch.device(device))
        sampler = EpochSampler(len(self.facts["steps"]), epoch)
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers, **options)

    def loss(self, outputs: Tensor, target: Target) -> Tensor:
        """The recipe's loss of a network's outputs [B, C], a scalar.

        Raises:
            UserError: the set has no recipe.
        """
        recipe = self._recorded()
        weighted = (self.folder / "weights.npy").exists()  # asking the tensor would wait for the device
        whole = slice(0, len(outputs))
        batch = Batch(whole, outputs, target.labels, target.partners, 1.0, target.weights if weighted else None)
        if recipe.regime == "hard":
            share = float(target.own[0])
            batch = Batch(whole, outputs, target.labels, target.partners, share, batch.weights)
        return student.loss_of(recipe, outputs.float(), target.logits if target.logits.numel() else None, batch)

    def _recorded(self) -> Recipe:
        if self.recipe is None or not self.facts["recorded"]:
            raise UserError(
                f"{self.folder} has no recorded views; export it out of its run, with views, or train on dataset[i]"
            )
        return self.recipe


class Views(Dataset[tuple[Tensor, Target]]):
    """Every step of the recorded training by its number: epoch * steps + step."""

    def __init__(self, found: DistilledSet, device: torch.device) -> None:
        self.set, self.recipe = found, found._recorded()
        self.steps: list[list[int]] = found.facts["steps"]
        self.compute = Compute(device, torch.float32)

    def __len__(self) -> int:
        return self.recipe.epochs * len(self.steps)

    def __getitem__(self, number: int) -> tuple[Tensor, Target]:
        epoch, step = divmod(number, len(self.steps))
        part = slice(*self.steps[step])
        arrays, found = self.set.arrays, self.set
        index = torch.from_numpy(arrays["order"][epoch, part].astype(np.int64))
        drawn = views.read(self.recipe, arrays, self.set.facts["size"], epoch, step, part)
        images = self._images[index.to(self._images.device)]
        x_norm = augment.apply(self.recipe.views, images, drawn, tuple(found.mean), tuple(found.std))
        own, targets = torch.full((len(index),), drawn.own), found.labels[index]
        partners = targets[drawn.partner] if drawn.partner.numel() else targets
        target = Target(self._logits(epoch, part), targets, partners, own, found.weights[index])
        return x_norm, target.to(self.compute.device)

    def __getstate__(self) -> dict[str, Any]:
        """As of the set: the images stay here."""
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    @cached_property
    def _images(self) -> Tensor:
        return self.compute.images(self.set.images_u8)

    def _logits(self, epoch: int, part: slice) -> Tensor:
        arrays = self.set.arrays
        if "logits" not in arrays:
            return torch.empty(0)
        logits = torch.from_numpy(np.array(arrays["logits"][epoch, part])).float()
        if "places" not in arrays:
            return logits
        places = torch.from_numpy(np.array(arrays["places"][epoch, part]))
        return labels.expand(logits, places, len(self.set.classes))


class EpochSampler(Sampler[int]):
    """The steps of one epoch after the other; `set_epoch` chooses the next one."""

    def __init__(self, steps: int, epoch: int = 0) -> None:
        self.steps, self.epoch = steps, epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.steps  # at the first step: a DataLoader may ask for an iterator that it never uses
        self.epoch += 1
        yield from range(first, first + self.steps)

    def __len__(self) -> int:
        return self.steps


def load(uri: str | Path, *, transform: Transform | None = None, temperature: float = 1.0) -> DistilledSet:
    """Open an exported set; from a store it is fetched into the cache, and every file is checked.

    Args:
        uri: a folder, or a file:// or s3:// URI: a set, or what `distillery publish` wrote, for its newest version.
        transform: called with each uint8 image [3, S, S] in place of the normalisation.
        temperature: of the soft labels of `dataset[i]`.

    Raises:
        UserError: no set there. CorruptArtifact: a file is missing or changed. StoreError: the store does not answer.
    """
    store, prefix = open_store(uri), ""
    if not store.exists(MANIFEST) and (pointed := export.latest(store)):
        prefix = f"{pointed['version']}/"
    if not store.exists(f"{prefix}{MANIFEST}"):
        raise UserError(f"{uri}: no exported set there (no {prefix}{MANIFEST}); write one with `distillery export`")
    folder = _fetched(store, prefix)
    artifact.read(folder, export.KIND)
    return DistilledSet(folder, transform, temperature)


def _fetched(store: Store, prefix: str) -> Path:
    if isinstance(store, LocalStore):
        return store.root / prefix
    found = artifact.parse(store.read(f"{prefix}{MANIFEST}"), f"{store.uri}/{prefix}{MANIFEST}")
    if found.kind != export.KIND:
        raise CorruptArtifact(f"{store.uri}/{prefix}: this is a {found.kind!r} artifact, not an exported set")
    folder = cache_root() / "sets" / found.fingerprint
    store.pull(prefix.rstrip("/"), folder)
    return folder


__all__ = ["DistilledSet", "EpochSampler", "Target", "Views", "load"]
