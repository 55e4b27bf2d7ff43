"""Folders in `scratch/` with what a killed run had finished, named by a hash of all that their content depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from segmentation.errors import PipelineError
from segmentation.scratch_folders import forget_old

KEPT_FOLDERS = 5  # of checkpoints


@contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """A training's folder, held exclusively: killing DVC may leave a process behind that still writes there.

    Raises:
        PipelineError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "owner.json"
    lock = FileLock(folder / "lock", timeout=3)  # a training process whose DVC was killed ends within a second
    try:
        lock.acquire()
    except Timeout:
        try:
            pid = json.loads(owner.read_text())["pid"]
        except (OSError, ValueError, KeyError):
            pid = "unknown"
        raise PipelineError(
            f"train: process {pid} is training exactly this already (same settings, data and code); "
            f"wait for it, or stop it: kill {pid}"
        ) from None
    try:
        owner.write_text(json.dumps({"pid": os.getpid()}))
        os.utime(folder)
        forget_old(folder, KEPT_FOLDERS)
        yield folder
    finally:
        lock.release()


def finished_epochs(checkpoint: Path) -> int:
    """How many epochs the checkpoint holds, 0 without one; a damaged one is put aside, and said."""
    if not checkpoint.exists():
        return 0
    try:
        return len(torch.load(checkpoint, map_location="cpu", weights_only=True)["history"])
    except Exception as error:  # torch raises whatever zipfile, pickle or the disk do
        aside = checkpoint.replace(checkpoint.with_suffix(".damaged"))
        print(f"warning: {checkpoint} is damaged ({error}); kept as {aside.name}, training starts over", flush=True)
        return 0
