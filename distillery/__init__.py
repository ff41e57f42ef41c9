"""Distillery: dataset distillation as an installable, tested, resumable system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillery.distilled import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`distillery.load`, without importing torch for everyone else."""
    if name != "load":
        raise AttributeError(f"module 'distillery' has no attribute {name!r}")
    from distillery.distilled import load

    return load
