"""Real images as the later steps see them: all pixels of a split as one class-sorted tensor, or single originals."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distillery.data._photos import PhotoSplit
from distillery.data.images import Images, shuffled
from distillery.data.limits import photo_side
from distillery.data.prepare import INDEX, SCHEMA
from distillery.errors import CorruptArtifact
from distillery.track import Track

HALF = (0.5, 0.5, 0.5)
EVERY = 5  # `Real.of` keeps every fifth image of a class for validation


class Split(Protocol):
    """What one split offers; `counts` are the images per class, `runs` those of each block (`images.shuffled`)."""

    @property
    def counts(self) -> list[int]:
        """Images per class."""

    @property
    def runs(self) -> list[int]:
        """See `images.shuffled`."""

    def images(self) -> Images:
        """See `Real.images`."""

    def pixels(self) -> tuple[Tensor, Tensor]:
        """See `Real.pixels`."""

    def originals(self, cls: int, indices: list[int]) -> list[Tensor]:
        """See `Real.read`."""


class Real:
    """A prepared data set.

    Attributes:
        name: of the data set.
        kind: pixels or photos.
        classes: in label order.
        size: side in pixels.
        mean, std: per channel, of pixels in 0..1.
    """

    def __init__(self, facts: dict[str, Any], splits: dict[str, Split]) -> None:
        self.name: str = facts["name"]
        self.kind: str = facts["kind"]
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        self.size: int = facts["size"]
        self.mean: tuple[float, float, float] = tuple(facts["mean"])
        self.std: tuple[float, float, float] = tuple(facts["std"])
        self._splits = splits

    @staticmethod
    def of(
        images_u8: Tensor,
        labels: Tensor,
        classes: tuple[str, ...] = (),
        val: tuple[Tensor, Tensor] | None = None,
        mean: tuple[float, float, float] = HALF,
        std: tuple[float, float, float] = HALF,
    ) -> Real:
        """A pixel set from tensors.

        Args:
            images_u8: [N, 3, S, S].
            labels: int64 [N].
            classes: names; () numbers them.
            val: validation images and labels; None takes every fifth image of a class out of the others.
            mean: per channel, of pixels scaled to 0..1.
            std: likewise.
        """
        names = classes or tuple(str(cls) for cls in range(int(labels.max()) + 1))
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        if val is None:
            for cls in range(len(names)):
                held_out[(labels == cls).nonzero()[EVERY - 1 :: EVERY, 0]] = True
        train = (images_u8[~held_out], labels[~held_out])
        splits: dict[str, Split] = {
            "train": _sorted(*train, len(names)),
            "val": _sorted(*(val or (images_u8[held_out], labels[held_out])), len(names)),
        }
        facts = {"name": "tensors", "kind": "pixels", "classes": names, "size": images_u8.shape[-1]}
        return Real(facts | {"mean": mean, "std": std}, splits)

    def counts(self, split: str) -> list[int]:
        """Images per class of `train` or `val`."""
        return self._splits[split].counts

    def images(self, split: str) -> tuple[Images, Tensor]:
        """As `pixels`, but photos that would take too much memory or disk (`limits`) are decoded when they are indexed.

        Raises:
            CorruptArtifact, StoreError: as `pixels`, then or later.
        """
        counts = torch.tensor(self.counts(split))
        return self._splits[split].images(), torch.arange(len(counts)).repeat_interleave(counts)

    def order(self, split: str, stream: torch.Generator) -> Tensor:
        """A random order of a split's images, [N] int64; see `images.shuffled`."""
        return shuffled(self._splits[split].runs, sum(self.counts(split)), stream)

    def pixels(self, split: str) -> tuple[Tensor, Tensor]:
        """All images of a split, class by class, in file order inside a class.

        Returns:
            images_u8 [N, 3, S, S] and labels int64 [N]. Photos come as [N, 3, R, R], R = S // 7 * 8 (256 for 224):
            shorter side resized to R (antialiased bilinear), then the central square; decoded once into the local
            cache (DISTILLERY_CACHE) and read from there.

        Raises:
            CorruptArtifact: a shard that does not hold what its index says.
            StoreError: the disk is full, the cache too small, or the store of published shards fails.
        """
        return self._splits[split].pixels()

    def read(self, split: str, cls: int, indices: list[int]) -> list[Tensor]:
        """Original images of one class by their place in the class: uint8 [3, h, w] each, photos of any size."""
        return self._splits[split].originals(cls, indices)


class PixelSplit:
    """One split of a pixel set, read from its shards at first use and kept."""

    def __init__(self, counts: list[int], paths: list[Path], loaded: tuple[Tensor, Tensor] | None = None) -> None:
        self.counts, self.runs = counts, list[int]()
        self._paths, self._given = paths, loaded

    @cached_property
    def _loaded(self) -> tuple[Tensor, Tensor]:
        if self._given is not None:
            return self._given
        shards = [_read_shard(path) for path in self._paths]
        images = torch.cat([shard["images"] for shard in shards])
        labels = torch.cat([shard["labels"] for shard in shards])
        if torch.bincount(labels, minlength=len(self.counts)).tolist() != self.counts:
            raise CorruptArtifact(f"{self._paths[0].parent}: the shards do not hold the images that {INDEX} counts")
        return images, labels

    def images(self) -> Images:
        """images_u8 [N, 3, S, S]."""
        return self._loaded[0]

    def pixels(self) -> tuple[Tensor, Tensor]:
        """images_u8 [N, 3, S, S] and labels [N]."""
        return self._loaded

    def originals(self, cls: int, indices: list[int]) -> list[Tensor]:
        """Images of a class, uint8 [3, S, S] each."""
        start = sum(self.counts[:cls])
        return [self._loaded[0][start + i] for i in indices]


def load(folder: Path, track: Track | None = None) -> Real:
    """Open a prepared data set; pixels are read when they are first asked for.

    Args:
        folder: what `prepare` wrote.
        track: hears about photos being fetched and decoded.

    Raises:
        CorruptArtifact: no readable `data.json`, or one of a newer schema.
    """
    index = _read_index(Path(folder) / INDEX)
    splits = {name: _split(Path(folder), index, name, track or Track.quiet()) for name in index["splits"]}
    return Real(index, splits)


def _split(folder: Path, index: dict[str, Any], name: str, track: Track) -> Split:
    facts = index["splits"][name]
    for record in facts["shards"]:
        if PurePosixPath(record["file"]).name != record["file"]:
            raise CorruptArtifact(f"{folder / INDEX} names the shard {record['file']!r}, which is no plain file name")
    if index["kind"] == "photos":
        return PhotoSplit(folder, index["store"], name, facts, photo_side(index["size"]), track)
    return PixelSplit(facts["counts"], [folder / record["file"] for record in facts["shards"]])


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        schema = index["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}); run prepare_data again") from error
    if schema != SCHEMA:
        raise CorruptArtifact(f"{path} has schema {schema}, this distillery reads {SCHEMA}; upgrade distillery")
    return index


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}); delete its folder and run prepare_data") from error


def _sorted(images_u8: Tensor, labels: Tensor, classes: int) -> PixelSplit:
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=classes).tolist()
    return PixelSplit(counts, [], (images_u8[order], labels[order]))
