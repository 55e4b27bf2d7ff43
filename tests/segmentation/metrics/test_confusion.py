import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from segmentation.data.images import read_mask, resize_mask
from segmentation.data.voc import VocFolder
from segmentation.metrics.confusion import (
    class_iou,
    confusion_matrices,
    mean_class_accuracy,
    miou,
    pixel_accuracy,
    report_miou,
)


def random_masks(classes: int = 21):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, classes, (3, 50, 60), generator=generator).to(torch.uint8)
    prediction = torch.where(torch.rand(mask.shape, generator=generator) < 0.6, mask % classes, mask.flip(0) % classes)
    mask[torch.rand(mask.shape, generator=generator) < 0.1] = 255
    return prediction.long(), mask


def test_confusion_matrices_equal_torchmetrics_per_photo_and_in_all():
    prediction, mask = random_masks()
    ours = confusion_matrices(prediction, mask, 21)
    for k in range(3):
        reference = multiclass_confusion_matrix(prediction[k], mask[k].long(), 21, ignore_index=255)
        assert torch.equal(ours[k], reference)
    assert torch.equal(ours.sum(0), multiclass_confusion_matrix(prediction, mask.long(), 21, ignore_index=255))


def test_class_iou_equals_torchmetrics():
    prediction, mask = random_masks()
    reference = multiclass_jaccard_index(prediction, mask.long(), 21, average="none", ignore_index=255)
    ours = class_iou(confusion_matrices(prediction, mask, 21).sum(0))
    torch.testing.assert_close(ours.float(), reference)


def devkit_iou(prediction: np.ndarray, mask: np.ndarray, classes: int) -> list[float]:
    """The devkit's definition (VOCevalseg.m) in sets of pixels: TP / (TP + FP + FN), void left out, NaN for 0 / 0."""
    labelled = [pair for pair in zip(prediction.ravel().tolist(), mask.ravel().tolist(), strict=True) if pair[1] != 255]
    scores = []
    for label in range(classes):
        right = sum(found == true == label for found, true in labelled)
        wrong = sum((found == label) != (true == label) for found, true in labelled)
        scores.append(right / (right + wrong) if right + wrong else math.nan)
    return scores


