"""HTTP that outlives an outage: every request is repeated until it gets a real answer or patience runs out.

Repeated: no connection, a broken or silent one, 408, 429, 500, 502, 503 (SlowDown), 504. Not repeated: every other
answer, because asking again would not change it, and a certificate that cannot be trusted.
Each part of a large upload is a request of its own, so an outage costs at most the parts in flight.
"""

from __future__ import annotations

import io
import logging
import os
import re
import ssl
import threading
import time
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

TRANSIENT = {408, 429, 500, 502, 503, 504}
LONGEST = 840.0  # seconds: a signed request is accepted for 15 minutes only
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 8.0  # seconds, doubled from try to try, with jitter
HOPELESS = 30.0  # seconds after giving up in which one more failure is enough

log = logging.getLogger(__name__)


class GaveUp(Exception):
    """No answer within the patience; the text is the last cause."""


class Untrusted(Exception):
    """TLS failed in a way that repeating cannot cure."""


class PatientPool(urllib3.PoolManager):
    """A connection pool that repeats what can pass.

    Args:
        patience: seconds from a request's first failure to giving up; at most 840 count.
        stop: when set, nobody waits any longer.
        options: urllib3's own.
    """

    def __init__(self, patience: float, stop: threading.Event, **options: Any) -> None:
        timeout = urllib3.Timeout(connect=min(10.0, patience), read=min(60.0, patience))
        super().__init__(timeout=timeout, **options)
        self.patience = min(patience, LONGEST)
        self._stop = stop
        self._gave_up = self._warned = -HOPELESS

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = True, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        """urllib3's, but patient.

        Raises:
            GaveUp: still no answer. Untrusted: a certificate problem.
        """
        body = options.pop("body", None)
        first, pause = 0.0, FIRST_PAUSE
        while True:
            try:
                # A stream is sent in blocks, each with its own timeout, so a slow line is not taken for a dead one.
                options["body"] = io.BytesIO(body) if body else body
                answer = super().urlopen(method, url, redirect=False, retries=False, **options)
                cause = _complaint(answer)
                if not cause:
                    self._gave_up = -HOPELESS
                    return answer
            except HTTPError as error:
                cause = _reason(error)
            now = time.monotonic()
            first = first or now
            left = first + self.patience - now
            if left <= 0 or now - self._gave_up < HOPELESS:
                self._gave_up = now
                raise GaveUp(cause)
            self._warn(url, cause, left)
            if self._stop.wait(min(left, pause * _jitter())):
                raise GaveUp(cause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _warn(self, url: str, cause: str, left: float) -> None:
        if time.monotonic() - self._warned > HOPELESS:
            self._warned = time.monotonic()
            log.warning("%s does not answer (%s); trying again for up to %.0f s", url.partition("?")[0], cause, left)


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
