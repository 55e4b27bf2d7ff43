import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from segmentation.images import read_mask, resize_mask
from segmentation.metrics import (
    class_iou,
    confusion_matrices,
    mean_class_accuracy,
    miou,
    pixel_accuracy,
    report_miou,
)
from segmentation.voc import VocFolder


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
