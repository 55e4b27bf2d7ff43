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
    photos = len(confusions)
    hits = confusions.diagonal(dim1=-2, dim2=-1)
    unions = confusions.sum(-1) + confusions.sum(-2) - hits
    hits, unions, truth = hits.double(), unions.double(), confusions.sum(-1).double()
    known = truth.sum(0) > 0
    generator, drawn = np.random.default_rng(seed), []
    step = max(1, _CHUNK // photos)
    for start in range(0, resamplings, step):
        counts = generator.multinomial(photos, [1 / photos] * photos, size=min(step, resamplings - start))
        times = torch.from_numpy(counts).double()
        iou = (times @ hits) / (times @ unions)
        drawn.append(iou.masked_fill(known & (times @ truth == 0), torch.nan))
    iou = torch.cat(drawn)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.nanquantile(iou.nanmean(1), ends), torch.nanquantile(iou, ends, dim=0)
