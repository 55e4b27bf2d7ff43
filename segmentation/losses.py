"""Training losses over logits `[B, C, H, W]` and masks `[B, H, W]` of class ids, void (255) left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segmentation.voc import VOID


def lovasz_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present in the batch (Berman et al. 2018, algorithm 1 and equation 12).

    Equal to segmentation-models-pytorch's `LovaszLoss("multiclass", ignore_index=255)`, but a batch that is all void
    gives 0 with a zero gradient, and half-precision logits are computed in float32.

    Returns:
        A scalar, float32.
    """
    valid = mask != VOID
    labels = mask[valid]
    probabilities = logits.float().softmax(1).movedim(1, 0)[:, valid]
    present = labels.unique().tolist()
    if not present:
        return probabilities.sum() + logits.float().sum() * 0
    losses = []
    for label in present:
        foreground = labels == label
        errors = (foreground.float() - probabilities[label]).abs()
        errors, order = errors.sort(descending=True)
        losses.append(torch.dot(errors, _jaccard_gradient(foreground[order].float())))
    return torch.stack(losses).mean()


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over labelled pixels, float32; all void gives 0 with a zero gradient, not torch's NaN."""
    total = F.cross_entropy(logits.float(), mask.long(), ignore_index=VOID, reduction="sum")
    return total / (mask != VOID).sum().clamp(min=1)


def _jaccard_gradient(foreground: Tensor) -> Tensor:
    """Gradient of the Jaccard loss's Lovász extension for sorted errors, `[P]`; counts are exact below 2²⁴."""
    total = foreground.sum()
    jaccard = 1 - (total - foreground.cumsum(0)) / (total + (1 - foreground).cumsum(0))
    return torch.diff(jaccard, prepend=jaccard.new_zeros(1))
