"""The types of the contract between methods and the rest; `distillery/methods/__init__.py` says it in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from distillery.config import Options
from distillery.data.synthetic import Synthetic
from distillery.device import Compute

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks for.

    Attributes:
        teacher: it runs the teacher (every cell has one for its labels; this says who calls it).
        gpu: it computes enough to be worth a GPU where there is one.
        several: it can use several teachers at once.
        statistics: which of `distillery.statistics.KINDS` it reads, beyond the teacher's BatchNorm buffers.
    """

    teacher: bool
    gpu: bool
    several: bool = False
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Images that are made together: the smallest part of a set that can be made alone.

    Attributes:
        classes: class indices, ascending.
        slots: which images of each class, by their place 0..IPC-1.
    """

    classes: tuple[int, ...]
    slots: range

    @property
    def images(self) -> list[tuple[int, int]]:
        """(class, slot) of each image, class after class."""
        return [(cls, slot) for cls in self.classes for slot in self.slots]

    @property
    def name(self) -> str:
        """What errors and random streams call it."""
        return f"classes {self.classes[0]}-{self.classes[-1]}, images {self.slots.start}-{self.slots.stop - 1}"


def classwise(cfg: Options, *, ipc: int, classes: int) -> list[Group]:
    """Every class alone: the `groups` of methods that look at one class at a time."""
    return [Group((cls,), range(ipc)) for cls in range(classes)]


def in_order(part: Sequence[Group]) -> list[tuple[int, int]]:
    """(class, slot) of each image of a part, in the order in which `synthesize` returns them."""
    return sorted(image for group in part for image in group.images)


class Teacher(Protocol):
    """What a method may use of a frozen teacher (`distillery.teacher.Frozen`).

    Attributes:
        net: the network, in eval mode, without gradients on its weights.
        mean, std, size, compute: normalisation of 0..1 pixels, input side S, device and precision.
        members: the teachers themselves; a single one is its own only member.
        statistics: tensors of `distillery.statistics` by name, where the method asked for them.
    """

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    compute: Compute
    statistics: dict[str, Tensor]

    @property
    def members(self) -> Sequence[Teacher]:
        """The teachers behind this one."""

    def logits(self, x_norm: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, C] float32."""

    def normalise(self, x01: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> normalised."""


class Method(Protocol):
    """A module of this package (a module is its own plug-in: no base class, no registration)."""

    NEEDS: Needs
    RECIPES: dict[tuple[str, int], dict[str, Any]]

    @property
    def Config(self) -> type[Options]:
        """The method's options."""

    def check(self, cfg: Any, *, ipc: int, size: int, per_class: list[int] | None) -> None:
        """Refuse what cannot work."""

    def groups(self, cfg: Any, *, ipc: int, classes: int) -> list[Group]:
        """The parts of a set that can be made independently, in order."""

    def estimate(self, cfg: Any, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
        """Work and memory beforehand."""

    def synthesize(
        self, cfg: Any, real: Real, teacher: Teacher, *, ipc: int, seed: int, part: Sequence[Group], track: Track
    ) -> Synthetic:
        """The images of some groups."""
