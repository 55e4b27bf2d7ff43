import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from segmentation.gate import Check, Comparison, Difference, absolute_checks, compare, promotes, relative_checks
from segmentation.metrics import class_iou, miou
from segmentation.settings import PromoteSettings

SETTINGS = PromoteSettings(min_gain=0.0, max_class_drop=0.05, max_latency_ratio=1.2, bootstrap=1000)
CLASSES = 21
NAMES = [f"class {label}" for label in range(CLASSES)]
THREE_POINTS = 0.194  # the shift of `simulated` that is worth three points of mIoU


def simulated(seed: int, photos: int, shift: float) -> tuple[Tensor, Tensor]:
    """Two models' confusion matrices of the same photos: one object of one class each, that a model finds in part.

    A photo is as easy or hard for both; beyond that each model does better or worse by chance, so that of two equal
    models the IoU in one photo differs by 0.1 (standard deviation). `shift` makes the second model better, in logits of
    the share of an object that is found.
    """
    generator, at = np.random.default_rng(seed), np.arange(photos)
    label = generator.integers(1, CLASSES, photos)
    area = generator.uniform(2_000, 60_000, photos).round()
    easy = generator.normal(2.2, 1.0, photos)
    models = []
    for better in (0.0, shift):
        found = (area / (1 + np.exp(-easy - better - generator.normal(0, 0.4, photos)))).round()
        missed, leaked = area - found, ((area - found) / 2).round()
        taken_for = generator.integers(0, CLASSES, photos)
        matrices = np.zeros((photos, CLASSES, CLASSES), np.int64)
        matrices[at, label, taken_for] += missed.astype(int)
        matrices[at, label, label] += found.astype(int)
        matrices[at, 0, label] = leaked
        matrices[at, 0, 0] = 180_000 - area - leaked
        models.append(torch.from_numpy(matrices))
    return models[0], models[1]


def promoted(champion: Tensor, candidate: Tensor, settings: PromoteSettings = SETTINGS) -> bool:
    checks = relative_checks(compare(champion, candidate, NAMES, settings.bootstrap), [0.1], [0.1], settings)
    return promotes(checks + absolute_checks("passed", None), forced=False)


def test_equal_models_are_seldom_promoted_and_a_gain_of_three_points_is_found():
    """The whole gate, on 300 photos, 200 times each."""
    worse, better = simulated(0, 20_000, THREE_POINTS)
    assert miou(better.sum(0)) - miou(worse.sum(0)) == pytest.approx(0.03, abs=0.001)
    equal = sum(promoted(*simulated(1000 + k, 300, 0.0)) for k in range(200))
    gains = sum(promoted(*simulated(2000 + k, 300, THREE_POINTS)) for k in range(200))
    assert equal <= 0.05 * 200
    assert gains >= 0.80 * 200


def test_the_intervals_are_those_of_a_plain_loop_over_resampled_photos():
    """An independent loop with its own random numbers: the ends agree to the noise of drawing."""
    champion, candidate = (stack[:, :4, :4] for stack in simulated(5, 400, 0.3))
    champion[:, 0, 0] += champion.sum((1, 2)).max() - champion.sum((1, 2))
    candidate[:, :, 0] += champion.sum(2) - candidate.sum(2)  # the same masks
    generator, means, classes = np.random.default_rng(77), [], []
    for _ in range(3000):
        picked = generator.integers(0, len(champion), len(champion))
        old, new = class_iou(champion[picked].sum(0)), class_iou(candidate[picked].sum(0))
        means.append((new.mean() - old.mean()).item())
        classes.append((new - old).tolist())
    found = compare(champion, candidate, NAMES[:4], 3000)
    width = found.miou.high - found.miou.low
    assert [found.miou.low, found.miou.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.06 * width)
    tail = 100 * 0.05 / 4 / 2  # four classes share the 5 %
    for k, one in enumerate(found.classes):
        expected = np.percentile(np.array(classes)[:, k], [tail, 100 - tail])
        assert [one.low, one.high] == pytest.approx(expected, abs=0.12 * (one.high - one.low))


def test_the_numbers_of_two_photos_worked_by_hand():
    # class 1: 6 of 10 pixels found, then 9 of 10; nothing else is wrong but what was missed
    champion = torch.tensor([[[90, 0], [2, 3]], [[90, 0], [2, 3]]])
    candidate = torch.tensor([[[90, 0], [0, 5]], [[90, 0], [1, 4]]])
    found = compare(champion, candidate, ["background", "cat"], 2000)
    background, cat = found.classes
    assert (cat.name, cat.champion, cat.candidate) == ("cat", 0.6, 0.9)
    assert background.difference == pytest.approx(180 / 181 - 180 / 184)
    assert found.miou.difference == pytest.approx((0.3 + background.difference) / 2)
    # resampled, both photos are the first, one each, or the second: 0.4, 0.3 or 0.2 better
    assert (cat.low, cat.high) == pytest.approx((0.2, 0.4))


