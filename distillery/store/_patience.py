"""HTTP that outlives an outage: every request is repeated until it gets a real answer or patience runs out.

Repeated: no connection, a broken or silent one, 408, 429, 500, 502, 503 (SlowDown), 504. Not repeated: every other
answer, because asking again would not change it, and a certificate that cannot be trusted.
Each part of a large file is a request of its own, so an outage costs at most the parts in flight.

Patience is counted from the last sign of life. A line that is slow but moves is not given up; one that is dead is,
also when it was open before: no single wait is longer than half the patience, or than what is left of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, TimeoutError

from distillery.store import _crew

TRANSIENT = {408, 429, 500, 502, 503, 504}
LONGEST = 840.0  # seconds: a signed request is accepted for 15 minutes only
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 8.0  # seconds, doubled from try to try, with jitter
HOPELESS = 30.0  # seconds after giving up in which one more failure is enough
CONNECT, SILENCE = 10.0, 60.0  # seconds for a connection, and without a byte on one that is open
SENT = 1 << 18  # bytes that are sent in one go

log = logging.getLogger(__name__)
_heard: contextvars.ContextVar[float] = contextvars.ContextVar("heard", default=0.0)


class GaveUp(Exception):
    """No answer within the patience; the text is the last cause."""


class Untrusted(Exception):
    """TLS failed in a way that repeating cannot cure."""


@contextlib.contextmanager
def heard_at(moment: float) -> Iterator[None]:
    """Requests in the block go on with a transfer whose server was last heard then (`time.monotonic`)."""
    before = _heard.set(moment)
    try:
        yield
    finally:
        _heard.reset(before)


class PatientPool(urllib3.PoolManager):
    """A connection pool that repeats what can pass.

    Args:
        patience: seconds from the last sign of life to giving up; at most 840 count.
        options: urllib3's own.
    """

    def __init__(self, patience: float, **options: Any) -> None:
        super().__init__(blocksize=SENT, **options)
        self.patience = min(patience, LONGEST)
        self._gave_up = self._warned = -HOPELESS

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = True, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        """urllib3's, but patient.

        Raises:
            GaveUp: still no answer. Untrusted: a certificate problem.
        """
        body = options.pop("body", None)
        heard, pause, first, cause = _heard.get() or time.monotonic(), FIRST_PAUSE, True, ""
        while True:
            # A stream is sent in blocks, each with its own timeout, so a slow line is not taken for a dead one.
            stream = _Noted(body) if body else body
            left = heard + self.patience - time.monotonic()
            try:
                answer = super().urlopen(
                    method, url, redirect=False, retries=False, body=stream, timeout=self._limits(left), **options
                )
                cause = _complaint(answer)
                if not cause:
                    self._gave_up = -HOPELESS
                    return answer
            except HTTPError as error:
                hurried = isinstance(error, TimeoutError) and left < self.patience / 2  # the server had little time
                cause = cause if cause and hurried else _reason(error)
            if first and isinstance(stream, _Noted):
                heard = max(heard, stream.asked)  # later tries may fill a buffer that nobody empties
            first = False
            self.wait(url, cause, heard, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def wait(self, url: str, cause: str, heard: float, pause: float) -> None:
        """Wait before the next try.

        Raises:
            GaveUp: the server was last heard too long ago, or nobody wants the answer any more.
        """
        now = time.monotonic()
        left = heard + self.patience - now
        if left <= 0 or now - self._gave_up < HOPELESS:
            self._gave_up = now
            raise GaveUp(cause)
        self._warn(url, cause, left)
        if _crew.pause(min(left, pause * _jitter())):
            raise GaveUp(cause)

    def _limits(self, left: float) -> urllib3.Timeout:
        longest = max(0.05, min(self.patience / 2, left))
        return urllib3.Timeout(connect=min(CONNECT, longest), read=min(SILENCE, longest))

    def _warn(self, url: str, cause: str, left: float) -> None:
        if time.monotonic() - self._warned > HOPELESS:
            self._warned = time.monotonic()
            log.warning("%s does not answer (%s); trying again for up to %.0f s", url.partition("?")[0], cause, left)


class _Noted(io.BytesIO):
    """A request's body that knows when more of it was last asked for, which is when the line last took something."""

    asked = 0.0

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes."""
        self.asked = time.monotonic()
        return super().read(size)


def _jitter() -> float:
    """0.5 to 1, so that many clients do not come back at the same moment."""
    return 0.5 + os.urandom(1)[0] / 510


def _complaint(answer: urllib3.BaseHTTPResponse) -> str:
    """The cause when an answer means "later"; empty for a real answer."""
    if answer.status not in TRANSIENT and answer.status != 400:
        return ""
    found = re.search(rb"<Code>([^<]*)</Code>", answer.data)
    code = found[1].decode(errors="replace") if found else ""
    if answer.status == 400 and code != "RequestTimeout":  # S3's word for a connection that stalled
        return ""
    answer.release_conn()
    return f"HTTP {answer.status} {code}".strip()


def _reason(error: HTTPError) -> str:
    """The cause of a failed exchange, in one line."""
    inner = error.args[0] if error.args else None
    if isinstance(inner, ssl.SSLCertVerificationError) or getattr(inner, "reason", "") == "WRONG_VERSION_NUMBER":
        raise Untrusted(str(inner)) from error
    return f"{type(error).__name__}: {error}"
