"""Every error a user can meet.

    DistilleryError                 exit 1: something failed that the user need not have caused
    +-- UserError (ValueError)      exit 2: the user's mistake; the message says what to change
    |   +-- GateError               the teacher is worse than it must be, so nothing more is spent
    |   +-- StoreRefused            the object store is there and says no: wrong keys, no such bucket, not allowed
    +-- StoreError                  the object store did not answer, or not as it should
    +-- CorruptArtifact             an artifact is unfinished, too new, or its bytes changed
    +-- NonFiniteLoss               a loss became NaN or infinite

A message names the thing, shows the value and says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistilleryError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the process's exit status."""

    exit_code = 1


class UserError(DistilleryError, ValueError):
    """A mistake the user can correct."""

    exit_code = 2


class GateError(UserError):
    """A teacher that fails its accuracy gate."""


class StoreRefused(UserError):
    """An object store that answers, and does not let this process in: a mistake in keys, names, rights or settings."""


class StoreError(DistilleryError):
    """An object store or disk that failed after all retries."""


class CorruptArtifact(DistilleryError):
    """An artifact that must not be believed."""


class NonFiniteLoss(DistilleryError):
    """A loss that is NaN or infinite."""


def choices(allowed: Iterable[object]) -> str:
    """The allowed values as one readable list."""
    return ", ".join(str(a) for a in allowed)


def nearest(name: object, allowed: Iterable[object]) -> str:
    """`"; did you mean 'x'?"` for a near miss, else an empty string."""
    found = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
