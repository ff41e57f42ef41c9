"""What torchvision downloads, into the local cache or into a root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillery.errors import DistilleryError
from distillery.files import cache_root


def downloads(name: str) -> Path:
    """Where a data set is looked for, and downloaded to, when the experiment names no root."""
    return cache_root() / "downloads" / name


def download(maker: Any, root: Path, **options: Any) -> None:
    """Let a torchvision data set fetch itself, with its checksums.

    Raises:
        DistilleryError: no network, no disk, or bytes that do not fit the checksum.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        maker(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise DistilleryError(
            f"torchvision could not fetch {maker.__name__} into {root}: {' '.join(str(error).split())}; check the "
            "network and the disk, or fetch it elsewhere and set root"
        ) from error
