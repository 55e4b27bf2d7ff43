import math

import numpy as np
import pytest
import torch

from segmentation import intervals
from segmentation.images import read_mask
from segmentation.intervals import bootstrap_iou
from segmentation.metrics import class_iou, confusion_matrices, miou
from segmentation.voc import VocFolder


def confusions(photos: int = 12, classes: int = 5) -> torch.Tensor:
    """Photos of a few classes each; the last class is nowhere, the one before it in one photo."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes - 2, (photos, 20, 20), generator=generator)
    truth[0, :5] = classes - 2
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, truth.roll(1, 0))
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    return confusion_matrices(prediction, truth, classes)


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_the_intervals_are_those_of_a_plain_loop_over_the_same_resamplings(monkeypatch, chunk):
    monkeypatch.setattr(intervals, "_CHUNK", chunk)
    photos = confusions()
    generator = np.random.default_rng(3)
    means, per_class = [], []
    for _ in range(200):
        times = generator.multinomial(12, [1 / 12] * 12)
        matrix = sum(int(n) * one for n, one in zip(times, photos, strict=True))
        scores = [iou if matrix[label].any() else math.nan for label, iou in enumerate(class_iou(matrix).tolist())]
        means.append(np.nanmean(scores))
        per_class.append(scores)
    ours, ours_per_class = bootstrap_iou(photos, 200, seed=3)
    assert ours.tolist() == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), rel=1e-12)
    assert ours[0] < miou(photos.sum(0)) < ours[1]
    columns = np.array(per_class)
    assert np.isnan(columns[:, 3]).any()
    assert not np.isnan(columns[:, 3]).all()
    for label in range(4):
        expected = np.nanpercentile(columns[:, label], [2.5, 97.5])
        assert ours_per_class[:, label].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_class_that_is_not_drawn_counts_as_nothing_and_not_as_zero():
    """Of two photos one has class 1, right; in the other it is predicted in a few wrong places."""
    photos = torch.tensor([[[50, 0], [0, 50]], [[90, 10], [0, 0]]])
    _, per_class = bootstrap_iou(photos, 200)
    assert per_class[0, 1] == pytest.approx(50 / 60)


def test_a_class_that_is_only_ever_predicted_stays_zero():
    photos = torch.tensor([[[90, 10], [0, 0]], [[95, 5], [0, 0]]])
    ours, per_class = bootstrap_iou(photos, 50)
    assert per_class[:, 1].tolist() == [0, 0]
    assert ours[0] < miou(photos.sum(0)) <= ours[1]


def test_one_photo_gives_intervals_without_width():
    photo = confusions()[:1]
    ours, per_class = bootstrap_iou(photo, 50)
    assert ours.tolist() == pytest.approx([miou(photo[0])] * 2)
    torch.testing.assert_close(per_class, class_iou(photo).expand(2, -1), equal_nan=True)


def test_a_class_absent_everywhere_has_no_interval():
    ours, per_class = bootstrap_iou(confusions(), 50)
    assert per_class[:, 4].isnan().all()
    assert not per_class[:, :3].isnan().any()
    assert not ours.isnan().any()


def test_void_everywhere_has_no_interval():
    void = confusion_matrices(torch.zeros(3, 4, 4, dtype=torch.long), torch.full((3, 4, 4), 255), 3)
    ours, per_class = bootstrap_iou(void, 20)
    assert ours.isnan().all()
    assert per_class.isnan().all()


def test_the_seed_decides():
    photos = confusions()
    first, again, other = (bootstrap_iou(photos, 100, seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_perfect_prediction_of_real_masks_is_certain(voc_subset):
    folder = VocFolder(voc_subset)
    masks = [torch.tensor(read_mask(folder.mask(name)))[None] for name in folder.ids("val")[:10]]
    perfect = [confusion_matrices(torch.where(mask == 255, 0, mask), mask, 21)[0] for mask in masks]
    ours, per_class = bootstrap_iou(torch.stack(perfect), 100)
    assert ours.tolist() == [1, 1]
    assert math.isclose(per_class.nanmean(), 1)
