"""Train a student from scratch on a distilled set, and measure it on real images.

The set lies on the device as uint8, views are made there in batches, and the loop looks at its losses only now and
then, because every look waits for the device. The last epoch's accuracy is the result; the best stands beside it.

Legend: N synthetic images, C classes, B batch, S side.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillery import nets
from distillery.config import Recipe, plain
from distillery.data.augment import evaluation_view
from distillery.data.batches import Batch, Batches, Norm
from distillery.data.images import Images, near
from distillery.device import Compute
from distillery.labels import Source
from distillery.rng import derived_seed, seeded
from distillery.track import Track
from distillery.train import Ema, grade, lr_factor, make_optimizer, pack, predictions, set_lr, unpack

if TYPE_CHECKING:
    from distillery.data.synthetic import Synthetic
    from distillery.teacher import Frozen

LOOK = 50  # steps between looks at the losses
SAMPLE = 2000  # validation images behind a point of the early curve
ON_DEVICE = 2**31  # bytes of validation images kept on a GPU


@dataclass(frozen=True)
class Outcome:
    """What became of one student; accuracies are fractions.

    Attributes:
        acc_last: after the last epoch, on all validation images: the result.
        acc_best: the best of the evaluations on all validation images, at epoch `best_epoch`.
        curve: [epoch, accuracy, mean training loss since the point before].
        per_class: accuracy of each class after the last epoch.
        views: images the student was shown.
        predicted: the class given to each validation image after the last epoch.
    """

    acc_last: float
    acc_best: float
    best_epoch: int
    curve: list[list[float]]
    per_class: list[float]
    views: int
    predicted: list[int]


def train(
    net_name: str,
    net_options: Mapping[str, Any],
    recipe: Recipe,
    synthetic: Synthetic,
    labels_source: Source,
    teacher: Frozen,
    real_val: tuple[Images, Tensor],
    *,
    seed: int,
    compute: Compute,
    track: Track,
    keep: Callable[[nn.Module], None] | None = None,
) -> Outcome:
    """Train one student and evaluate it.

    Args:
        net_name, net_options: the architecture; its initial weights depend on the seed alone.
        recipe: resolved.
        synthetic: images_u8 [N, 3, S, S], labels [N], and weights [N] where images count differently.
        labels_source: soft labels (see `labels.open_source`); not asked under hard labels.
        teacher: gives the normalisation.
        real_val: images_u8 [M, 3, R, R] and labels [M] of the validation split (`Real.images`).
        seed: of weights, order and views.
        compute: device and precision.
        track: progress and checkpoints; a training that continues ends as if it had never stopped (bit for bit on CPU).
            The caller clears the checkpoint once the outcome is kept.
        keep: receives the trained net.

    Raises:
        NonFiniteLoss: the training diverged.
    """
    norm = (teacher.mean, teacher.std)
    batches = Batches(synthetic.images_u8, synthetic.labels, recipe, seed, norm, compute, synthetic.weights)
    net = _initial(net_name, net_options, len(teacher.card.classes), teacher.size, seed)
    key = json.dumps([net_name, dict(net_options), plain(recipe), seed, len(synthetic.labels)], sort_keys=True)
    run = _Run(recipe, compute.place(net), batches, labels_source, seed, compute, track, key)
    exam = _Exam(*_near(real_val, compute), synthetic.images_u8.shape[2], norm, compute)
    due = evaluation_epochs(recipe.epochs, recipe.evaluate_every)
    run.resume()
    per_class: list[float] = []
    predicted: list[int] = []
    while run.done < run.total:
        run.step()
        if run.done % run.per_epoch == 0 and (epoch := run.done // run.per_epoch) in due:
            run.look()
            acc, per_class, predicted = exam.grade(run.judged, full=due[epoch])
            run.point(epoch, acc, due[epoch])
            track.log(run.done, run.total, epoch=epoch, accuracy=round(acc, 4))
        if track.due() and run.done < run.total:
            run.save()
    if keep:
        keep(run.judged)
    last, best = run.curve[-1][1], max(run.full, key=lambda point: (point[1], -point[0]))
    views = recipe.epochs * len(synthetic.labels)
    return Outcome(last, best[1], int(best[0]), run.curve, per_class, views, predicted)


def evaluation_epochs(epochs: int, every: int) -> dict[int, bool]:
    """After which epochs (from 1) the student is evaluated, and whether on all validation images.

    An evaluation of 10,000 images costs as much as a hundred training steps. By default six full ones lie in the last
    fifth, as in RDED's protocol, and eight on a sample show the way there; `every` > 0 asks for full ones at that pace.
    The last epoch is always evaluated in full.
    """
    if every:
        return dict.fromkeys([*range(every, epochs, every), epochs], True)
    early = {max(1, round(0.8 * epochs * i / 8)): False for i in range(1, 9)}
    late = {max(1, epochs - round(0.2 * epochs * i / 6)): True for i in range(5, -1, -1)}
    return dict(sorted((early | late).items()))


def loss_of(recipe: Recipe, logits: Tensor, soft: Tensor | None, batch: Batch) -> Tensor:
    """The recipe's loss, a float32 scalar.

    kl: KL(teacher || student) at the temperature, mean over images, times T^2 only with `kl_t2`. mse_ce: mean squared
    difference of logits plus `ce_weight` times CE to the class of the unmixed image (G-VBSM's code). ce: CE, shared
    between both classes of a mixed image. Weights multiply the loss of each image before the mean.

    Args:
        recipe: which loss.
        logits: [B, C] of the student.
        soft: [B, C] teacher logits; None under hard labels.
        batch: gives the classes and the weights.
    """
    each = batch.weights is not None
    cross_entropy = functools.partial(F.cross_entropy, logits, reduction="none" if each else "mean")
    if recipe.loss == "ce":
        loss = cross_entropy(batch.targets)
        if batch.own != 1.0:
            loss = batch.own * loss + (1.0 - batch.own) * cross_entropy(batch.partners)
    elif recipe.loss == "mse_ce":
        assert soft is not None
        squares = F.mse_loss(logits, soft, reduction="none").mean(1) if each else F.mse_loss(logits, soft)
        loss = squares + recipe.ce_weight * cross_entropy(batch.targets)
    else:
        assert soft is not None
        warm = recipe.temperature
        own, wanted = F.log_softmax(logits / warm, 1), F.softmax(soft / warm, 1)
        loss = F.kl_div(own, wanted, reduction="none").sum(1) if each else F.kl_div(own, wanted, reduction="batchmean")
        loss = loss * warm**2 if recipe.kl_t2 else loss
    return loss if batch.weights is None else (batch.weights * loss).mean()


def _initial(name: str, options: Mapping[str, Any], classes: int, size: int, seed: int) -> nn.Module:
    with seeded(seed, "student", name):
        return nets.build(name, classes, size, **options)


def _draws(module: nn.Module) -> bool:
    """Whether a layer draws random numbers; torchvision's is known by name, because importing it takes seconds."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"


def _near(real_val: tuple[Images, Tensor], compute: Compute) -> tuple[Images, Tensor]:
    """Validation images on a GPU when they fit; otherwise batches are sent there one by one."""
    images_u8, labels = real_val
    return (near(images_u8, compute) if images_u8.nbytes <= ON_DEVICE else images_u8), labels


@dataclass(frozen=True)
class _Exam:
    """The validation split and how it is seen."""

    images_u8: Images
    labels: Tensor
    size: int
    norm: Norm
    compute: Compute

    def grade(self, net: nn.Module, full: bool) -> tuple[float, list[float], list[int]]:
        """Accuracy, accuracy per class and predictions: of all images, or an even sample (they are sorted by class)."""
        every = 1 if full else -(-len(self.labels) // SAMPLE)
        view = functools.partial(evaluation_view, size=self.size, mean=self.norm[0], std=self.norm[1])
        predicted = predictions(net, self.images_u8, view, self.compute, every=every)
        return *grade(predicted, self.labels[::every].cpu()), predicted.tolist()


@dataclass
class _Run:
    """A training under way."""

    recipe: Recipe
    net: nn.Module
    batches: Batches
    source: Source
    seed: int
    compute: Compute
    track: Track
    key: str  # of this very run: a checkpoint of another student is not taken up
    done: int = 0
    loss_sum: float = 0.0  # since the last point of the curve
    loss_steps: int = 0
    curve: list[list[float]] = field(default_factory=list)
    full: list[list[float]] = field(default_factory=list)  # [epoch, accuracy] on all validation images

    def __post_init__(self) -> None:
        self.per_epoch = len(self.batches.slices)
        self.total = self.recipe.epochs * self.per_epoch
        self.optimizer = make_optimizer(self.net, self.recipe)
        self.ema = Ema(self.net, self.recipe.ema) if self.recipe.ema else None
        self.noisy = any(map(_draws, self.net.modules()))
        self.losses: list[Tensor] = []  # on the device, since the last look
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.recipe.bn_momentum
        self.net.train()

    @property
    def judged(self) -> nn.Module:
        """The net whose accuracy counts."""
        return self.ema.net if self.ema else self.net

    @property
    def lr(self) -> float:
        """Learning rate of the step to come (or of the last one, at the end)."""
        return self.recipe.lr * lr_factor(self.recipe, min(self.done, self.total - 1) // self.per_epoch)

    def step(self) -> None:
        """One optimiser step."""
        epoch, place = divmod(self.done, self.per_epoch)
        if place == 0:
            set_lr(self.optimizer, self.lr)
        batch = self.batches.get(epoch, place)
        soft = None if self.recipe.regime == "hard" else self.source(epoch, batch)
        with self._noise(epoch, place), self.compute.autocast():
            logits = self.net(batch.x_norm)
        loss = loss_of(self.recipe, logits.float(), soft, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.net)
        self.losses.append(loss.detach())
        self.done += 1
        if self.done % LOOK == 0:
            self.look()
            self.track.log(self.done, self.total, epoch=epoch + 1, loss=round(self.loss_sum / self.loss_steps, 4))

    def look(self) -> None:
        """Fetch the losses since the last look and stop at one that is not a number."""
        first = self.done - len(self.losses)
        for offset, loss in enumerate(torch.stack(self.losses).tolist() if self.losses else []):
            epoch = (first + offset) // self.per_epoch
            self.track.finite(loss, first + offset, lr=self.recipe.lr * lr_factor(self.recipe, epoch), epoch=epoch + 1)
            self.loss_sum += loss
            self.loss_steps += 1
        self.losses.clear()

    def point(self, epoch: int, acc: float, full: bool) -> None:
        """Add a point to the curve."""
        self.curve.append([epoch, acc, self.loss_sum / max(1, self.loss_steps)])
        self.loss_sum, self.loss_steps = 0.0, 0
        if full:
            self.full.append([epoch, acc])

    def save(self) -> None:
        """Write a checkpoint (never one behind a bad loss)."""
        self.look()
        values = {name: getattr(self, name) for name in ("key", "done", "loss_sum", "loss_steps", "curve", "full")}
        self.track.save(pack(self.net, self.optimizer, self.ema), values)

    def resume(self) -> None:
        """Take up this run's own checkpoint, if there is one."""
        kept = self.track.load()
        if kept is None or kept[1].get("key") != self.key:
            return
        unpack(kept[0], self.net, self.optimizer, self.ema)
        for name in ("done", "loss_sum", "loss_steps", "curve", "full"):
            setattr(self, name, kept[1][name])
        set_lr(self.optimizer, self.lr)

    def _noise(self, epoch: int, place: int) -> contextlib.AbstractContextManager[None]:
        """Dropout draws from torch's global stream: address it by the step, and put it back."""
        return _seeded(derived_seed(self.seed, "noise", epoch, place)) if self.noisy else contextlib.nullcontext()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():  # all devices
        torch.manual_seed(seed)  # noqa: TID251 - undone by fork_rng
        yield
