import numpy as np
import pytest
import torch
from scipy.stats import t as student

from benchmarks.coverage import class_pixels, covered, of_difference, of_miou, population
from segmentation.data.images import read_mask
from segmentation.data.voc import VocFolder
from segmentation.metrics.confusion import class_iou, confusion_matrices, miou
from segmentation.metrics.intervals import (
    CLASS_PHOTOS,
    PHOTOS,
    iou_difference_intervals,
    iou_intervals,
    labelled,
    too_few,
)


def confusions(photos: int = 24, classes: int = 5, right: float = 0.6, seed: int = 0) -> torch.Tensor:
    """Photos of a few classes each; the last class is nowhere, the one before it in one photo."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes - 2, (photos, 20, 20), generator=torch.Generator().manual_seed(9))
    truth[0, :5] = classes - 2
    quality = right + 0.3 * torch.rand(photos, 1, 1, generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < quality, truth, truth.roll(1, 0))
    truth[:, :2] = 255
    return confusion_matrices(prediction, truth, classes)


def without_each(stack: torch.Tensor) -> list[float]:
    """The mIoU with one photo less, by a plain loop; a class whose only photo it was is left out of the mean."""
    scores = []
    for k in range(len(stack)):
        rest = torch.cat([stack[:k], stack[k + 1 :]]).sum(0)
        lost = (stack[k].sum(1) > 0) & (rest.sum(1) == 0)
        scores.append(class_iou(rest).masked_fill(lost, torch.nan).nanmean().item())
    return scores


def test_the_difference_is_students_t_on_a_plain_jackknife():
    first, second = confusions(), confusions(right=0.65, seed=1)
    score = miou(second.sum(0)) - miou(first.sum(0))
    shift = np.subtract(without_each(second), without_each(first)) - score
    error = np.sqrt(23 / 24 * (shift**2).sum())
    expected = score + np.array([-1, 1]) * student.ppf(0.975, 23) * error
    assert iou_difference_intervals(first, second, 0.95)[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_the_miou_follows_its_skewness():
    """Hall's transformation itself, of the found ends, gives back Student's quantiles."""
    stack = confusions()
    score, photos = miou(stack.sum(0)), len(stack)
    shift = score - np.array(without_each(stack))
    error = np.sqrt(23 / 24 * (shift**2).sum())
    skew = np.mean(shift**3) / np.mean(shift**2) ** 1.5
    low, high = iou_intervals(stack)[0].tolist()
    for end, sign in ((low, 1), (high, -1)):
        found = (score - end) / error
        back = (
            found + skew * found**2 / (3 * photos**0.5) + skew**2 * found**3 / (27 * photos) + skew / (6 * photos**0.5)
        )
        assert back == pytest.approx(sign * student.ppf(0.975, 23), rel=1e-6)
    assert abs(skew) > 0.1


def test_a_classs_interval_is_of_the_photos_that_can_move_it():
    stack = confusions()
    other = torch.zeros(40, 5, 5, dtype=torch.int64)
    other[:, 4, 4] = 50  # 40 photos of nothing but another class
    _, alone = iou_intervals(stack)
    _, among = iou_intervals(torch.cat([stack, other]))
    torch.testing.assert_close(alone[:, :3], among[:, :3])


@pytest.mark.parametrize("seed", range(20))
def test_every_interval_holds_its_estimate(seed):
    """Photos of few pixels, one of them large and unlike the others: what put the bootstrap's interval beside it."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 9, (PHOTOS, 4, 4), generator=generator) ** 3 for _ in range(2))
    second += first.sum(2, keepdim=True) * torch.eye(4, dtype=torch.int64)
    first[0] *= 1000
    second[0] *= 1000
    for stack in (first, second):
        ours, classes = iou_intervals(stack)
        assert ours[0] <= miou(stack.sum(0)) <= ours[1]
        assert (classes[0] <= class_iou(stack.sum(0))).all() and (class_iou(stack.sum(0)) <= classes[1]).all()
    low, high = iou_difference_intervals(first, second, 0.95)[0]
    assert low <= miou(second.sum(0)) - miou(first.sum(0)) <= high


