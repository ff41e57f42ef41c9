"""Work on many items in threads, in order, with memory that does not grow with their number.

Threads, not processes: Pillow gives up the interpreter lock while it decodes and resizes, and results need no copying.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
WAITING = 4  # items in flight per worker


def cores() -> int:
    """CPU cores this process may use, at most 16 (beyond that the interpreter lock is the limit)."""
    return min(16, len(os.sched_getaffinity(0)))


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = 0, ahead: int = 0
) -> Generator[Result]:
    """`map(work, items)` in threads: results in the order of the items, `ahead` items in flight (4 per worker if 0)."""
    workers = workers or cores()
    ahead = ahead or WAITING * workers
    flying: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    try:
        for item in items:
            flying.append(pool.submit(work, item))
            if len(flying) >= ahead:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
