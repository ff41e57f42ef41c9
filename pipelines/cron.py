"""Cron as Kubeflow's scheduler reads it: six fields, seconds first, the rules of the Go library robfig/cron v1.

That library also takes five fields, but reads them as seconds to months: people who write the usual five would be
surprised within the hour. So exactly six are taken here. Two more things are refused because readers and the library
disagree about them: a step on the star of one day field beside a restriction in the other, and shorthands such as
@daily.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Dict, FrozenSet, Optional, Tuple

from distillery.errors import UserError, choices

MONTHS = {name: index + 1 for index, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}
DAYS = {name: index for index, name in enumerate("sun mon tue wed thu fri sat".split())}
SHORT = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
HORIZON = 366 * 5  # days; robfig/cron looks no further either


@dataclass(frozen=True)
class Field:
    """What one of the six fields may hold."""

    name: str
    low: int
    high: int
    names: Dict[str, int]


FIELDS = (
    Field("seconds", 0, 59, {}),
    Field("minutes", 0, 59, {}),
    Field("hours", 0, 23, {}),
    Field("day of the month", 1, 31, {}),
    Field("month", 1, 12, MONTHS),
    Field("day of the week", 0, 6, DAYS),
)


@dataclass(frozen=True)
class Cron:
    """A cron expression.

    Attributes:
        text: as written, with single spaces.
        values: the numbers that each field allows.
        any_day: whether the day of the month, and that of the week, is left open.
    """

    text: str
    values: Tuple[FrozenSet[int], ...]
    any_day: Tuple[bool, bool]

    def next(self, after: datetime) -> Optional[datetime]:
        """The first time later than `after` at which it fires, in the zone of `after`; None if there is none."""
        seconds, minutes, hours = (sorted(values) for values in self.values[:3])
        start = after.replace(microsecond=0) + timedelta(seconds=1)
        for days in range(HORIZON):
            day = start.replace(hour=0, minute=0, second=0) + timedelta(days=days)
            if not self._on(day):
                continue
            for hour in hours:
                if days == 0 and hour < start.hour:
                    continue
                for minute in minutes:
                    for second in seconds:
                        found = day.replace(hour=hour, minute=minute, second=second)
                        if found >= start:
                            return found
        return None

    def _on(self, day: datetime) -> bool:
        if day.month not in self.values[4]:
            return False
        of_month, of_week = day.day in self.values[3], day.isoweekday() % 7 in self.values[5]
        return of_month and of_week if any(self.any_day) else of_month or of_week

    @property
    def words(self) -> str:
        """What it means, in English; without the zone."""
        from cron_descriptor import Options, get_description

        options = Options()
        options.verbose, options.use_24hour_time_format = True, True
        said = get_description(" ".join(map(_plain, self.text.split(), self.values, FIELDS)), options)
        return said[:1].lower() + said[1:]


def parse(text: str) -> Cron:
    """Read an expression.

    Raises:
        UserError: not six fields, or one of them is out of its range.
    """
    parts = text.split()
    if text.strip() in SHORT:
        raise UserError(f"cron {text!r}: a shorthand; write {SHORT[text.strip()]!r}")
    if text.strip().startswith("@every"):
        raise UserError(f"cron {text!r}: this is an interval; write interval: {text.split()[-1]}")
    if len(parts) == 5:
        raise UserError(f"cron {text!r}: 5 fields, and Kubeflow wants 6, seconds first{_suggestion(parts)}")
    if len(parts) != len(FIELDS):
        raise UserError(
            f"cron {text!r}: {len(parts)} fields instead of 6 (seconds, minutes, hours, day of the month, month, day "
            "of the week); '0 0 3 * * *' is 03:00 every day"
        )
    read = [_field(part, field, text) for part, field in zip(parts, FIELDS, strict=True)]
    for one, other in ((3, 5), (5, 3)):
        if parts[one][0] in "*?" and len(parts[one]) > 1 and not read[other][1]:
            raise UserError(
                f"cron {text!r}: {parts[one]!r} as {FIELDS[one].name} beside {parts[other]!r} as {FIELDS[other].name} "
                "is read differently by different programs; list the days, or leave one of the two *"
            )
    return Cron(" ".join(parts), tuple(values for values, _ in read), (read[3][1], read[5][1]))


def _plain(part: str, values: FrozenSet[int], field: Field) -> str:
    """A field in a form that the library of words cannot misread: a list with steps becomes a list of numbers."""
    if len(values) == field.high - field.low + 1:
        return "*"
    part = part.replace("?", "*")
    return ",".join(map(str, sorted(values))) if "," in part and ("/" in part or "*" in part) else part


def _suggestion(parts: "list[str]") -> str:
    wanted = " ".join(["0", *parts[:4], {"7": "0"}.get(parts[4], parts[4])])
    try:
        return f"; write {wanted!r} ({parse(wanted).words})"
    except UserError:
        return "; '0 0 3 * * *' is 03:00 every day"


def _field(text: str, field: Field, whole: str) -> Tuple[FrozenSet[int], bool]:
    """The numbers that a field allows, and whether it allows all by a star."""
    values: set[int] = set()
    star = False
    for part in text.split(","):
        span, slash, step = part.partition("/")
        low, dash, high = span.partition("-")
        star = star or span in ("*", "?")
        if span in ("*", "?"):
            first, last = field.low, field.high
        else:
            first = _number(low, field, whole)
            last = _number(high, field, whole) if dash else (field.high if slash else first)
        if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
            raise _wrong(f"the step {step!r}", field, whole)
        if first > last:
            raise _wrong(f"{span!r} runs backwards", field, whole)
        values |= set(range(first, last + 1, int(step) if slash else 1))
    return frozenset(values), star


def _number(text: str, field: Field, whole: str) -> int:
    if text.lower() in field.names:
        return field.names[text.lower()]
    if not (text.isascii() and text.isdigit()) or not field.low <= int(text) <= field.high:
        raise _wrong(repr(text), field, whole)
    return int(text)


def _wrong(what: str, field: Field, whole: str) -> UserError:
    names = f", or {choices(field.names)}" if field.names else ""
    note = "; Sunday is 0" if field.name == "day of the week" else ""
    return UserError(f"cron {whole!r}: {what} as {field.name}; allowed are {field.low} to {field.high}{names}{note}")
