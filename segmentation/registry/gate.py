"""What a model must show before it becomes the champion: pure statistics and rules, no registry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from scipy.stats import quantile_test  # type: ignore[import-untyped]
from torch import Tensor

from segmentation.metrics.confusion import class_iou, miou
from segmentation.metrics.intervals import CLASS_PHOTOS, LEVEL, iou_difference_intervals, labelled, too_few
from segmentation.settings import PromoteSettings


@dataclass(frozen=True)
class Difference:
    """An IoU of the champion and of the candidate, and the interval of what the candidate has over the champion.

    `low` and `high` are None where photos are too few for an interval.
    """

    name: str
    champion: float
    candidate: float
    difference: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        scores = f"{100 * self.champion:.2f} → {100 * self.candidate:.2f}, {100 * self.difference:+.2f} points "
        if self.low is None or self.high is None:
            return f"{scores}(no interval)"
        return f"{scores}({100 * self.low:+.2f} to {100 * self.high:+.2f})"


@dataclass(frozen=True)
class Comparison:
    """Two models on so many labelled photos: their mIoU with its 95 % interval, and the classes that are in the truth.

    The classes' intervals are corrected for their number (Bonferroni): all of them hold together with 95 %.
    """

    photos: int
    miou: Difference
    classes: tuple[Difference, ...]


@dataclass(frozen=True)
class Check:
    """One question of the gate: its answer, and a sentence with the numbers behind it."""

    name: str
    passed: bool
    says: str


def compare(champion: Tensor, candidate: Tensor, classes: Sequence[str]) -> Comparison:
    """The paired comparison of two models.

    Args:
        champion: confusion matrices `[N, C, C]`, one per photo.
        candidate: those of the candidate, of the same photos in the same order.
        classes: C names.

    Raises:
        ValueError: the two are not of the same photos.
    """
    if not torch.equal(champion.sum(-1), candidate.sum(-1)):
        raise ValueError("the two stacks of confusion matrices are not of the same masks")
    before, after = champion.sum(0), candidate.sum(0)
    present = before.sum(1).nonzero().flatten().tolist()
    level = 1 - (1 - LEVEL) / max(1, len(present))
    ends, class_ends = iou_difference_intervals(champion, candidate, level)

    def difference(name: str, old: float, new: float, interval: Tensor) -> Difference:
        low, high = (None if math.isnan(end) else end for end in interval.tolist())
        return Difference(name, old, new, new - old, low, high)

    old, new = class_iou(before).tolist(), class_iou(after).tolist()
    return Comparison(
        photos=labelled(champion),
        miou=difference("mIoU", miou(before), miou(after), ends),
        classes=tuple(difference(classes[k], old[k], new[k], class_ends[:, k]) for k in present),
    )


def relative_checks(
    comparison: Comparison,
    champion_seconds: Sequence[float],
    candidate_seconds: Sequence[float],
    settings: PromoteSettings,
) -> list[Check]:
    """The candidate against the champion: mIoU, classes and latency.

    Args:
        comparison: what `compare` returned.
        champion_seconds: of each photo.
        candidate_seconds: of the same photos, each predicted right after or before the champion did.
        settings: the limits.

    The mIoU must be shown to be good enough, so the lower end of its interval counts. A class must not be shown to be
    too bad, so the *upper* end of its interval counts: the interval of a class with few photos is wide, and the lower
    ends of 21 such intervals would refuse nearly every model, equal ones included. So must a model not be shown to be
    too slow.
    """
    return [
        _gain(comparison, settings.min_gain),
        _classes(comparison.classes, settings.max_class_drop),
        _latency(champion_seconds, candidate_seconds, settings.max_latency_ratio),
    ]


def absolute_checks(data_checks: str, failure: str | None) -> list[Check]:
    """What is asked of any candidate, also where there is no champion.

    Args:
        data_checks: the version's tag, the result of stage `validate`.
        failure: why the stored model does not give its own masks, `None` where it does.
    """
    return [
        Check("data_checks", data_checks.startswith("passed"), f"the checks of its data: {data_checks}"),
        Check(
            "reproduction",
            failure is None,
            failure or "reloaded from the registry, its stored code gives the same masks bit for bit",
        ),
    ]


def promotes(checks: Sequence[Check], forced: bool) -> bool:
    """Whether the candidate becomes the champion. Force overrides every check but that of the stored model: one that
    does not give the masks that were scored is never served."""
    failed = {check.name for check in checks if not check.passed}
    return "reproduction" not in failed and (forced or not failed)


def _latency(champion: Sequence[float], candidate: Sequence[float], most: float) -> Check:
    # photo by photo, then the median: what else the machine does changes both times of a photo, and cancels
    ratios = [new / old for old, new in zip(champion, candidate, strict=True)]
    # of the order statistics: no shape of the noise is assumed; NaN where photos are too few for such an end
    ends = quantile_test(ratios, q=1.0, p=0.5).confidence_interval(LEVEL)
    found = f"95 % interval {ends.low:.2f} to {ends.high:.2f}" if ends.low <= ends.high else "too few photos to tell"
    return Check(
        "latency",
        not ends.low > most,
        f"{median(candidate):.4f} s a photo against {median(champion):.4f} s, in the median photo {median(ratios):.2f} "
        f"times as long ({found}); surely more than {most:g} times is not allowed",
    )


def _gain(comparison: Comparison, least: float) -> Check:
    found = comparison.miou
    if found.low is None or found.high is None:
        return Check("gain", False, f"mIoU {found}: {too_few(comparison.photos)}")
    passed = found.low > least
    tie = least >= 0 and found.low <= 0 <= found.high
    verdict = "clears" if passed else "near-tie, the interval includes 0; it must lie above" if tie else "is not above"
    return Check("gain", passed, f"mIoU {found}: {verdict} {100 * least:+g} points")


def _classes(found: Sequence[Difference], drop: float) -> Check:
    judged = [one for one in found if one.high is not None]
    worse = sorted((one for one in judged if one.high is not None and one.high < -drop), key=lambda one: one.difference)
    says = f"{len(worse) or 'none'} of {len(judged)} classes surely lost more than {100 * drop:g} points"
    if others := len(found) - len(judged):
        says += f" ({others} more are not judged, fewer than {CLASS_PHOTOS} photos show them)"
    if worse:
        says += ", most of all " + "; ".join(f"{one.name} {one}" for one in worse[:3])
    return Check("classes", not worse, says)
