"""Processes for work that Python threads would do one at a time."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def process_pool(tasks: int) -> tuple[ProcessPoolExecutor, int]:
    """A pool on all cores that this process may use, of no more workers than tasks; and the number of workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, 32, tasks))
    # forkserver: a forked copy of a process with threads may hang
    return ProcessPoolExecutor(workers, mp_context=get_context("forkserver")), workers