def test_a_class_that_is_only_predicted_counts_in_the_mean_as_the_evaluator_counts_it_and_is_not_compared():
    champion = torch.tensor([[[100, 0, 0], [0, 10, 0], [0, 0, 0]]] * 3)
    candidate = torch.tensor([[[99, 0, 1], [0, 10, 0], [0, 0, 0]]] * 3)
    found = compare(champion, candidate, ["background", "cat", "dog"], 100)
    assert [one.name for one in found.classes] == ["background", "cat"]
    assert found.miou.champion == 1
    assert found.miou.candidate == miou(candidate.sum(0)) == pytest.approx((0.99 + 1 + 0) / 3)
    assert not any(math.isnan(one.low) for one in found.classes)


def test_the_same_model_is_a_near_tie_and_is_not_worse():
    same, _ = simulated(3, 50, 0.0)
    assert not promoted(same, same)
    assert promoted(same, same, SETTINGS.model_copy(update={"min_gain": -0.001}))


def test_matrices_of_other_masks_are_no_pair():
    first, _ = simulated(3, 50, 0.0)
    with pytest.raises(ValueError, match="same masks"):
        compare(first, first.roll(1, 0), NAMES, 10)


def comparison(low: float, high: float, *classes: tuple[float, float]) -> Comparison:
    def between(name: str, low: float, high: float) -> Difference:
        middle = (low + high) / 2
        return Difference(name, 0.7, 0.7 + middle, middle, low, high)

    return Comparison(between("mIoU", low, high), tuple(between(f"c{k}", *ends) for k, ends in enumerate(classes)))


@pytest.mark.parametrize(
    ("low", "high", "min_gain", "passed", "words"),
    [
        (0.001, 0.02, 0.0, True, "clears"),
        (0.0, 0.02, 0.0, False, "near-tie"),
        (-0.01, 0.02, 0.0, False, "near-tie"),
        (-0.02, -0.01, 0.0, False, "is not above"),
        (0.004, 0.02, 0.005, False, r"is not above \+0.5 points"),
        (-0.001, 0.02, 0.005, False, "near-tie"),
        (-0.004, 0.003, -0.005, True, "clears"),
        (-0.006, 0.003, -0.005, False, r"is not above -0.5 points"),
    ],
)
def test_the_lower_end_of_the_gain_decides(low, high, min_gain, passed, words):
    settings = SETTINGS.model_copy(update={"min_gain": min_gain})
    gain = relative_checks(comparison(low, high), [1], [1], settings)[0]
    assert gain.passed == passed
    assert gain.name == "gain"
    assert re.search(words, gain.says)
    assert ("near-tie" in gain.says) == (words == "near-tie")


@pytest.mark.parametrize(
    ("interval", "passed"),
    [((-0.2, -0.06), False), ((-0.2, -0.05), True), ((-0.2, 0.01), True), ((0.0, 0.1), True)],
)
def test_a_class_refuses_only_where_its_whole_interval_is_below_the_limit(interval, passed):
    check = relative_checks(comparison(0.01, 0.02, (0.0, 0.1), interval), [1], [1], SETTINGS)[1]
    assert check.passed == passed
    assert ("c1" in check.says) == (not passed)


@pytest.mark.parametrize(
    ("seconds", "passed"),
    [
        ([0.12, 0.12, 0.12], True),
        ([0.121, 0.121, 0.121], False),
        ([0.1, 0.1, 9.0], True),  # a hiccup
    ],
)
def test_latency_is_the_ratio_in_the_median_photo(seconds, passed):
    check = relative_checks(comparison(0.01, 0.02), [0.1, 0.1, 0.1], seconds, SETTINGS)[2]
    assert check.passed == passed


def test_load_that_slows_both_models_is_in_nobodys_latency():
    """Half of the photos fell into a busy time, one more for the candidate than for the champion."""
    quiet, busy = [0.1] * 5, [0.5] * 5
    check = relative_checks(comparison(0.01, 0.02), [*quiet, 0.1, *busy], [*quiet, 0.5, *busy], SETTINGS)[2]
    assert check.passed


@pytest.mark.parametrize(
    ("data", "failure", "failed"),
    [
        ("passed", None, []),
        ("passed with warnings", None, []),
        ("failed", None, ["data_checks"]),
        ("passed", "other masks", ["reproduction"]),
    ],
)
def test_what_is_asked_of_every_candidate(data, failure, failed):
    assert [check.name for check in absolute_checks(data, failure) if not check.passed] == failed


def test_force_overrides_all_but_a_model_that_does_not_reproduce():
    names = ("gain", "classes", "latency", "data_checks", "reproduction")
    good = [Check(name, True, "") for name in names]
    assert promotes(good, forced=False)
    for k, name in enumerate(names):
        checks = [replace(check, passed=j != k) for j, check in enumerate(good)]
        assert not promotes(checks, forced=False)
        assert promotes(checks, forced=True) == (name != "reproduction")
