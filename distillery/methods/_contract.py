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
    """

    teacher: bool
    gpu: bool


class Teacher(Protocol):
    """What a method may use of a frozen teacher (`distillery.teacher.Frozen`).

    Attributes:
        net: the network, in eval mode, without gradients on its weights.
        mean, std, size, compute: normalisation of 0..1 pixels, input side S, device and precision.
    """

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    compute: Compute

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

    def estimate(self, cfg: Any, *, ipc: int, classes: int, size: int, train: int = 0) -> dict[str, int]:
        """Work and memory beforehand."""

    def synthesize(
        self, cfg: Any, real: Real, teacher: Teacher, *, ipc: int, seed: int, classes: Sequence[int], track: Track
    ) -> Synthetic:
        """IPC images of each class."""
