"""Segmentation scores, all from confusion matrices `[…, C, C]`: rows are the truth, columns the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from segmentation.data.images import Pixels
from segmentation.data.voc import VOID

REPORT_BATCH = 2


def confusion_matrices(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """One confusion matrix per photo, void pixels left out.

    Args:
        prediction: `[B, H, W]` class ids.
        mask: `[B, H, W]` class ids, 255 = void.
        classes: C.

    Returns:
        `[B, C, C]` int64 pixel counts.

    Raises:
        ValueError: the mask has a label that is no class.
    """
    batch = torch.arange(len(mask), device=mask.device).view(-1, 1, 1).expand_as(mask)
    valid = mask != VOID
    if valid.any() and (highest := int(mask[valid].max())) >= classes:
        raise ValueError(f"the mask has label {highest}; labels are 0 to {classes - 1} and {VOID} (void)")
    index = (batch[valid] * classes + mask[valid].long()) * classes + prediction[valid].long()
    return torch.bincount(index, minlength=len(mask) * classes**2).view(-1, classes, classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class, `[…, C]` float64; NaN for a class absent from truth and prediction."""
    confusion = confusion.double()
    hits = confusion.diagonal(dim1=-2, dim2=-1)
    return hits / (confusion.sum(-1) + confusion.sum(-2) - hits)


def miou(confusion: Tensor) -> float:
    """The VOC devkit's mean IoU: over the data set's one matrix, absent classes excluded."""
    return class_iou(confusion).nanmean().item()


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of labelled pixels that are right; NaN where there is none."""
    confusion = confusion.double()
    return (confusion.diagonal().sum() / confusion.sum()).item()


def mean_class_accuracy(confusion: Tensor) -> float:
    """Mean over the classes in the truth of the share of their pixels that are right."""
    confusion = confusion.double()
    return (confusion.diagonal() / confusion.sum(1)).nanmean().item()


def report_miou(confusions: Tensor) -> float:
    """The report's "mIoU": mean over batches of two, in list order, of the mean IoU that counts absent classes as 0.

    Its ceiling is the mean share of classes present in two photos (0.1806 on VOC val), so compare it with the report's
    numbers and nothing else.

    Args:
        confusions: `[N, C, C]` at training size, one per photo.
    """
    batches = torch.stack([part.sum(0) for part in confusions.split(REPORT_BATCH)])
    return class_iou(batches).nan_to_num(0.0).mean().item()


def photo_confusion(prediction: Pixels, truth: Pixels, classes: int) -> Tensor:
    """Confusion matrix `[C, C]` of one photo's mask with the truth, both `[H, W]`."""
    return confusion_matrices(torch.from_numpy(prediction)[None], torch.tensor(truth)[None], classes)[0]
