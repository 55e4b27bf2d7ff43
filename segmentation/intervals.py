"""How far scores would move with other photos: percentile bootstrap (Efron & Tibshirani 1993) over the photos."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
_CHUNK = 2**20  # counts of resampled photos held at a time


def bootstrap_iou(confusions: Tensor, resamplings: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Intervals of the IoU that data sets of N photos, drawn from these with replacement, would give.

    Of each resampled data set the scores are the VOC devkit's (`metrics.class_iou`, `metrics.miou`), but that one which
    drew no photo with a class that these photos do have says nothing about that class: wrong pixels elsewhere would
    make its IoU 0, and the intervals of few photos those of which classes happened to be drawn.

    Args:
        confusions: `[N, C, C]`, one per photo.
        resamplings: how many data sets are drawn.
        seed: of the drawing.

    Returns:
        Low and high end, float64: of the mIoU `[2]`, and of each class's IoU `[2, C]`, NaN for one absent everywhere.
    """
    (iou,) = _resampled_iou([confusions], resamplings, seed)
    return _ends(iou.nanmean(1), LEVEL), _ends(iou, LEVEL)


def bootstrap_iou_difference(
    first: Tensor, second: Tensor, resamplings: int, class_level: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Intervals of what the second model's IoU has over the first's, both scored on the same resampled data sets.

    What makes a data set easy or hard is in both scores and cancels, so these intervals are narrower than the distance
    of two intervals of `bootstrap_iou`.

    Args:
        first: `[N, C, C]`, one per photo.
        second: those of the other model, of the same photos in the same order.
        resamplings: how many data sets are drawn.
        class_level: of the classes' intervals; the mIoU's is `LEVEL`.
        seed: of the drawing.

    Returns:
        Low and high end, float64: of the mIoU's difference `[2]`, and of each class's `[2, C]`, NaN for a class that
        either model's matrices lack.
    """
    before, after = _resampled_iou([first, second], resamplings, seed)
    return _ends(after.nanmean(1) - before.nanmean(1), LEVEL), _ends(after - before, class_level)


def _resampled_iou(stacks: list[Tensor], resamplings: int, seed: int) -> list[Tensor]:
    """IoU `[resamplings, C]` of each stack of confusion matrices, all on the same resampled photos."""
    photos = len(stacks[0])
    parts = []
    for confusions in stacks:
        hits = confusions.diagonal(dim1=-2, dim2=-1)
        truth = confusions.sum(-1)
        parts.append((hits.double(), (truth + confusions.sum(-2) - hits).double(), truth.double()))
    generator = np.random.default_rng(seed)
    drawn: list[list[Tensor]] = [[] for _ in stacks]
    step = max(1, _CHUNK // photos)
    for start in range(0, resamplings, step):
        counts = generator.multinomial(photos, [1 / photos] * photos, size=min(step, resamplings - start))
        times = torch.from_numpy(counts).double()
        for chunks, (hits, unions, truth) in zip(drawn, parts, strict=True):
            missed = (times @ truth == 0) & (truth.sum(0) > 0)
            chunks.append(((times @ hits) / (times @ unions)).masked_fill(missed, torch.nan))
    return [torch.cat(chunks) for chunks in drawn]


def _ends(drawn: Tensor, level: float) -> Tensor:
    """Low and high end `[2, …]` of the middle share `level` of `[resamplings, …]`."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.nanquantile(drawn, ends, dim=0)
