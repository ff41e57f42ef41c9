"""RDED's selection, shared with the methods that start from its patches: score crops, rank them, tile them.

Equations and sources: see `rded.py`.

Legend: P real images of a class, m crops of each, N tiles per image, K ipc, S side, s = S / factor side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, PlainValidator
from torch import Tensor
from torch.nn.functional import pad

from distillery import config
from distillery.config import Count
from distillery.data import TENSOR_SIDE
from distillery.data.augment import TRIES
from distillery.errors import UserError, choices
from distillery.methods import _selection
from distillery.methods._contract import Teacher
from distillery.methods._crops import boxes_of, crops
from distillery.rng import generator

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

SMALLEST_AREA = 0.08  # of the real image: torchvision's RandomResizedCrop
PHOTOS_AT_ONCE = 16  # originals held in memory: a few megapixels each
PIXELS_AT_ONCE = 64  # small images scored between two looks at the clock (more where the batch is larger)


def _count_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"expected auto or a whole number from 1, not {type(value).__name__}")


CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]  # a plain union would report two faults


class Options(config.Options):
    """Options of the selection, under the names of RDED's official code."""

    mipc: Count = Field(300, description="real images looked at per class (paper: 300)")
    num_crop: int = Field(5, ge=1, le=1000, description="random crops of each real image (paper: 5)")
    factor: CountOrAuto = Field(
        "auto", description="patches along a side of an image; auto: 1 up to 64 px, 2 above (paper: the same)"
    )
    patches_per_image: CountOrAuto = Field(
        1, description="best crops kept of each real image; auto: as many as IPC needs (paper: 1)"
    )


def tiles_along(cfg: Options, size: int) -> int:
    """The factor: patches along a side of an image of `size` px."""
    if cfg.factor != "auto":
        return cfg.factor
    return 1 if size <= TENSOR_SIDE else 2


