"""Training losses over logits `[B, C, H, W]` and masks `[B, H, W]` of class ids, void (255) left out.

All are computed in float32, whatever the logits' precision, and give 0 with a zero gradient where everything is void.
Of logits that are NaN or infinite the loss is NaN or infinite; nothing is raised, for to look would hold up a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segmentation.data.voc import VOID

BINS = 4096  # of the Lovász loss's errors


def lovasz_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Lovász-Softmax over the classes present in the batch (Berman et al. 2018, algorithm 1 and equation 12).

    It is the errors times weights held constant, a class's weights being what sorted errors add to its Jaccard loss one
    after the other. Instead of sorting, errors are counted in `BINS` bins. A bin adds ((S − f̄) n + (S + b̄) m) /
    ((S + b) (S + b + n)) exactly, with S the class's foreground, n background and m foreground pixels in the bin, b
    background pixels of larger error, f̄ and b̄ foreground and background pixels of larger error and half the bin's own;
    so each of its pixels gets (S − f̄) or (S + b̄) over the denominator. Only the order within a bin is lost: a class's
    loss is off by less than 1 / `BINS`, in practice by 1e-5 of its value.

    Returns:
        A scalar, float32.
    """
    present = torch.bincount(mask.flatten(), minlength=VOID + 1)[:VOID].nonzero()[:, 0]
    if not len(present):
        return _nothing(logits)
    probabilities = logits.float().softmax(1).index_select(1, present)  # [B, C', H, W]
    foreground = mask[:, None] == present.to(mask.dtype)[:, None, None]
    errors = torch.where(foreground, 1 - probabilities, probabilities)
    with torch.no_grad():
        weights = _lovasz_weights(errors, foreground, mask == VOID)
    return (errors * weights).sum() / len(present)


def _lovasz_weights(errors: Tensor, foreground: Tensor, void: Tensor) -> Tensor:
    """The gradient of each pixel's error `[B, C, H, W]`, 0 where it is void `[B, H, W]`."""
    classes = errors.shape[1]
    # each pixel's place in a table of [class, background or foreground, bin], and one more place for void
    place = (errors * BINS).int().clamp_(0, BINS - 1)  # NaN is anywhere among the integers
    place += foreground * BINS
    place += (torch.arange(classes, dtype=torch.int32, device=errors.device) * (2 * BINS))[:, None, None]
    place.masked_fill_(void[:, None], classes * 2 * BINS)
    counts = torch.bincount(place.flatten(), minlength=classes * 2 * BINS + 1)[:-1].view(classes, 2, BINS).double()
    total = counts[:, 1].sum(-1, keepdim=True)
    up_to = counts.flip(-1).cumsum(-1).flip(-1)  # in this bin and those of larger errors
    halfway = up_to - counts / 2
    union, before = total + up_to[:, 0], total + up_to[:, 0] - counts[:, 0]
    table = torch.stack([total - halfway[:, 1], total + halfway[:, 0]], dim=1) / (before * union)[:, None]
    table = table.flatten()
    return torch.cat([table, table.new_zeros(1)]).float().index_select(0, place.flatten()).view_as(errors)


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
