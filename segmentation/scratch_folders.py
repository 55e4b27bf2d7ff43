"""Folders in `scratch/` that hold what a killed run had finished, each held by a lock while a process works in it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def forget_old(current: Path, kept: int) -> None:
    """Delete all folders beside `current` but the newest, leaving `kept` with it, and those in use."""
    with suppress(FileNotFoundError):  # another process may be tidying up as well
        others = [folder for folder in current.parent.iterdir() if folder != current]
        others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in others[kept - 1 :]:
            with suppress(Timeout, OSError), FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder)
