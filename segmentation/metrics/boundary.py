"""Boundary IoU (Cheng et al. 2021, https://arxiv.org/abs/2103.16562): IoU of only what lies near a class's border."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter  # type: ignore[import-untyped]
from torch import Tensor

from segmentation.data.images import Pixels
from segmentation.data.voc import VOID

DILATION = 0.02  # width of the border as a share of the image's diagonal, the paper's


def boundary_counts(prediction: Pixels, truth: Pixels, classes: int) -> Tensor:
    """Intersection and union of the border pixels of each class of one photo; counts of photos add up.

    A class's border is what the paper's `mask_to_boundary` gives for it: its pixels within `DILATION` of the diagonal
    of another class, of void or of the image's edge. What the truth calls void belongs to no class of the prediction
    either, so that a perfect prediction scores 1 whatever it says there.

    Args:
        prediction: `[H, W]` uint8 class ids.
        truth: `[H, W]` uint8 class ids, 255 = void.
        classes: C.

    Returns:
        `[2, C]` int64 pixel counts.
    """
    height, width = truth.shape
    distance = max(1, round(DILATION * float(np.hypot(height, width))))
    predicted = np.where(truth == VOID, np.uint8(VOID), prediction)
    true_border, predicted_border = _near_border(truth, distance), _near_border(predicted, distance)
    both = true_border & predicted_border & (truth == predicted)
    hits, wanted, found = (
        np.bincount(labels, minlength=VOID + 1)[:classes]
        for labels in (truth[both], truth[true_border], predicted[predicted_border])
    )
    return torch.from_numpy(np.stack([hits, wanted + found - hits]))


def boundary_iou(counts: Tensor) -> Tensor:
    """Boundary IoU per class from `[2, C]` counts, `[C]` float64; NaN for a class absent from truth and prediction."""
    intersection, union = counts.double()
    return intersection / union


def _near_border(labels: Pixels, distance: int) -> NDArray[np.bool_]:
    """Where the square of `distance` around a pixel holds another label or leaves the image.

    That is what `distance` erosions by 3×3 take away, of all classes at once.
    """
    side = 2 * distance + 1
    lowest, highest = (
        extreme(labels, side, mode="constant", cval=VOID) for extreme in (minimum_filter, maximum_filter)
    )
    return lowest != highest
