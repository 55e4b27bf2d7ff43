"""Training losses over logits `[B, C, H, W]` and masks `[B, H, W]` of class ids, void (255) left out.

All are computed in float32, whatever the logits' precision, and give 0 with a zero gradient where everything is void.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segmentation.voc import VOID


def lovasz_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present in the batch (Berman et al. 2018, algorithm 1 and equation 12).

    Equal to segmentation-models-pytorch's `LovaszLoss("multiclass", ignore_index=255)`, but for a batch that is all
    void, where that one has no gradient.

    Returns:
        A scalar, float32.
    """
    valid = mask != VOID
    labels = mask[valid]
    probabilities = logits.float().softmax(1).movedim(1, 0)[:, valid]
    present = labels.unique().tolist()
    if not present:
        return _nothing(logits)
    losses = []
    for label in present:
        foreground = labels == label
        errors = (foreground.float() - probabilities[label]).abs()
        errors, order = errors.sort(descending=True)
        losses.append(torch.dot(errors, _jaccard_gradient(foreground[order].float())))
    return torch.stack(losses).mean()


def cross_entropy(logits: Tensor, mask: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, its mean over labelled pixels weighted by `class_weights` `[C]`; torch gives NaN for all void."""
    if not (mask != VOID).any():
        return _nothing(logits)
    return F.cross_entropy(logits.float(), mask.long(), class_weights, ignore_index=VOID)


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """segmentation-models-pytorch's soft Dice loss over the batch: mean over C classes, absent ones counting as 0."""
    from segmentation_models_pytorch.losses import DiceLoss

    return DiceLoss("multiclass", ignore_index=VOID)(logits.float(), mask)


def focal(logits: Tensor, mask: Tensor) -> Tensor:
    """segmentation-models-pytorch's focal loss (γ = 2), one-against-all; that one gives NaN for all void."""
    from segmentation_models_pytorch.losses import FocalLoss

    if not (mask != VOID).any():
        return _nothing(logits)
    return FocalLoss("multiclass", ignore_index=VOID)(logits.float(), mask)


def median_frequency_weights(pixels: Tensor) -> Tensor:
    """Class weights `[C]` float32: the median class frequency over each class's own (Eigen and Fergus 2015).

    A class's frequency is its share of the labelled pixels of those photos that show it.

    Args:
        pixels: labelled pixels of each class in each photo, `[N, C]`; a class without any has weight 0.
    """
    pixels = pixels.double()
    shows = pixels > 0
    frequency = pixels.sum(0) / (shows * pixels.sum(1, keepdim=True)).sum(0)
    median = frequency.nanquantile(0.5)
    return (median / frequency).nan_to_num(0.0).float()


def _nothing(logits: Tensor) -> Tensor:
    return logits.float().sum() * 0


def _jaccard_gradient(foreground: Tensor) -> Tensor:
    """Gradient of the Jaccard loss's Lovász extension for sorted errors, `[P]`; counts are exact below 2²⁴."""
    total = foreground.sum()
    jaccard = 1 - (total - foreground.cumsum(0)) / (total + (1 - foreground).cumsum(0))
    return torch.diff(jaccard, prepend=jaccard.new_zeros(1))
