"""What every page and status says of a result beside its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def caveat(metrics: Mapping[str, Any]) -> str | None:
    """Why the mIoU of `metrics.json` says little, in a sentence; None where nothing speaks against it."""
    if metrics["classes_shown"] == 1:
        return (
            "This mIoU is of one class alone: the masks of these photos show no other, so it does not say whether the "
            "model tells classes apart."
        )
    return None
