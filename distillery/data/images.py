"""All images of a split, held in memory or decoded when they are looked at, and in which order an epoch takes them.

Both kinds are indexed alike and give the same bytes, so how large a machine is changes no result.

Legend: N images, B batch, R side.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distillery.device import Compute

WHOLE = 131_072  # sets up to here are shuffled as a whole
REACH = 32_768  # larger ones: how far in its epoch an image may move from its block's place
NEAR = 3  # a GPU holds all images when it has this many times their bytes: they are there twice while they are copied


class Lazy:
    """Images that are decoded when they are indexed: stands where a uint8 tensor [N, 3, R, R] would."""

    def __init__(self, decode: Callable[[Iterable[int]], Generator[Tensor]], places: range, side: int) -> None:
        self._decode, self._places, self._side = decode, places, side

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, 3, R, R]."""
        return len(self._places), 3, self._side, self._side

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return len(self._places) * 3 * self._side**2

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Images [n, 3, R, R] of some places."""
        chosen = self._places[index] if isinstance(index, slice) else [self._places[i] for i in index.tolist()]
        with contextlib.closing(self._decode(chosen)) as found:
            images = list(found)
        return torch.stack(images) if images else torch.empty(0, 3, self._side, self._side, dtype=torch.uint8)

    def split(self, counts: Sequence[int]) -> list[Lazy]:
        """Consecutive parts, still undecoded."""
        ends = list(itertools.accumulate(counts))
        spans = zip([0, *ends], ends, strict=False)
        return [Lazy(self._decode, self._places[start:end], self._side) for start, end in spans]

    def batches(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `batches`; later parts are decoded while an earlier one is in use."""
        asked: deque[Tensor] = deque()

        def places() -> Iterator[int]:
            for part in parts:
                asked.append(part)
                yield from (self._places[i] for i in part.tolist())

        with contextlib.closing(self._decode(places())) as found:
            for first in found:
                part = asked.popleft()
                yield part, torch.stack([first, *itertools.islice(found, len(part) - 1)])


Images = Tensor | Lazy


def near(images: Images, compute: Compute) -> Images:
    """All images on the device, channels last, where they fit; else as they are."""
    if isinstance(images, Lazy):
        return images
    if compute.device.type == "cuda":
        memory = torch.cuda.get_device_properties(compute.device).total_memory
        return compute.images(images) if NEAR * images.nbytes <= memory else images
    return compute.images(images)


def batches(images: Images, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each part (int64 indices [B], not empty) the part and its images [B, 3, R, R], where the images are."""
    if isinstance(images, Lazy):
        yield from images.batches(parts)
    else:
        for part in parts:
            yield part, images[part.to(images.device)]


def shuffled(runs: Sequence[int], count: int, stream: torch.Generator) -> Tensor:
    """The order of one epoch: every image once, [N] int64.

    A small set is permuted as a whole. A large one would then ask for another block of a shard with every image, so its
    blocks are permuted, and each image then moves by a random number of places, at most `REACH`: one batch sees the
    images of a thousand blocks, and a block is needed only for a short part of the epoch.

    Args:
        runs: images of each block, in file order; () where reading one image costs the same as reading its neighbour.
        count: N.
        stream: of the draw.
    """
    if not runs or count <= WHOLE:
        return torch.randperm(count, generator=stream)
    sizes = torch.tensor(runs)
    starts = sizes.cumsum(0) - sizes
    drawn = torch.randperm(len(runs), generator=stream)
    lengths = sizes[drawn]
    inside = torch.arange(count) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    files = starts[drawn].repeat_interleave(lengths) + inside
    moved = torch.arange(count) + REACH * torch.rand(count, generator=stream, dtype=torch.float64)
    return files[moved.argsort()]
