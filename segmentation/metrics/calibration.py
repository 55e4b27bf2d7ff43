"""Are pixels that the model is 80 % sure of right in 80 % of the cases? (Guo et al. 2017, arXiv 1706.04599)"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from segmentation.data.voc import VOID

BINS = 15


def reliability_counts(logits: Tensor, mask: Tensor) -> Tensor:
    """Labelled pixels of one photo by the probability of their best class, in `BINS` equal bins; photos add up.

    A bin holds its lower bound and not its upper one, the last bin holds 1 as well.

    Args:
        logits: `[C, H, W]`.
        mask: `[H, W]` class ids on the same device, 255 = void.

    Returns:
        `[3, BINS]` float64: pixels, sum of those probabilities, pixels that are right.
    """
    labelled = mask != VOID
    # on the CPU: a GPU adds them up in another order each time
    confidence = logits.softmax(0).amax(0)[labelled].cpu()
    right = (logits.argmax(0) == mask)[labelled].cpu()
    edges = torch.linspace(0, 1, BINS + 1)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=BINS - 1)
    weights = (torch.ones_like(confidence), confidence, right)
    return torch.stack([torch.bincount(index, weight.double(), minlength=BINS) for weight in weights])


def calibration_error(counts: Tensor) -> float:
    """Expected calibration error: mean over the pixels of their bin's |accuracy − confidence|; NaN without a pixel.

    Args:
        counts: `[3, BINS]`.
    """
    pixels, confidence, right = counts
    return ((right - confidence).abs().sum() / pixels.sum()).item()


def reliability_table(counts: Tensor) -> pd.DataFrame:
    """One row a bin: low, high, pixels, and their mean confidence and accuracy (NaN in an empty bin).

    Args:
        counts: `[3, BINS]`.
    """
    pixels, confidence, right = counts
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "pixels": pixels.long(),
            "confidence": confidence / pixels,
            "accuracy": right / pixels,
        }
    )
