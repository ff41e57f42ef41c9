"""How much disk and memory real images may take on this machine. None of it changes a number, only where images wait.

    DISTILLERY_CACHE         folder of the data cache, ~/.cache/distillery when unset; pods of a node may share one
    DISTILLERY_CACHE_BYTES   its size limit, 50Gi when unset; what was not used for longest makes room
    DISTILLERY_MEMORY_BYTES  photos of a split stay decoded up to this size, half of this machine's memory when unset;
                             beyond it they are read and decoded each time they are looked at

Sizes are bytes, or numbers like 500M, 20Gi, 1.5T.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from distillery import console
from distillery.errors import UserError
from distillery.files import cache_root

CACHE, MEMORY = "DISTILLERY_CACHE_BYTES", "DISTILLERY_MEMORY_BYTES"
CACHE_DEFAULT = 50 * 2**30
AHEAD = 256 * 2**20  # bytes of photos decoded ahead of their use
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def cache_bytes() -> int:
    """Size limit of the data cache.

    Raises:
        UserError: the setting is no size.
    """
    return _size(CACHE) or CACHE_DEFAULT


def memory_bytes() -> int:
    """Decoded photos of a split that may be held.

    Raises:
        UserError: the setting is no size.
    """
    return _size(MEMORY) or _memory() // 2


def photo_side(size: int) -> int:
    """Side R of decoded photos that are looked at with side S: a little larger, so that crops have room."""
    return size // 7 * 8


def is_held(nbytes: int) -> bool:
    """Whether a split's photos, `nbytes` when decoded, are decoded once and kept."""
    return nbytes <= min(memory_bytes(), cache_bytes())


def said(train: int, val: int, size: int) -> list[str]:
    """What photos will take here, in words, for `plan`.

    Args:
        train: training photos; 0 when only the folders know.
        val: validation photos.
        size: side S that nets see.
    """
    lines = [f"data cache at most {console.size(cache_bytes())} in {cache_root()} ({CACHE}, DISTILLERY_CACHE)"]
    for name, count in (("training", train), ("validation", val)):
        nbytes = count * 3 * photo_side(size) ** 2
        if not count:
            lines.append(f"{name} photos: as many as the folders hold; kept decoded up to {console.size(_most())}")
        elif is_held(nbytes):
            lines.append(f"{name} photos: {count:,}, decoded once and kept: {console.size(nbytes)} of memory and cache")
        else:
            lines.append(
                f"{name} photos: {count:,}, decoded {console.size(nbytes)}, more than {console.size(_most())} "
                f"({MEMORY}, {CACHE}): decoded each time they are seen, {console.size(AHEAD)} of memory"
            )
    return lines


def _most() -> int:
    return min(memory_bytes(), cache_bytes())


def size_of(text: str, name: str) -> int:
    """Bytes of a size as people write it; 0 for an empty text.

    Raises:
        UserError: it is no size; `name` says where it was given.
    """
    text = text.strip()
    if not text:
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"{name} is {text!r}; give bytes above 0, or a size like 500M or 20Gi")
    return max(1, int(float(found[1]) * _UNITS[found[2]]))


def _size(name: str) -> int:
    return size_of(os.environ.get(name, ""), name)


def _memory() -> int:
    """Bytes this process may use: the container's limit, or the machine's memory."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(name).read_text().strip() for name in _GROUPS if Path(name).is_file()]
    return min([machine, *(int(text) for text in limits if text.isdigit())])
