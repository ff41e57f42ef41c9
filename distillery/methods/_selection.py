"""Shared by the methods that choose among real images: score them with the teacher, batch by batch.

Legend: B batch, N images, C classes, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from distillery.data import augment
from distillery.errors import NonFiniteLoss, UserError
from distillery.methods._contract import Teacher
from distillery.rng import generator

if TYPE_CHECKING:
    from distillery.data.images import Images
    from distillery.data.real import Real
    from distillery.track import Track

# Bytes of the largest activation of one scoring batch. On a CPU more would fall out of the caches (a ConvNet-3 scores
# twice as fast in batches of 32 as of 256); a GPU wants as much as fits beside everything else.
ACTIVATION_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}
UNIT = 256  # images scored between two looks at the clock
ALIVE = 3  # activations of that size alive at once: input, output, and one in flight


@dataclass(frozen=True)
class Scorer:
    """A teacher and the number of images it scores at once."""

    teacher: Teacher
    batch: int

    def losses(self, x_norm: Tensor, cls: int) -> Tensor:
        """Cross-entropy of each image with class `cls`, -log softmax(T(x))_cls (RDED's realism score, negated).

        Args:
            x_norm: [N, 3, S, S].
            cls: class index.

        Returns:
            [N] float32 on the CPU.

        Raises:
            NonFiniteLoss: the teacher gives NaN or infinity.
        """
        parts = [-functional.log_softmax(self.teacher.logits(x), dim=1)[:, cls] for x in x_norm.split(self.batch)]
        found = torch.cat(parts).float().cpu()
        bad = int((~found.isfinite()).sum())
        if bad:
            raise NonFiniteLoss(
                f"the teacher gives {bad} scores of {len(found)} that are not finite for images of class {cls}; check "
                "its weights and its normalisation, or use precision: fp32"
            )
        return found


@dataclass(frozen=True)
class Look:
    """What one image shows of a teacher's nets: bytes of the largest activation and of all of a net together."""

    largest_bytes: int
    all_bytes: int


def look(teacher: Teacher, real: Real) -> Look:
    """Run one blank image through the teacher, and see whether it is for this data set.

    Raises:
        UserError: the teacher is for another image size or number of classes than the data.
    """
    if teacher.size != real.size:
        raise UserError(
            f"the teacher takes images of {teacher.size} px and the data set has {real.size} px; train a teacher on "
            f"this data set, or set dataset.size: {teacher.size}"
        )
    found = []
    for member in teacher.members:
        sizes, outputs = _activations(member, torch.zeros(1, 3, real.size, real.size, device=member.compute.device))
        found.append(sizes)
        if outputs != len(real.classes):
            raise UserError(
                f"the teacher has {outputs} outputs and the data set {len(real.classes)} classes; train a teacher on "
                "this data set"
            )
    return Look(max(max(sizes) for sizes in found), max(sum(sizes) for sizes in found))


def scorer(teacher: Teacher, real: Real) -> Scorer:
    """A scorer whose batches suit the teacher's net and device.

    Raises:
        UserError: the teacher is for another image size or number of classes than the data.
    """
    largest = look(teacher, real).largest_bytes
    return Scorer(teacher, max(1, ACTIVATION_BYTES[teacher.compute.device.type] // largest))


def _activations(teacher: Teacher, x_norm: Tensor) -> tuple[list[int], int]:
    """Bytes of the input and of each layer's output for one image, and the number of the net's outputs."""
    sizes = [x_norm.numel() * x_norm.element_size()]

    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())  # autocast decides the precision layer by layer

    handles = [module.register_forward_hook(hook) for module in teacher.net.modules() if not list(module.children())]
    try:
        outputs = teacher.logits(x_norm).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return [size // len(x_norm) for size in sizes], outputs


@dataclass(frozen=True)
class Unit:
    """Images `start`..`stop` of a class's list: what is scored between two looks at the clock."""

    cls: int
    start: int
    stop: int


def units(counts: Iterable[tuple[int, int]], step: int) -> list[Unit]:
    """Cut (class, number of images) into units of at most `step` images; none spans two classes."""
    return [Unit(cls, at, min(n, at + step)) for cls, n in counts for at in range(0, n, step)]


def score_all(work: Sequence[Unit], score: Callable[[Unit], Tensor], track: Track) -> dict[int, Tensor]:
    """Score every unit, with progress and checkpoints.

    The scores are all the state there is, so a restart costs the units since the last checkpoint and changes nothing.
    The checkpoint stays: the images made of it are not written yet.

    Args:
        work: units in class order.
        score: [stop - start, ...] float32 CPU scores of a unit.
        track: progress and checkpoints.

    Returns:
        The scores of each class, in the order of its images.
    """
    kept = track.load()
    found, done = ([kept[0]["scores"]], int(kept[1]["units"])) if kept else ([], 0)
    total = sum(unit.stop - unit.start for unit in work)
    images = sum(unit.stop - unit.start for unit in work[:done])
    for index, unit in enumerate(work[done:], start=done):
        found.append(score(unit))
        images += unit.stop - unit.start
        track.log(images, total, what="real images scored")
        if track.due():
            found = [torch.cat(found)]
            track.save({"scores": found[0]}, {"units": index + 1})
    counts = {unit.cls: unit.stop for unit in work}  # the last unit of a class ends at its number of images
    return dict(zip(counts, torch.cat(found).split(list(counts.values())), strict=True))


def by_class(real: Real) -> Sequence[Images]:
    """Training images of each class, [n, 3, R, R] uint8: views, or decoded when they are indexed."""
    images_u8, _ = real.images("train")
    return images_u8.split(real.counts("train"))


def around_medians(
    real: Real, teacher: Teacher, classes: Sequence[int], ipc: int, track: Track
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The `ipc` real images of each class around the median of the teacher's probabilities.

    The checkpoint stays: the images made of it are not written yet.

    Returns:
        By class: the places of the chosen images, nearest to the median first, and the scores of all its images.

    Raises:
        UserError: a teacher for other data.
        NonFiniteLoss: the teacher gives NaN.
    """
    scoring, images, counts = scorer(teacher, real), by_class(real), real.counts("train")

    def score(unit: Unit) -> Tensor:
        part = images[unit.cls][unit.start : unit.stop].to(teacher.compute.device)
        return scoring.losses(augment.evaluation_view(part, real.size, teacher.mean, teacher.std), unit.cls)

    scores = score_all(units([(cls, counts[cls]) for cls in classes], UNIT), score, track)
    return {cls: around_median(scores[cls], ipc) for cls in classes}, scores


def around_median(losses: Tensor, ipc: int) -> Tensor:
    """Indices of the `ipc` images around the median, nearest first, alternating below and above it.

    Args:
        losses: [n] -log probability of the true class.
        ipc: at most n.

    Returns:
        [ipc] int64.
    """
    order = losses.sort(descending=True, stable=True).indices  # probability ascending
    middle = len(order) // 2
    steps = [(-(i + 1) // 2 if i % 2 else i // 2) for i in range(len(order))]  # 0, -1, 1, -2, 2, ...
    return order[[middle + step for step in steps][:ipc]]


def draw_real(name: str, real: Real, cls: int, ipc: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct real images of a class, drawn uniformly; those of a smaller `ipc` are the first of a larger one.

    Args:
        name: the method, the address of its random stream.
        real: pixels, or photos, which are resized to a shorter side of S // 7 * 8 and cropped as at evaluation.
        cls: the class.
        ipc: how many.
        seed: of the draw.

    Returns:
        [ipc, 3, S, S] uint8, and their places in the class [ipc] int64.
    """
    chosen = torch.randperm(real.counts("train")[cls], generator=generator(seed, name, cls))[:ipc]
    if real.kind == "pixels":
        return augment.centre_crop(by_class(real)[cls][chosen], real.size).contiguous(), chosen
    return _whole(real, cls, chosen.tolist()), chosen


def random_images(name: str, real: Real, classes: Sequence[int], ipc: int, seed: int) -> dict[int, Tensor]:
    """`draw_real` of several classes: class -> [ipc, 3, S, S] uint8."""
    return {cls: draw_real(name, real, cls, ipc, seed)[0] for cls in classes}


def _whole(real: Real, cls: int, indices: list[int]) -> Tensor:
    """Photos as the evaluation sees them: [n, 3, S, S] uint8."""
    short = real.size // 7 * 8
    from torchvision.transforms.v2 import functional  # here, because the import takes seconds

    resized = [functional.resize(image, [short], antialias=True) for image in real.read("train", cls, indices)]
    return torch.stack([functional.center_crop(image, [real.size, real.size]) for image in resized])


def check_enough(method: str, ipc: int, per_class: list[int] | None) -> None:
    """Refuse an IPC beyond the smallest class.

    Raises:
        UserError: names the class and both numbers.
    """
    if per_class and ipc > min(per_class):
        cls = per_class.index(min(per_class))
        raise UserError(
            f"{method}: ipc {ipc} is more than the {per_class[cls]} real training images of class {cls}; lower ipc to "
            f"at most {per_class[cls]}, or give the class more images"
        )


def scoring_bytes(images: int, size: int) -> int:
    """Memory while `images` images of S x S wait to be scored on a CPU: their floats and the activations."""
    return ALIVE * ACTIVATION_BYTES["cpu"] + 2 * images * 3 * size * size * 4