def real_pairs(voc_subset, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Real val masks at 112, and as predictions of them their neighbours in the list where they differ."""
    folder = VocFolder(voc_subset)
    mask = torch.stack([torch.tensor(resize_mask(read_mask(folder.mask(n)), 112)) for n in folder.ids("val")[:count]])
    labels = torch.where(mask == 255, 0, mask)
    prediction = torch.where(torch.arange(112) < 80, labels, labels.roll(1, 0))
    return prediction, mask


@pytest.mark.parametrize("source", ["random", "real"])
def test_class_iou_and_miou_equal_the_devkits_definition_and_torchmetrics(source, request):
    pairs = random_masks() if source == "random" else real_pairs(request.getfixturevalue("voc_subset"))
    prediction, mask = pairs
    assert (mask == 255).any()
    confusion = confusion_matrices(prediction, mask, 22).sum(0)  # class 21 is nowhere
    devkit = devkit_iou(prediction.numpy(), mask.numpy(), 22)
    np.testing.assert_allclose(class_iou(confusion).numpy(), devkit, rtol=1e-12)
    assert math.isnan(devkit[21])
    assert 0.2 < miou(confusion) < 0.95
    assert miou(confusion) == pytest.approx(np.nanmean(devkit), rel=1e-12)
    theirs = multiclass_jaccard_index(prediction.long(), mask.long(), 22, ignore_index=255, average="macro")
    assert miou(confusion) == pytest.approx(theirs.item(), abs=1e-6)


def test_a_perfect_prediction_scores_1_whatever_it_says_of_void():
    mask = torch.tensor([[[0, 0, 1, 255], [2, 2, 255, 255]]])
    for void in range(3):
        confusion = confusion_matrices(torch.where(mask == 255, void, mask), mask, 4)[0]
        assert (miou(confusion), pixel_accuracy(confusion), mean_class_accuracy(confusion)) == (1, 1, 1)


def test_background_everywhere_hand_worked():
    # 3 of 5 labelled pixels are background: its IoU is 3/5, those of classes 1 and 2 are 0, class 3 is in neither.
    mask = torch.tensor([[[0, 0, 0, 1, 2, 255]]])
    confusion = confusion_matrices(torch.zeros_like(mask), mask, 4)[0]
    assert class_iou(confusion)[:3].tolist() == [3 / 5, 0, 0]
    assert miou(confusion) == pytest.approx((3 / 5) / 3)
    assert pixel_accuracy(confusion) == 3 / 5
    assert mean_class_accuracy(confusion) == pytest.approx(1 / 3)


def test_hand_worked_case_with_void_and_an_absent_class():
    # truth 0 0 1 1 void | prediction 0 1 1 1 1; class 2 is in neither
    confusion = confusion_matrices(torch.tensor([[[0, 1, 1, 1, 1]]]), torch.tensor([[[0, 0, 1, 1, 255]]]), 3)[0]
    assert confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    iou = class_iou(confusion)
    assert iou[:2].tolist() == [1 / 2, 2 / 3]
    assert iou[2].isnan()
    assert miou(confusion) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert pixel_accuracy(confusion) == 3 / 4
    assert mean_class_accuracy(confusion) == pytest.approx((1 / 2 + 1) / 2)


def test_report_miou_hand_worked():
    # Four photos of one pixel, four classes, all right: batches {0, 1} and {2, 2} have 2 and 1 of 4 classes.
    masks = torch.tensor([0, 1, 2, 2]).view(4, 1, 1)
    assert report_miou(confusion_matrices(masks, masks, 4)) == pytest.approx((2 / 4 + 1 / 4) / 2)


def test_report_miou_takes_an_odd_photo_out_as_its_own_batch():
    masks = torch.tensor([0, 1, 2]).view(3, 1, 1)
    assert report_miou(confusion_matrices(masks, masks, 4)) == pytest.approx((2 / 4 + 1 / 4) / 2)


def test_a_class_predicted_where_it_is_not_counts_as_zero():
    confusion = confusion_matrices(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]), 3)[0]
    assert miou(confusion) == pytest.approx((1 / 2 + 0) / 2)


@pytest.mark.parametrize("label", [3, 9, 77])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=f"label {label}"):
        confusion_matrices(torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([[[0, 1], [255, label]]]), 3)


def test_all_void_scores_nothing():
    confusion = confusion_matrices(torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), 255), 3)[0]
    assert confusion.sum() == 0
    assert math.isnan(miou(confusion))
    assert math.isnan(pixel_accuracy(confusion))
    assert math.isnan(mean_class_accuracy(confusion))


def test_an_all_void_photo_changes_no_score_of_the_others():
    prediction, mask = random_masks()
    more = torch.cat([mask, torch.full_like(mask[:1], 255)])
    alone = confusion_matrices(prediction, mask, 21).sum(0)
    assert torch.equal(confusion_matrices(torch.cat([prediction, prediction[:1]]), more, 21).sum(0), alone)


def test_ceilings_on_the_real_val_masks(voc_subset):
    folder = VocFolder(voc_subset)
    confusions = []
    for name in folder.ids("val"):
        mask = torch.tensor(resize_mask(read_mask(folder.mask(name)), 518))[None]
        perfect = torch.where(mask == 255, 0, mask)
        confusions.append(confusion_matrices(perfect, mask, 21)[0])
    assert len(confusions) == 135
    stacked = torch.stack(confusions)
    assert miou(stacked.sum(0)) == 1.0
    assert report_miou(stacked) == pytest.approx(0.2171, abs=5e-5)
