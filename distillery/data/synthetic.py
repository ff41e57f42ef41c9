"""The synthetic set: what every method returns and every later stage reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distillery.errors import CorruptArtifact
from distillery.files import write_atomic

FILE = "images.safetensors"


@dataclass(frozen=True)
class Synthetic:
    """K images of each of C classes.

    Attributes:
        images_u8: [C * K, 3, S, S] uint8, class after class.
        labels: [C * K] int64, the class of each image.
        extras: whatever else the method gives, by name (where its pixels came from, learned rates, ...). Students read
            one of them: `weights`, see there.
    """

    images_u8: Tensor
    labels: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.images_u8.shape)
        assert self.images_u8.dtype == torch.uint8 and len(shape) == 4 and shape[1] == 3, (self.images_u8.dtype, shape)
        assert self.labels.dtype == torch.int64 and self.labels.shape == shape[:1], (self.labels.dtype, shape)
        assert not {"images", "labels"} & set(self.extras), sorted(self.extras)

    @property
    def weights(self) -> Tensor | None:
        """How much each image counts in a student's loss: [C * K] float32, mean 1 in each class; None = all the same.

        Raises:
            CorruptArtifact: not one finite weight of at least 0 for each image.
        """
        weights = self.extras.get("weights")
        if weights is None or bool((weights == 1).all()):
            return None
        if weights.shape != self.labels.shape or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise CorruptArtifact(
                f"the set's weights {tuple(weights.shape)} between {float(weights.min())} and {float(weights.max())} "
                f"are not one number from 0 up for each of {len(self.labels)} images; synthesize it again"
            )
        return weights.float()

    def save(self, folder: Path) -> None:
        """Write `images.safetensors` into an artifact folder; equal content gives equal bytes.

        Raises:
            StoreError, UserError: the disk is full or not writable.
        """
        tensors = {"images": self.images_u8, "labels": self.labels, **self.extras}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(folder / FILE, to_bytes(plain))


def join(parts: Sequence[Synthetic], places: Sequence[tuple[int, int]]) -> Synthetic:
    """One set out of parts of it, in the order of (class, slot), as if it had been made at once.

    Args:
        parts: in any order, each with the same extras.
        places: (class, slot) of each image, part after part.

    Raises:
        CorruptArtifact: the parts hold other images, or extras, than expected.
    """
    names = {tuple(sorted(part.extras)) for part in parts}
    targets = torch.cat([part.labels for part in parts])
    if len(names) != 1 or targets.tolist() != [cls for cls, _ in places]:
        raise CorruptArtifact(
            f"{len(parts)} parts with {len(targets)} images of the classes {sorted(set(targets.tolist()))} and extras "
            f"{sorted(names)} are not the {len(places)} images expected; make the parts again"
        )
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__))
    extras = {name: torch.cat([part.extras[name] for part in parts])[order] for name in parts[0].extras}
    return Synthetic(torch.cat([part.images_u8 for part in parts])[order], targets[order], extras)


def load(folder: Path) -> Synthetic:
    """Read a synthetic set back.

    Raises:
        CorruptArtifact: the file is missing, unreadable or holds something else; names it.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return Synthetic(tensors.pop("images"), tensors.pop("labels"), tensors)
    except (OSError, SafetensorError, KeyError, AssertionError) as error:
        raise CorruptArtifact(f"{path}: not a synthetic set ({error}); synthesize it again") from error
