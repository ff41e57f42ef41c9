"""Teachers: train one or take given weights, check it, and freeze it, alone or with others, for everyone downstream.

Legend: B batch, N images, C classes, S side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn import functional

from distillery import nets
from distillery.config import TeacherConfig, ViewPolicy, plain, short
from distillery.data import augment
from distillery.data.images import batches, near
from distillery.data.real import Real
from distillery.device import Compute
from distillery.errors import CorruptArtifact, GateError, UserError, choices
from distillery.files import write_atomic
from distillery.nets import pretrained
from distillery.rng import generator, seeded
from distillery.track import Track
from distillery.train import accuracy, build_optimizer, cosine, onecycle, pack, set_lr, unpack

GATE = ("min_accuracy", "expected_accuracy", "tolerance")  # what of the configuration decides without training
WEIGHTS, CARD, STATISTICS = "weights.safetensors", "teacher.json", "statistics.safetensors"
CHECK_EVERY = 50  # steps between looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Card:
    """What a teacher says about itself; accuracy is the fraction right on the validation split, last epoch."""

    net: str
    net_options: dict[str, object]
    classes: list[str]
    size: int
    mean: list[float]
    std: list[float]
    accuracy: float
    accuracy_best: float
    per_class: list[float]
    curve: list[list[float]]  # [epoch, accuracy, mean training loss]


class Frozen:
    """A teacher ready to score and label: eval mode, no gradients on its weights.

    Attributes:
        net: the network on its device.
        card: its `Card`.
        mean, std, size, compute: normalisation, input side in pixels, device and precision.
        statistics: of the training images inside it (`distillery.statistics`), where a method asked for them.
    """

    def __init__(self, net: nn.Module, card: Card, compute: Compute) -> None:
        self.net = compute.place(net).eval()
        self.net.requires_grad_(False)
        self.card, self.compute = card, compute
        self.mean, self.std, self.size = tuple(card.mean), tuple(card.std), card.size
        self.statistics: dict[str, torch.Tensor] = {}

    @property
    def members(self) -> tuple[Frozen, ...]:
        """A single teacher is its own only member."""
        return (self,)

    @torch.no_grad()
    def logits(self, x_norm: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] in float32 for normalised images [B, 3, S, S]."""
        with self.compute.autocast():
            out: torch.Tensor = self.net(self.compute.images(x_norm))
        return out.float()

    def normalise(self, x01: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> normalised images."""
        mean = torch.tensor(self.mean, device=x01.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=x01.device).view(1, 3, 1, 1)
        return (x01 - mean) / std


class Ensemble(Frozen):
    """Several teachers of the same classes, size and normalisation as one: its logits are the mean of theirs.

    `net` holds all networks side by side: their layers can be looked at, but there is nothing to call.
    """

    def __init__(self, members: Sequence[Frozen]) -> None:
        super().__init__(nn.ModuleList(m.net for m in members), _joint([m.card for m in members]), members[0].compute)
        self._members = tuple(members)

    @property
    def members(self) -> tuple[Frozen, ...]:
        """The teachers themselves."""
        return self._members

    @torch.no_grad()
    def logits(self, x_norm: torch.Tensor) -> torch.Tensor:
        """Mean of the members' logits [B, C] in float32 (what G-VBSM's students learn from)."""
        return torch.stack([member.logits(x_norm) for member in self._members]).mean(0)


def make(cfg: TeacherConfig, real: Real, compute: Compute, track: Track) -> tuple[nn.Module, Card]:
    """Train or load the teacher the configuration asks for; `gate` then decides whether it may be used.

    Args:
        cfg: net, recipe or given weights, gate.
        real: the prepared data set.
        compute: device and precision.
        track: progress and checkpoints.

    Returns:
        The net and its card.

    Raises:
        UserError: weights that do not fit the net, or other classes than the data set's.
        NonFiniteLoss: the training diverged.
    """
    mean, std = tuple(cfg.mean) or real.mean, tuple(cfg.std) or real.std
    net = _initial(cfg, real)
    if cfg.weights:
        pretrained.load(net, cfg.weights, cfg.net, _rows(cfg, real))
        net = compute.place(net)
        curve: list[list[float]] = []
    else:
        net, curve = _train(compute.place(net), cfg, real, compute, track)
    images_u8, labels = real.images("val")
    last, per_class = accuracy(
        net, images_u8, labels, lambda x: augment.evaluation_view(x, real.size, mean, std), compute
    )
    card = Card(
        net=cfg.net,
        net_options=dict(cfg.net_options),
        classes=list(real.classes),
        size=real.size,
        mean=list(mean),
        std=list(std),
        accuracy=last,
        accuracy_best=max([last, *(point[1] for point in curve)]),
        per_class=per_class,
        curve=curve,
    )
    return net, card


def gate(cfg: TeacherConfig, card: Card) -> None:
    """Refuse a teacher that is not what it should be, before anything is spent on synthesis.

    Raises:
        GateError: names the accuracy, the bound and the usual causes.
    """
    name, got, chance = cfg.name or card.net, card.accuracy, 1 / len(card.classes)
    causes = (
        "usual causes: another class order (teacher.classes), another normalisation (teacher.mean, teacher.std; "
        f"used here {card.mean} and {card.std}), another stem or input size ({card.size} px)"
    )
    if cfg.expected_accuracy and abs(got - cfg.expected_accuracy) > cfg.tolerance:
        raise GateError(
            f"teacher {name}: validation accuracy {got:.4f} is not within {cfg.tolerance} of "
            f"teacher.expected_accuracy {cfg.expected_accuracy}; {causes}"
        )
    if got < cfg.min_accuracy:
        remedy = causes if cfg.weights else "train longer (teacher.epochs), or lower teacher.min_accuracy"
        raise GateError(
            f"teacher {name}: validation accuracy {got:.4f} is below teacher.min_accuracy {cfg.min_accuracy}; {remedy}"
        )
    guessing = chance + 0.05 * (1 - chance)
    if cfg.weights and got < guessing:
        raise GateError(f"teacher {name}: validation accuracy {got:.4f} is about guessing ({chance:.4f}); {causes}")


def training(cfg: TeacherConfig) -> dict[str, Any]:
    """What of a configuration changes the weights: another name or gate does not train a teacher again."""
    config = plain(cfg)
    for key in ("name", "weights", *GATE):
        config.pop(key)
    return config | {"given": bool(cfg.weights)}


def save(folder: Path, net: nn.Module, card: Card) -> None:
    """Write weights and card into an artifact folder."""
    pretrained.save(net, folder / WEIGHTS)
    write_atomic(folder / CARD, (json.dumps(asdict(card), indent=1, sort_keys=True) + "\n").encode())


def load(folder: Path, compute: Compute, names: Sequence[str] = ()) -> Frozen:
    """Read teachers from an artifact and freeze them.

    Args:
        folder: a "teachers" artifact, or a single teacher's where no names are given.
        compute: device and precision.
        names: whose; several give an `Ensemble`.

    Raises:
        CorruptArtifact: a card or statistics are not readable.
    """
    members = [_load_one(folder / name, compute) for name in names] or [_load_one(folder, compute)]
    return members[0] if len(members) == 1 else Ensemble(members)


def _load_one(folder: Path, compute: Compute) -> Frozen:
    card = read_card(folder)
    net = nets.build(card.net, len(card.classes), card.size, **card.net_options)
    pretrained.load(net, str(folder / WEIGHTS), card.net)
    frozen = Frozen(net, card, compute)
    if (folder / STATISTICS).exists():
        try:
            frozen.statistics = load_file(folder / STATISTICS)
        except (OSError, SafetensorError) as error:
            raise CorruptArtifact(
                f"{folder / STATISTICS}: not readable ({error}); gather the teachers again"
            ) from error
    return frozen


def save_statistics(folder: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Write a teacher's statistics beside its weights; `load` finds them there."""
    write_atomic(folder / STATISTICS, to_bytes({name: value.contiguous() for name, value in found.items()}))


