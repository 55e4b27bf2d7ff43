import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from segmentation.metrics.confusion import miou
from segmentation.metrics.intervals import iou_difference_intervals
from segmentation.registry.gate import (
    Check,
    Comparison,
    Difference,
    absolute_checks,
    compare,
    promotes,
    relative_checks,
)
from segmentation.settings import PromoteSettings

SETTINGS = PromoteSettings(min_gain=0.0, max_class_drop=0.05, max_latency_ratio=1.2)
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
    checks = relative_checks(compare(champion, candidate, NAMES), [0.1], [0.1], settings)
    return promotes(checks + absolute_checks("passed", None), forced=False)


def test_equal_models_are_seldom_promoted_and_a_gain_of_three_points_is_found():
    """The whole gate, on 300 photos, 200 times each."""
    worse, better = simulated(0, 20_000, THREE_POINTS)
    assert miou(better.sum(0)) - miou(worse.sum(0)) == pytest.approx(0.03, abs=0.001)
    equal = sum(promoted(*simulated(1000 + k, 300, 0.0)) for k in range(200))
    gains = sum(promoted(*simulated(2000 + k, 300, THREE_POINTS)) for k in range(200))
    assert equal <= 0.05 * 200
    assert gains >= 0.80 * 200


def test_the_intervals_are_those_of_the_jackknife_and_the_classes_share_the_five_percent():
    champion, candidate = simulated(5, 400, 0.3)
    found = compare(champion, candidate, NAMES)
    ends, class_ends = iou_difference_intervals(champion, candidate, 1 - 0.05 / CLASSES)
    assert (found.photos, found.miou.low, found.miou.high) == (400, *ends.tolist())
    for k, one in enumerate(found.classes):
        assert (one.low, one.high) == tuple(class_ends[:, k].tolist())


def test_the_numbers_of_photos_worked_by_hand():
    # class 1: 60 of 100 pixels found, then 90 of 100; nothing else is wrong but what was missed
    champion = torch.tensor([[[90, 0], [2, 3]]] * 20)
    candidate = torch.tensor([[[90, 0], [0, 5]], [[90, 0], [1, 4]]] * 10)
    found = compare(champion, candidate, ["background", "cat"])
    background, cat = found.classes
    assert (cat.name, cat.champion, cat.candidate) == ("cat", 0.6, 0.9)
    assert background.difference == pytest.approx(180 / 181 - 180 / 184)
    assert found.miou.difference == pytest.approx((0.3 + background.difference) / 2)
    # without one of the first ten it is 85 / 95, without one of the others 86 / 95: 0.9 less or more 1 / 190
    error = math.sqrt(19 / 20 * 20) / 190
    assert cat.high - cat.difference == pytest.approx(student.ppf(1 - 0.05 / 2 / 2, 19) * error)


def test_too_few_photos_promote_nothing_and_say_so():
    champion, candidate = simulated(6, 19, 3.0)
    found = compare(champion, candidate, NAMES)
    assert (found.miou.low, found.miou.high) == (None, None)
    gain, classes, _ = relative_checks(found, [0.1] * 19, [0.1] * 19, SETTINGS)
    assert not gain.passed
    assert "(no interval): 19 photos are too few for a 95 % interval, it takes 20" in gain.says
    assert classes.passed
    assert "more are not judged, fewer than 5 photos show them)" in classes.says
    json.dumps(asdict(found), allow_nan=False)


def test_a_class_that_is_only_predicted_counts_in_the_mean_as_the_evaluator_counts_it_and_is_not_compared():
    champion = torch.tensor([[[100, 0, 0], [0, 10, 0], [0, 0, 0]]] * 20)
    candidate = torch.tensor([[[99, 0, 1], [0, 10, 0], [0, 0, 0]]] * 20)
    found = compare(champion, candidate, ["background", "cat", "dog"])
    assert [one.name for one in found.classes] == ["background", "cat"]
    assert found.miou.champion == 1
    assert found.miou.candidate == miou(candidate.sum(0)) == pytest.approx((0.99 + 1 + 0) / 3)
    assert None not in [one.low for one in found.classes]


def test_the_same_model_is_a_near_tie_and_is_not_worse():
    same, _ = simulated(3, 50, 0.0)
    assert not promoted(same, same)
    assert promoted(same, same, SETTINGS.model_copy(update={"min_gain": -0.001}))


def test_matrices_of_other_masks_are_no_pair():
    first, _ = simulated(3, 50, 0.0)
    with pytest.raises(ValueError, match="same masks"):
        compare(first, first.roll(1, 0), NAMES)


def comparison(low: float, high: float, *classes: tuple[float, float]) -> Comparison:
    def between(name: str, low: float, high: float) -> Difference:
        middle = (low + high) / 2
        return Difference(name, 0.7, 0.7 + middle, middle, low, high)

    return Comparison(20, between("mIoU", low, high), tuple(between(f"c{k}", *ends) for k, ends in enumerate(classes)))


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


def latency(champion: Sequence[float], candidate: Sequence[float]) -> Check:
    return relative_checks(comparison(0.01, 0.02), champion, candidate, SETTINGS)[2]


@pytest.mark.parametrize(
    ("seconds", "passed"),
    [
        ([0.12] * 20, True),
        ([0.121] * 20, False),
        ([0.11] * 14 + [9.0] * 6, True),  # hiccups
        ([0.11] * 5 + [0.2] * 15, False),
        ([0.11] * 6 + [0.2] * 14, True),  # not surely
        ([9.0] * 5, True),  # no interval of so few, and no promotion either
    ],
)
def test_latency_refuses_only_where_the_interval_of_the_median_ratio_lies_above_the_limit(seconds, passed):
    check = latency([0.1] * len(seconds), seconds)
    assert check.passed == passed
    assert ("too few photos to tell" in check.says) == (len(seconds) == 5)


@pytest.mark.parametrize("photos", [6, 12, 20, 135])
def test_a_model_against_itself_is_not_refused_on_a_busy_machine(photos):
    """1,000 tries; a photo takes its time and, one time in three, several times as long."""
    generator, refused = np.random.default_rng(photos), 0
    for _ in range(1000):
        busy = 1 + (generator.random((2, photos)) < 0.3) * generator.pareto(1.0, (2, photos))
        seconds = 0.1 * busy * generator.lognormal(0, 0.3, (2, photos))
        refused += not latency(*seconds.tolist()).passed
    assert refused <= 10


def test_load_that_slows_both_models_is_in_nobodys_latency():
    """Half of the photos fell into a busy time, one more for the candidate than for the champion."""
    quiet, busy = [0.1] * 5, [0.5] * 5
    assert latency([*quiet, 0.1, *busy], [*quiet, 0.5, *busy]).passed


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
