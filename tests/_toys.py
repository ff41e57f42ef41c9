"""Toy data and toy teachers for tests of methods: small enough for milliseconds, real enough to have an opinion."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from distillery import statistics
from distillery.data.real import Real
from distillery.device import Compute
from distillery.rng import generator
from distillery.track import Track

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CPU = Compute(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class ToyTeacher:
    """A net behind the interface of a frozen teacher."""

    net: nn.Module
    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    compute: Compute = CPU
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def members(self) -> "tuple[ToyTeacher, ...]":
        """Itself."""
        return (self,)

    def logits(self, x_norm: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C]."""
        with torch.no_grad():
            return self.net(x_norm).float()

    def normalise(self, x01: Tensor) -> Tensor:
        """(x - mean) / std, per channel."""
        return functional.normalize(x01, list(self.mean), list(self.std))


def toy_net(classes: int) -> nn.Module:
    """Random weights, the same each time; far from uniform, so that scores differ."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    net.append(nn.Linear(16, classes))
    stream = generator("toy net", classes)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream)
    net[1].running_mean = torch.randn(4, generator=stream)
    net[1].running_var = torch.rand(4, generator=stream) + 0.5
    return net.eval().requires_grad_(False)


def toy_teacher(real: Real, broken: bool = False) -> ToyTeacher:
    """A teacher for a data set; a broken one gives NaN."""
    net = toy_net(len(real.classes))
    if broken:
        net[-1].bias.data[0] = torch.nan
    teacher = ToyTeacher(net, real.size)
    teacher.statistics.update(statistics.collect([teacher], real, statistics.KINDS, seed=0, track=Track.quiet())[0])
    return teacher


def toy_pixels(classes: int = 4, per_class: int = 12, size: int = 8) -> Real:
    """Random small images; counts differ a little from class to class."""
    counts = torch.tensor([per_class + cls for cls in range(classes)])
    labels = torch.arange(classes).repeat_interleave(counts)
    images = _noise("pixels", len(labels), size, size)
    return Real.of(images, labels, val=(images[::5], labels[::5]), mean=MEAN, std=STD)


def toy_photos(classes: int = 2, per_class: int = 5, size: int = 66) -> Real:
    """Random photos, each of its own odd size, smaller and larger than `size`."""
    sides = [[(40 + 7 * i + 3 * cls, 90 - 9 * i) for i in range(per_class)] for cls in range(classes)]
    photos = [[_noise(f"photos {h} {w}", 1, h, w)[0] for h, w in own] for own in sides]
    facts = {"name": "photos", "kind": "photos", "classes": range(classes), "size": size, "mean": MEAN, "std": STD}
    return Real(facts, {"train": ToySplit(photos, size // 7 * 8)})


@dataclass(frozen=True)
class ToySplit:
    """Photos in memory behind the interface of a split."""

    photos: list[list[Tensor]]
    side: int

    @property
    def counts(self) -> list[int]:
        """Images per class."""
        return [len(own) for own in self.photos]

    @property
    def runs(self) -> list[int]:
        """No blocks."""
        return []

    def images(self) -> Tensor:
        """As `pixels`."""
        return self.pixels()[0]

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All photos, resized and cropped to `side`."""
        every = [functional.resize(photo, [self.side], antialias=True) for own in self.photos for photo in own]
        images = torch.stack([functional.center_crop(photo, [self.side, self.side]) for photo in every])
        return images, torch.arange(len(self.photos)).repeat_interleave(torch.tensor(self.counts))

    def originals(self, cls: int, indices: list[int]) -> list[Tensor]:
        """Photos as they are."""
        return [self.photos[cls][index] for index in indices]


class Killed(Exception):
    """The process ended here."""


class ToyTrack(Track):
    """Checkpoints in memory at every chance, a record of progress, and a kill after a number of saves."""

    def __init__(self, kill_after: int = 0) -> None:
        super().__init__()
        self.state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.progress: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self.saves, self.kill_after = 0, kill_after
        self.children: dict[str, ToyTrack] = {}

    def child(self, name: str) -> "ToyTrack":
        """A track of its own, which kills nobody."""
        return self.children.setdefault(name, ToyTrack())

    def log(self, done: int, total: int, **values: float | str) -> None:
        """Remember the progress."""
        self.progress.append((done, total))

    def note(self, text: str) -> None:
        """Remember the note."""
        self.notes.append(text)

    def due(self) -> bool:
        """Always."""
        return True

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Keep a copy; then perhaps the process ends."""
        self.state = {name: tensor.clone() for name, tensor in tensors.items()}, dict(values)
        self.saves += 1
        if self.saves == self.kill_after:
            raise Killed

    def load(self, quiet: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The kept copy."""
        return self.state

    def clear(self) -> None:
        """Forget it."""
        self.state = None


def _noise(name: str, count: int, height: int, width: int) -> Tensor:
    """Smooth colour noise [count, 3, height, width] uint8, the same for the same arguments."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator("toy noise", name))
    return (functional.resize(coarse, [height, width]) * 255).to(torch.uint8)
