"""Who holds a lock, and a lock made of one small object in a store without locks.

The holder rewrites its object every few seconds. Whoever finds one that has not changed for a minute (by the server's
clock) takes it over; the object of a process that is seen to be dead is taken over at once. Where the server knows
conditional writes they decide a race; elsewhere the last writer wins, which both sides see by reading back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from distillery.errors import DistilleryError, UserError

BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which the holder is gone
SETTLE = 1.0  # seconds in which a rival's write must have become visible
POLL = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    place: str = ""  # boot and process namespace: where `pid` means something
    token: str = ""  # one per hold
    beats: int = 0

    @classmethod
    def me(cls) -> Holder:
        """This process, now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), os.getpid(), since, _place(), uuid.uuid4().hex)

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """From its bytes; an unknown holder when they cannot be read."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls("(unknown)", 0, "(unknown)")

    def json(self) -> bytes:
        """As bytes."""
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool:
        """Whether this process is known to have ended: only on its own machine can one tell."""
        if self.pid <= 0 or not self.place or self.place != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def conflict(self, what: str) -> UserError:
        """The error for a second process."""
        return UserError(
            f"{what} is in use by process {self.pid} on {self.host} since {self.since}; wait for it, stop it, "
            f"or choose another output (a killed process is forgotten within {STALE:.0f} s)"
        )


@dataclass(frozen=True)
class Seen:
    """A lease object as found."""

    data: bytes
    etag: str
    age: float  # seconds since it was last written, by the server's clock


class Objects(Protocol):
    """What a lease needs of a store."""

    def peek(self, key: str) -> Seen | None: ...
    def claim(self, key: str, data: bytes, replaces: str) -> bool: ...
    def delete(self, key: str) -> None: ...


@contextlib.contextmanager
def lease(objects: Objects, key: str, what: str) -> Iterator[None]:
    """Hold the lock `key` while the block runs.

    Raises:
        UserError: another process holds it (known after one of its signs of life, a few seconds).
    """
    mine = Holder.me()
    _take(objects, key, what, mine)
    done = threading.Event()
    pulse = threading.Thread(target=_beat, args=(objects, key, what, mine, done), daemon=True, name=f"lease {key}")
    pulse.start()
    try:
        yield
    finally:
        done.set()
        pulse.join(BEAT)
        try:
            seen = objects.peek(key)
            if seen is not None and Holder.parse(seen.data).token == mine.token:
                objects.delete(key)
        except DistilleryError as error:
            log.warning("the lock %s stays for %.0f s: %s", what, STALE, error)


def _take(objects: Objects, key: str, what: str, mine: Holder) -> None:
    first = ""
    while True:
        seen = objects.peek(key)
        holder = Holder.parse(seen.data) if seen else None
        if seen and holder and seen.age <= STALE and not holder.is_dead():
            if first and seen.etag != first:
                raise holder.conflict(what)
            first = seen.etag
            time.sleep(POLL)
        elif objects.claim(key, mine.json(), seen.etag if seen else ""):
            time.sleep(SETTLE)
            seen = objects.peek(key)
            if seen is not None and Holder.parse(seen.data).token != mine.token:
                raise Holder.parse(seen.data).conflict(what)
            return


def _beat(objects: Objects, key: str, what: str, mine: Holder, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            seen = objects.peek(key)
            if seen is not None and Holder.parse(seen.data).token != mine.token:
                log.error("lost the lock %s to %s: this process was silent for too long", what, seen.data.decode())
                return
            mine = replace(mine, beats=mine.beats + 1)
            objects.claim(key, mine.json(), seen.etag if seen else "")  # never over who took it since that look
        except DistilleryError as error:
            log.warning("the lock %s could not be renewed: %s", what, error)


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"  # not Linux: no process namespaces either
