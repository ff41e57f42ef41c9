"""What the training images look like inside a teacher: statistics that methods match besides BatchNorm's buffers.

    class_bn  mean and variance of the input of every BatchNorm2d, per class (WMDD, arXiv 2311.18531; also LPLD, EDC)
    conv      mean and variance of the input of every Conv2d, per channel and per patch position, averaged over random
              batches of views (G-VBSM, arXiv 2311.17950)

One pass over the images serves every teacher and every kind: images are decoded and moved to the device once. Teachers
run in eval mode and at their own precision; sums are float64.

Legend: B batch, N images, C channels, S side, p side of a patch, P patch positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from distillery.config import ViewPolicy
from distillery.data import TENSOR_SIDE, augment
from distillery.data.images import batches
from distillery.data.real import Real
from distillery.errors import NonFiniteLoss, UserError, choices
from distillery.rng import generator

if TYPE_CHECKING:
    from distillery.teacher import Frozen
    from distillery.track import Track

KINDS = ("class_bn", "conv")
BATCH = 256  # G-VBSM's: its variances are taken inside a batch, so this number is part of their definition
AT_ONCE = {"cpu": 32, "cuda": BATCH}  # images in one forward; changes memory and speed, no result
LOOK_EVERY = 50  # batches between looks for NaN: each look waits for the device
Layer = TypeVar("Layer", bound=nn.Module)


def collect(
    members: Sequence[Frozen], real: Real, kinds: Collection[str], *, seed: int, track: Track
) -> list[dict[str, Tensor]]:
    """Statistics of the training images inside each teacher.

    Args:
        members: the teachers; all take images of the data set's size.
        real: the data set.
        kinds: which of `KINDS`.
        seed: of the order and the views of "conv"; "class_bn" uses no randomness.
        track: progress.

    Returns:
        For each teacher, float32 tensors on the CPU:
        "class_bn/mean", "class_bn/var" [classes, channels of all BatchNorm2d in module order]: evaluation view, biased
        variance over (images of the class, H, W), so that differences between images count;
        "conv/<i>/mean", "conv/<i>/var" [C] and "conv/<i>/patch_mean", "conv/<i>/patch_var" [P] of the i-th Conv2d in
        module order: `channel_moments` and `patch_moments` of batches of 256 in random order under a random view,
        averaged with the batch sizes as weights.

    Raises:
        UserError: a teacher for another image size, one without BatchNorm2d or Conv2d where they are asked for, or a
            class without training images.
        NonFiniteLoss: a teacher gives NaN or infinity; names it and the layer.
    """
    assert set(kinds) <= set(KINDS), f"unknown kinds in {kinds}; known: {choices(KINDS)}"
    _check(members, real)
    images_u8, labels = real.images("train")
    of_classes = [_ClassNorms(member, len(real.classes)) for member in members if "class_bn" in kinds]
    of_views = [_Convs(member, len(labels)) for member in members if "conv" in kinds]
    order = torch.arange(len(labels))
    if of_views:
        order = real.order("train", generator(seed, "statistics", "order"))
    policy, device = view_policy(real), members[0].compute.device
    done = 0
    for number, (index, batch_u8) in enumerate(batches(images_u8, order.split(BATCH))):
        batch_u8, owners = batch_u8.to(device), labels[index].to(device)
        for norms in of_classes:
            norms.add(batch_u8, owners)
        if of_views:
            stream = generator(seed, "statistics", "views", number)
            views = augment.draw(policy, len(index), real.size, stream, source=images_u8.shape[2])
            for convs in of_views:
                convs.add(augment.apply(policy, batch_u8, views, convs.member.mean, convs.member.std))
        done += len(index)
        if number % LOOK_EVERY == 0 or done == len(order):
            for norms in of_classes:
                norms.check()
            for convs in of_views:
                convs.check()
        track.log(done, len(order), what="images seen by the teachers")
    found: list[dict[str, Tensor]] = [{} for _ in members]
    for own, norms in zip(found, of_classes, strict=False):  # no entry for a kind that was not asked for
        own |= {key: value.float().cpu() for key, value in norms.result().items()}
    for own, convs in zip(found, of_views, strict=False):
        own |= {key: value.float().cpu() for key, value in convs.averages.items()}
    return found


def view_policy(real: Real) -> ViewPolicy:
    """The random views of "conv" (G-VBSM's): padded crop and flip up to 64 px, random resized crop and flip above."""
    if real.kind == "photos":
        return ViewPolicy(crop="rrc", crop_scale=(0.08, 1.0))
    return ViewPolicy(crop="pad", crop_pad=8 if real.size >= TENSOR_SIDE else 4)


def patch_side(size: int) -> int:
    """p for images of `size` pixels a side: 4 up to 64 px, 16 above (G-VBSM)."""
    return 4 if size <= TENSOR_SIDE else 16


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: [B, C, H, W] -> [C], [C]; at least float32, differentiable."""
    var, mean = torch.var_mean(_wide(x), (0, 2, 3), correction=0)
    return mean, var


def patch_moments(x: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each p x p patch over (B, C, p, p); at least float32, differentiable.

    A side that is no multiple of p is first resized up to the next one (bilinear, corners not aligned).

    Args:
        x: [B, C, H, W].
        p: side of a patch.

    Returns:
        [P], [P]: positions row by row.
    """
    rows, columns = -(-x.shape[2] // p), -(-x.shape[3] // p)
    if x.shape[2:] != (rows * p, columns * p):
        x = functional.interpolate(_wide(x), size=(rows * p, columns * p), mode="bilinear", align_corners=False)
    wide = torch.promote_types(x.dtype, torch.float32)

    def pooled(each: Tensor) -> Tensor:
        return each.unflatten(2, (columns, p)).unflatten(1, (rows, p)).mean((0, 2, 4)).flatten()

    # First the channels of each pixel (20 times as fast as `var_mean` on a CPU), the rest in float64: the difference
    # of two means of squares loses digits.
    mean = pooled(x.mean(1, dtype=wide).double())
    square = pooled(torch.linalg.vector_norm(x, dim=1, dtype=wide).double().square() / x.shape[1])
    return mean.to(wide), (square - mean.square()).clamp(min=0).to(wide)


class _ClassNorms:
    """Sums over the inputs of one teacher's BatchNorm2d, per class, around the running means (so that squares stay
    small beside what they are subtracted from)."""

    def __init__(self, member: Frozen, classes: int) -> None:
        self.member, self.layers = member, _layers(member, nn.BatchNorm2d, "class_bn")
        shape = [(classes, module.num_features) for _, module in self.layers]
        self.first = [torch.zeros(s, dtype=torch.float64, device=member.compute.device) for s in shape]
        self.second = [torch.zeros_like(first) for first in self.first]
        self.count = [torch.zeros_like(first[:, :1]) for first in self.first]

    def add(self, batch_u8: Tensor, owners: Tensor) -> None:
        """Take up images [B, 3, R, R] of the classes `owners` [B]."""
        step = AT_ONCE[batch_u8.device.type]
        for images, own in zip(batch_u8.split(step), owners.split(step), strict=True):
            x_norm = augment.evaluation_view(images, self.member.size, self.member.mean, self.member.std)
            with _inputs(self.layers, functools.partial(self._see, own)):
                self.member.logits(x_norm)

    def _see(self, owners: Tensor, layer: int, x: Tensor) -> None:
        off = x.float() - self._centre(layer).view(1, -1, 1, 1)
        self.first[layer].index_add_(0, owners, off.sum((2, 3), dtype=torch.float64))
        self.second[layer].index_add_(0, owners, off.square_().sum((2, 3), dtype=torch.float64))
        size = torch.full((len(x), 1), x.shape[2] * x.shape[3], dtype=torch.float64, device=x.device)
        self.count[layer].index_add_(0, owners, size)

    def _centre(self, layer: int) -> Tensor:
        running = self.layers[layer][1].running_mean
        return torch.zeros(1, device=self.first[layer].device) if running is None else running.float()

    def check(self) -> None:
        """Raises NonFiniteLoss at the first layer whose sums are not finite."""
        for (name, _), second in zip(self.layers, self.second, strict=True):
            _check_finite(self.member, name, second)

    def result(self) -> dict[str, Tensor]:
        """See `collect`."""
        means, variances = [], []
        for layer, (first, second, count) in enumerate(zip(self.first, self.second, self.count, strict=True)):
            off = first / count.clamp(min=1)
            means.append(off + self._centre(layer))
            variances.append((second / count.clamp(min=1) - off.square()).clamp(min=0))
        return {"class_bn/mean": torch.cat(means, 1), "class_bn/var": torch.cat(variances, 1)}


class _Convs:
    """Averages over batches of the moments of the inputs of one teacher's Conv2d."""

    def __init__(self, member: Frozen, images: int) -> None:
        self.member, self.images, self.p = member, images, patch_side(member.size)
        self.layers = _layers(member, nn.Conv2d, "conv")
        self.averages: dict[str, Tensor] = {}

    def add(self, x_norm: Tensor) -> None:
        """Take up one batch [B, 3, S, S]; its parts are put together as if it had gone through the net at once.

        A layer that the net runs more than once counts each time, as it does where images are matched.
        """
        batch: dict[str, tuple[Tensor, Tensor]] = {}
        seen = [0] * len(self.layers)

        def see(layer: int, x: Tensor) -> None:
            seen[layer] += len(x)
            for name, moments in ((f"conv/{layer}/", channel_moments(x)), (f"conv/{layer}/patch_", self._patches(x))):
                mean, var = (value.double() for value in moments)
                before = batch.get(name, (0.0, 0.0))
                batch[name] = (before[0] + len(x) * mean, before[1] + len(x) * (var + mean.square()))

        for part in x_norm.split(AT_ONCE[x_norm.device.type]):
            with _inputs(self.layers, see):
                self.member.logits(part)
        share = len(x_norm) / self.images
        for name, sums in batch.items():
            mean, square = (value / seen[int(name.split("/")[1])] for value in sums)
            for key, value in ((name + "mean", mean), (name + "var", (square - mean.square()).clamp(min=0))):
                self.averages[key] = self.averages.get(key, 0.0) + share * value

    def _patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return patch_moments(x, self.p)

    def check(self) -> None:
        """Raises NonFiniteLoss at the first layer whose averages are not finite."""
        for key, value in self.averages.items():
            _check_finite(self.member, self.layers[int(key.split("/")[1])][0], value)


def _check(members: Sequence[Frozen], real: Real) -> None:
    for member in members:
        if member.size != real.size:
            raise UserError(
                f"teacher {member.card.net} takes images of {member.size} px and the data set has {real.size} px; "
                f"train a teacher on this data set, or set dataset.size: {member.size}"
            )
    counts = real.counts("train")
    if 0 in counts:
        raise UserError(
            f"class {counts.index(0)} ({real.classes[counts.index(0)]}) has no training images (of {sum(counts)}), so "
            "it has no statistics; give the class images, or take it out of the data set"
        )


def _layers(member: Frozen, kind: type[Layer], asked: str) -> list[tuple[str, Layer]]:
    """Names and layers of one kind in module order."""
    found = [(name, module) for name, module in member.net.named_modules() if isinstance(module, kind)]
    if not found:
        raise UserError(
            f"teacher {member.card.net} has no {kind.__name__}, and the statistics {asked!r} are of what goes into "
            "those; choose a net with them (a ConvNet with net_options norm: batch, a ResNet), or another method"
        )
    return found


@contextlib.contextmanager
def _inputs(layers: Sequence[tuple[str, Layer]], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """A block in which `see(i, x)` is called with what goes into layer i."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: see(layer, inputs[0])

    handles = [module.register_forward_pre_hook(hook(place)) for place, (_, module) in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(member: Frozen, layer: str, sums: Tensor) -> None:
    bad = int((~sums.isfinite()).sum())
    if bad:
        raise NonFiniteLoss(
            f"teacher {member.card.net}, layer {layer}: {bad} of {sums.numel()} statistics are not finite; check the "
            "teacher's weights and its normalisation, or use precision: fp32"
        )


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