def agree(cards: Mapping[str, Card]) -> None:
    """Refuse teachers that cannot stand behind one set of images.

    Args:
        cards: by the teachers' names.

    Raises:
        UserError: two teachers of other classes, size or normalisation; names both and their values.
    """
    (first, one), *others = cards.items()
    for name, other in others:
        for what in ("classes", "size", "mean", "std"):
            here, there = getattr(one, what), getattr(other, what)
            if here != there:
                raise UserError(
                    f"teachers {first} and {name} differ in {what}: {short(here)} and {short(there)}; teachers of one "
                    "experiment see the same images, so give both the same (teachers[...].mean, .std, .classes)"
                )


def _joint(cards: Sequence[Card]) -> Card:
    """One card for several teachers: nets joined by "+", accuracies averaged."""
    first = cards[0]
    return Card(
        net="+".join(card.net for card in cards),
        net_options={},
        classes=first.classes,
        size=first.size,
        mean=first.mean,
        std=first.std,
        accuracy=fmean(card.accuracy for card in cards),
        accuracy_best=fmean(card.accuracy_best for card in cards),
        per_class=[fmean(values) for values in zip(*(card.per_class for card in cards), strict=True)],
        curve=[],
    )


def read_card(folder: Path) -> Card:
    """What a teacher artifact says about itself.

    Raises:
        CorruptArtifact: the card is not readable.
    """
    try:
        return Card(**json.loads((folder / CARD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{folder / CARD}: not a teacher card ({error}); train the teacher again") from error


def view_policy(cfg: TeacherConfig, real: Real) -> ViewPolicy:
    """Training views: padded crop and flip up to 64 px, random resized crop and flip for photos."""
    if real.kind == "photos":
        return ViewPolicy(crop="rrc", crop_scale=cfg.crop_scale, flip=cfg.flip)
    return ViewPolicy(crop="pad" if cfg.crop_pad else "none", crop_pad=cfg.crop_pad, flip=cfg.flip)


def _initial(cfg: TeacherConfig, real: Real) -> nn.Module:
    """The net with its initial weights, which depend on the seed alone (torch's initialisers draw globally)."""
    with seeded(cfg.seed, "teacher", cfg.net):
        return nets.build(cfg.net, len(real.classes), real.size, **cfg.net_options)


def _train(
    net: nn.Module, cfg: TeacherConfig, real: Real, compute: Compute, track: Track
) -> tuple[nn.Module, list[list[float]]]:
    """Train on images that stay on the device as uint8, or are read as they come; views are drawn and applied there."""
    mean, std = tuple(cfg.mean) or real.mean, tuple(cfg.std) or real.std
    every_u8, labels = real.images("train")
    every_u8, labels = near(every_u8, compute), labels.to(compute.device)
    val_u8, val_labels = real.images("val")
    policy, batch = view_policy(cfg, real), min(cfg.batch, len(labels))
    optimizer = build_optimizer(
        net.parameters(), cfg.optimizer, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum, nesterov=True
    )
    per_epoch = len(labels) // batch  # the ragged last batch is dropped; another order takes it up next epoch
    total, shape = per_epoch * cfg.epochs, onecycle if cfg.schedule == "onecycle" else cosine
    start, curve, loss_sum = 0, [], torch.zeros((), device=compute.device)
    if (kept := track.load()) is not None:
        unpack(kept[0], net, optimizer)
        start, curve, loss_sum = kept[1]["step"], kept[1]["curve"], kept[0]["loss_sum"].to(compute.device)
    feed = batches(every_u8, _parts(cfg, real, start, per_epoch, batch))
    for step, (index, batch_u8) in zip(range(start, total), feed, strict=True):
        epoch, place = divmod(step, per_epoch)
        images_u8, owners = batch_u8.to(compute.device), labels[index.to(compute.device)]
        stream = generator(cfg.seed, "teacher views", epoch, place)
        views = augment.draw(policy, batch, real.size, stream, source=images_u8.shape[2])
        x_norm = augment.apply(policy, images_u8, views, mean, std)
        lr = cfg.lr * shape(step, total, cfg.warmup)
        set_lr(optimizer, lr)
        net.train()
        with compute.autocast():
            logits = net(x_norm.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), owners, label_smoothing=cfg.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.detach()
        if step % CHECK_EVERY == 0 or place == per_epoch - 1:
            track.finite(float(loss_sum), step, lr=lr, epoch=epoch)
            track.log(step + 1, total, epoch=epoch + 1, loss=round(float(loss.detach()), 4))
        if place == per_epoch - 1:
            right, _ = accuracy(
                net, val_u8, val_labels, lambda x: augment.evaluation_view(x, real.size, mean, std), compute
            )
            curve.append([epoch + 1, right, float(loss_sum) / per_epoch])
            loss_sum.zero_()
            track.note(f"teacher epoch {epoch + 1}/{cfg.epochs}: accuracy {right:.4f}")
            if cfg.stop_at and right >= cfg.stop_at:
                break
        if track.due():
            track.finite(float(loss_sum), step, lr=lr, epoch=epoch)
            track.save(pack(net, optimizer) | {"loss_sum": loss_sum}, {"step": step + 1, "curve": curve})
    track.save(pack(net, optimizer) | {"loss_sum": loss_sum}, {"step": total, "curve": curve})  # the step clears it
    return net, curve


def _parts(cfg: TeacherConfig, real: Real, start: int, per_epoch: int, batch: int) -> Iterator[torch.Tensor]:
    """The images of every step from `start` on, [B] each; an epoch's order depends on nothing but its number."""
    for epoch in range(start // per_epoch, cfg.epochs):
        order = real.order("train", generator(cfg.seed, "teacher order", epoch))[: per_epoch * batch]
        yield from order.split(batch)[start - epoch * per_epoch if epoch * per_epoch < start else 0 :]


def _rows(cfg: TeacherConfig, real: Real) -> list[int]:
    """Which outputs of given weights are the data set's classes, in its order; [] keeps all as they are.

    Raises:
        UserError: a class of the data set is not among the weights' classes.
    """
    given = cfg.classes or pretrained.class_names(cfg.weights, cfg.net)
    if not given or list(given) == list(real.classes):
        return []
    lacking = [name for name in real.classes if name not in given]
    if lacking and not cfg.classes and len(given) == len(real.classes):
        return []  # the same number under other names (wnids, say): the gate tells whether the order fits
    if lacking:
        raise UserError(
            f"teacher.classes: the weights' {len(given)} classes lack {len(lacking)} of the data set's "
            f"{len(real.classes)}: {choices(lacking[:10])}; list the class of each output of the weights, in order, by "
            "the data set's names"
        )
    return [given.index(name) for name in real.classes]