def test_too_few_photos_have_no_interval_and_it_is_said():
    void = torch.zeros(5, 5, 5, dtype=torch.int64)
    few = torch.cat([confusions(PHOTOS - 1), void])  # void photos say nothing
    assert iou_intervals(few)[0].isnan().all()
    assert iou_difference_intervals(few, few, 0.95)[0].isnan().all()
    assert labelled(few) == PHOTOS - 1
    assert too_few(PHOTOS - 1) == "19 photos are too few for a 95 % interval, it takes 20"
    assert too_few(PHOTOS) is None
    assert not iou_intervals(confusions(PHOTOS))[0].isnan().any()


def test_a_class_that_few_photos_show_has_no_interval():
    stack = torch.zeros(PHOTOS, 3, 3, dtype=torch.int64)
    stack[:, 0, 0], stack[:, 0, 1] = 100, 3  # predicted in every photo, but shown by
    stack[: CLASS_PHOTOS - 1, 1, 1] = torch.tensor([40, 60, 80, 50])
    assert iou_intervals(stack)[1][:, 1].isnan().all()
    assert iou_difference_intervals(stack, stack, 0.95)[1][:, 1].isnan().all()
    stack[CLASS_PHOTOS - 1, 1, 1] = 10
    assert not iou_intervals(stack)[1][:, :2].isnan().any()
    assert iou_intervals(stack)[1][:, 2].isnan().all()  # absent


def test_a_class_that_no_photo_shows_makes_the_miou_less_certain():
    """It counts as 0 where it is predicted, as the VOC devkit has it; other photos would have given it something."""
    stack = torch.cat([confusions(), confusions(seed=1)])[:, :4, :4].clone()
    stack[:, :, 3] = stack[:, 3] = 0
    seen = iou_intervals(stack)[0]
    stack[:2, 0, 3] += 1
    unseen = iou_intervals(stack)[0]
    assert unseen[1] - unseen[0] > 2 * (seen[1] - seen[0])
    assert unseen[0] <= miou(stack.sum(0)) <= unseen[1]
    assert iou_difference_intervals(stack, stack, 0.95)[0].tolist() == [0, 0]


def test_a_perfect_prediction_of_real_masks_is_certain(voc_subset):
    folder = VocFolder(voc_subset)
    masks = [torch.tensor(read_mask(folder.mask(name)))[None] for name in folder.ids("val")[:PHOTOS]]
    perfect = torch.stack([confusion_matrices(torch.where(mask == 255, 0, mask), mask, 21)[0] for mask in masks])
    ours, per_class = iou_intervals(perfect)
    assert ours.tolist() == [1, 1]
    assert per_class.nanmean() == 1


def test_ends_are_scores():
    stack = confusions(PHOTOS)
    stack[1] = 0
    stack[1, 0, 1] = 100_000
    ours, per_class = iou_intervals(stack)
    for ends in (ours, per_class.nan_to_num(0.5)):
        assert (ends >= 0).all() and (ends <= 1).all()


@pytest.fixture(scope="module")
def pixels(voc_subset):
    return class_pixels(voc_subset)


def test_they_hold_the_truth_about_as_often_as_they_say(pixels):
    """250 of the sets that the slow test draws."""
    drawn_from = population(pixels, True, 2.0, 0.3)
    assert 0.92 <= covered(drawn_from, 135, 250, of_miou) <= 0.985
    assert 0.92 <= covered(drawn_from, 135, 250, of_difference) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("ease", [2.0, 4.0])
@pytest.mark.parametrize("better", [0.0, 0.3])
@pytest.mark.parametrize("classes", [21, 2])
def test_of_a_thousand_sets_of_135_photos_92_to_98_percent_hold_the_truth(pixels, classes, better, ease):
    """The mIoU, and the difference of two models: equal ones, and one that is better by four to six points of mIoU."""
    shown = pixels if classes == 21 else np.stack([pixels[:, 0], pixels[:, 1:].sum(1)], 1)
    drawn_from = population(shown, classes == 21, ease, better)
    assert 0.92 <= covered(drawn_from, 135, 1000, of_difference) <= 0.98
    if not better:
        assert 0.92 <= covered(drawn_from, 135, 1000, of_miou) <= 0.98
