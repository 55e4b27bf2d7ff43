"""Threads for work that releases Python's lock: Pillow's decoding, resizing and encoding, and hashing."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor


def thread_pool(tasks: int) -> tuple[ThreadPoolExecutor, int]:
    """A pool on all cores that this process may use, of no more workers than tasks; and the number of workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, 32, tasks))
    return ThreadPoolExecutor(workers), workers