def kept_per_image(cfg: Options, patches: int, images: int) -> int:
    """Crops kept of each of P `images` so that there are `patches` of them."""
    return max(1, -(-patches // images)) if cfg.patches_per_image == "auto" else cfg.patches_per_image


def check(method: str, cfg: Options, *, ipc: int, size: int, per_class: list[int] | None) -> None:
    """Refuse what cannot give IPC * N patches of each class.

    Raises:
        UserError: names the numbers and the ways out.
    """
    factor = tiles_along(cfg, size)
    if size % factor:
        fitting = [n for n in range(1, 9) if size % n == 0]
        raise UserError(
            f"{method}: factor {factor} does not divide the image side {size}; take one of {choices(fitting)}"
        )
    if cfg.patches_per_image != "auto" and cfg.patches_per_image > cfg.num_crop:
        raise UserError(
            f"{method}: patches_per_image {cfg.patches_per_image} is more than num_crop {cfg.num_crop}; raise num_crop "
            "or lower patches_per_image"
        )
    if per_class is None:
        _check_class(method, cfg, ipc, factor, cfg.mipc, f"mipc {cfg.mipc}")
    for cls, count in enumerate(per_class or []):
        few = f"the {count} training images of class {cls} (mipc {cfg.mipc})"
        _check_class(method, cfg, ipc, factor, min(cfg.mipc, count), few if count < cfg.mipc else f"mipc {cfg.mipc}")


def _check_class(method: str, cfg: Options, ipc: int, factor: int, images: int, said: str) -> None:
    """Refuse when P `images`, which `said` names, give fewer than IPC * N patches."""
    tiles = factor**2
    patches = ipc * tiles
    needed, kept = -(-patches // max(1, images)), min(kept_per_image(cfg, patches, max(1, images)), cfg.num_crop)
    if patches <= images * kept:
        return
    ways = [f"raise mipc to {patches}" if images == cfg.mipc else "give the class more images"]
    ways += [f"set patches_per_image to {needed}"] if cfg.patches_per_image != "auto" else []
    ways += [f"set num_crop to {needed}"] if needed > cfg.num_crop else []
    ways += [f"lower ipc to {images * kept // tiles}"] if images * kept >= tiles else []
    raise UserError(
        f"{method}: ipc {ipc} x {tiles} patches = {patches} patches per class, but {said} x {kept} patches_per_image "
        f"give {images * kept}; {' or '.join(ways)}"
    )


def forwards(cfg: Options, classes: int, train: int) -> int:
    """Crops that the teacher scores: `mipc` * `num_crop` per class, or fewer where a class has fewer images."""
    return min(classes * cfg.mipc, train or classes * cfg.mipc) * cfg.num_crop


@dataclass(frozen=True)
class Draws:
    """The random numbers of one class.

    Attributes:
        order: [P] int64, the real images in the order they were drawn.
        area: [P, m, TRIES] float64, relative areas of the attempts at a crop.
        place: [P, m, 2] float64 in [0, 1), where a crop lies (vertically, horizontally).
    """

    order: Tensor
    area: Tensor
    place: Tensor


def draw(cfg: Options, seed: int, cls: int, count: int) -> Draws:
    """Draw which of a class's `count` real images are looked at, and their crops."""
    stream = generator(seed, "rded", cls)
    order = torch.randperm(count, generator=stream)[: cfg.mipc]
    area = torch.rand(len(order), cfg.num_crop, TRIES, generator=stream, dtype=torch.float64)
    place = torch.rand(len(order), cfg.num_crop, 2, generator=stream, dtype=torch.float64)
    return Draws(order, SMALLEST_AREA + (1 - SMALLEST_AREA) * area, place)


def score(scorer: _selection.Scorer, cut: Tensor, cls: int, size: int) -> Tensor:
    """Scores of crops: normalised, zero-padded centrally to S x S (so with the mean colour), -log softmax(T)_cls.

    Args:
        scorer: the teacher.
        cut: [B, 3, s, s] float32 in 0..255.
        cls: the class.
        size: S.

    Returns:
        [B] float32 on the CPU; low is realistic.
    """
    before = (size - cut.shape[-1]) // 2
    after = size - cut.shape[-1] - before
    x_norm = pad(scorer.teacher.normalise(cut / 255), [before, after, before, after])
    return scorer.losses(x_norm, cls)


def choose(scores: Tensor, patches: int, per_image: int, medium: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The best `per_image` crops of each image, then the best `patches` of those; equal scores keep their order.

    Args:
        scores: [P, m].
        patches: how many to keep, at most P * per_image.
        per_image: at most m.
        medium: take those in the middle of the ranking and not the best.

    Returns:
        Image index, crop index and score of each patch, best first: each [patches].
    """
    best = scores.sort(dim=1, stable=True)
    values, which = best.values[:, :per_image], best.indices[:, :per_image]
    ranked = values.flatten().sort(stable=True)
    start = (len(ranked.indices) - patches) // 2 if medium else 0
    place = ranked.indices[start : start + patches]
    return place // per_image, which.flatten()[place], ranked.values[start : start + patches]


def mosaic(patches: Tensor, ipc: int, factor: int) -> Tensor:
    """Tile ranked patches: image i gets the patches ranked i, K + i, 2K + i, ... row by row.

    Args:
        patches: [K * N, 3, s, s], best first.
        ipc: K.
        factor: tiles along a side.

    Returns:
        [K, 3, S, S].
    """
    side = patches.shape[-1]
    tiles = patches.view(factor, factor, ipc, 3, side, side).permute(2, 3, 0, 4, 1, 5)
    return tiles.reshape(ipc, 3, factor * side, factor * side)


@dataclass(frozen=True)
class Patches:
    """What was selected of some classes, class after class.

    Attributes:
        images_u8: [C * K, 3, S, S].
        sources: [C * K, N] place of each tile's real image in its class.
        boxes: [C * K, N, 4] top, left, height, width there.
        scores: [C * K, N] cross-entropy of each tile.
    """

    images_u8: Tensor
    sources: Tensor
    boxes: Tensor
    scores: Tensor


def select(
    method: str,
    cfg: Options,
    real: Real,
    teacher: Teacher,
    *,
    ipc: int,
    seed: int,
    classes: Sequence[int],
    track: Track,
    medium: bool = False,
) -> Patches:
    """Select and tile patches of each class: the most realistic ones, or those around the median of the ranking.

    The checkpoint stays: the images made of it are not written yet.

    Raises:
        UserError: not enough patches, or a teacher for other data.
        NonFiniteLoss: the teacher gives NaN.
    """
    counts = real.counts("train")
    check(method, cfg, ipc=ipc, size=real.size, per_class=counts)
    if cfg.mipc > max(counts):
        track.note(f"{method}: mipc {cfg.mipc} is more than any class has ({max(counts)}): every image is looked at")
    scorer, pool = _selection.scorer(teacher, real), _Pool(cfg, real, seed)
    side = real.size // tiles_along(cfg, real.size)

    def score_unit(unit: _selection.Unit) -> Tensor:
        images, boxes, _ = pool.read(unit.cls, torch.arange(unit.start, unit.stop))
        cut = crops(images, boxes, side, teacher.compute.device)
        return score(scorer, cut, unit.cls, real.size).view(-1, cfg.num_crop)

    step = PHOTOS_AT_ONCE if real.kind == "photos" else max(PIXELS_AT_ONCE, scorer.batch // cfg.num_crop)
    work = _selection.units([(cls, min(cfg.mipc, counts[cls])) for cls in classes], step)
    scores = _selection.score_all(work, score_unit, track)
    made = [_render(cfg, pool, cls, scores[cls], ipc, medium) for cls in classes]
    return Patches(*(torch.cat(part) for part in zip(*made, strict=True)))


class _Pool:
    """Drawn images of each class with their boxes: out of the tensor of small images, or read photo by photo."""

    def __init__(self, cfg: Options, real: Real, seed: int) -> None:
        self.cfg, self.real, self.seed = cfg, real, seed
        self.small = _selection.by_class(real) if real.kind == "pixels" else []
        self._drawn: tuple[int, Draws] | None = None

    def drawn(self, cls: int) -> Draws:
        """The class's random numbers; the last class's are kept, since classes come one after another."""
        if self._drawn is None or self._drawn[0] != cls:
            self._drawn = (cls, draw(self.cfg, self.seed, cls, self.real.counts("train")[cls]))
        return self._drawn[1]

    def read(self, cls: int, rows: Tensor) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        """Images of some rows of the draw, their boxes [rows, m, 4] and their places in the class [rows]."""
        drawn = self.drawn(cls)
        picked = drawn.order[rows]
        if self.small:
            images: Tensor | list[Tensor] = self.small[cls][picked]
            sides = torch.tensor([self.small[cls].shape[2:]]).expand(len(rows), 2)
        else:
            images = self.real.read("train", cls, picked.tolist())
            sides = torch.tensor([image.shape[1:] for image in images])
        return images, boxes_of(drawn.area[rows], drawn.place[rows], sides[:, 0], sides[:, 1]), picked


def _render(
    cfg: Options, pool: _Pool, cls: int, scores: Tensor, ipc: int, medium: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [K, 3, S, S] uint8 of one class, and sources [K, N], boxes [K, N, 4] and scores [K, N] of their tiles."""
    size = pool.real.size
    factor = tiles_along(cfg, size)
    patches = ipc * factor**2
    image, crop, kept = choose(scores, patches, kept_per_image(cfg, patches, len(scores)), medium)
    cut, boxes, sources = [], [], []
    for rows, which in zip(image.split(PHOTOS_AT_ONCE), crop.split(PHOTOS_AT_ONCE), strict=True):
        originals, candidates, places = pool.read(cls, rows)
        own = candidates[torch.arange(len(rows)), which]
        cut.append(crops(originals, own[:, None], size // factor, torch.device("cpu")))
        boxes.append(own)
        sources.append(places)
    images_u8 = mosaic(torch.cat(cut), ipc, factor).round_().clamp_(0, 255).to(torch.uint8)
    ranked = (torch.cat(sources), torch.cat(boxes), kept)
    by_tile = [part.unflatten(0, (factor**2, ipc)).transpose(0, 1) for part in ranked]
    return images_u8, by_tile[0], by_tile[1], by_tile[2]
