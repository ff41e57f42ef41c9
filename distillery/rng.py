"""Random streams: one independent generator per purpose, derived from a seed and a path of names."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, so that streams never overlap by accident."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for one purpose, for example `generator(seed, "crops", cls)`.

    Streams are addressed, not consumed in order: a resumed loop or a single class asks for the same
    address and gets the same numbers.
    """
    return torch.Generator().manual_seed(derived_seed(*parts))


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """A block whose global torch draws come from one address, for initialisers that take no generator.

    The global state is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(*parts))  # noqa: TID251 - the one place where it is fenced in
        yield
