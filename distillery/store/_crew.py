"""Several pieces of work at a time, where the first failure abandons the rest.

Work that waits asks here whether it should: a transfer that fails, or Ctrl-C, ends the waiting of its own pieces and
of no other transfer.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

POLL = 0.05  # seconds between two looks at whether to go on waiting

Item = TypeVar("Item")
Result = TypeVar("Result")

_stops: contextvars.ContextVar[tuple[threading.Event, ...]] = contextvars.ContextVar("stops", default=())


def abandoned() -> bool:
    """Whether what this thread works on is not wanted any more."""
    return any(stop.is_set() for stop in _stops.get())


def pause(seconds: float) -> bool:
    """Sleep; whether that was cut short because the work is abandoned."""
    until = time.monotonic() + seconds
    while not abandoned():
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(POLL, left))
    return True


@contextlib.contextmanager
def together(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[list[Future[Result]]]:
    """Run `work` on each item in `pool`; gives the futures, in order.

    Nothing runs any more when the block is left: if it is left by an exception, what has not begun never does, and
    what waits stops waiting.
    """
    stop = threading.Event()
    outer = _stops.set((*_stops.get(), stop))
    try:
        futures = [pool.submit(contextvars.copy_context().run, work, item) for item in items]
    finally:
        _stops.reset(outer)
    try:
        yield futures
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise
    finally:
        wait(futures)
