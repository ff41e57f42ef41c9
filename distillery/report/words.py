"""Numbers in words, for people."""

from __future__ import annotations

from distillery import console

NOTHING = "\u2013"


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes in the units of everything else that Distillery prints."""
    return NOTHING if count is None else console.size(count)


def signed(points: float) -> str:
    """Points with a sign, and a true minus."""
    return f"{points:+.2f}".replace("-", "\u2212")


def rate(per_second: float | None) -> str:
    """How many a second, with the digits that matter."""
    if per_second is None:
        return NOTHING
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"
