"""Threads for work that releases Python's lock: Pillow's decoding, resizing and encoding, and hashing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def thread_pool(tasks: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool on all cores that this process may use, of no more workers than tasks; and the number of workers.

    Whatever ends the block, what has not begun by then never begins: Ctrl-C does not wait for thousands of photos.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, 32, tasks))
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)
