"""Work on several items by threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_MOST = 16  # threads: each holds a batch of pictures


def n_threads() -> int:
    """Of this process: the cores that it may use, shared with the other ranks on its machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(min(cores // max(ranks, 1), _MOST), 1)


def ahead(function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """`map(function, items)`, computed ahead by threads: no more than one item for each and one.

    Args:
        function: Threads call it together.
        items: Read by the caller's thread.
        threads: 1: nothing is computed ahead.

    Raises:
        Exception: What `function` raises, at the place of its item; those after it are given up.
    """
    if threads < 2:
        yield from map(function, items)
        return
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="iimm") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
