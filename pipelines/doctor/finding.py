"""What a check found: ok, wrong or skipped, in one line, with what to do about it."""

import enum
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

WIDTH = 22  # of the column that says what was looked at
SHORTEST = 6  # shorter values would be hidden inside ordinary words


class Status(enum.StrEnum):
    """How a check ended. Only `wrong` makes the command fail."""

    ok = "ok"
    wrong = "wrong"
    skipped = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    check: str  # what was looked at
    status: Status
    says: str
    do: str = ""  # empty when there is nothing to do


def ok(check: str, says: str) -> Finding:
    """Nothing to do here."""
    return Finding(check, Status.ok, says)


def wrong(check: str, says: str, do: str) -> Finding:
    """A run would fail, wait for ever, or do something else than meant."""
    return Finding(check, Status.wrong, says, do)


def skipped(check: str, why: str) -> Finding:
    """Not looked at."""
    return Finding(check, Status.skipped, why)


def told(check: str, error: Exception) -> Finding:
    """An error as a finding: the errors of this project end with what to do, after a semicolon."""
    says, _, do = str(error).rpartition("; ")
    return wrong(check, says or do, do if says else "see above")


def hide(finding: Finding, secrets: Iterable[str]) -> Finding:
    """The finding without the secrets' values: a server's error may repeat what it was sent."""
    said, do = finding.says, finding.do
    for value in sorted((s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True):
        said, do = said.replace(value, "(hidden)"), do.replace(value, "(hidden)")
    return Finding(finding.check, finding.status, said, do)


def line(finding: Finding) -> str:
    """As people read it."""
    text = f"{finding.status:<8} {finding.check:<{WIDTH}} {one_line(finding.says)}"
    return f"{text}\n{'->':>{WIDTH + 9}} {one_line(finding.do)}" if finding.do else text


def summary(findings: list[Finding]) -> str:
    """The last line."""
    count = {status: sum(f.status == status for f in findings) for status in Status}
    return f"{count[Status.ok]} ok, {count[Status.wrong]} wrong, {count[Status.skipped]} skipped"


def as_json(findings: list[Finding]) -> str:
    """As programs read it: `ok`, and `checks` with the fields of each finding."""
    fine = not any(f.status == Status.wrong for f in findings)
    return json.dumps({"ok": fine, "checks": [asdict(f) for f in findings]}, indent=1)


def one_line(text: str) -> str:
    """Without line breaks and control characters: servers' messages are shown, never interpreted."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
