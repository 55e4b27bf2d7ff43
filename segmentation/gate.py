"""What a model must show before it becomes the champion: pure statistics and rules, no registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from segmentation.intervals import LEVEL, bootstrap_iou_difference
from segmentation.metrics import class_iou, miou
from segmentation.settings import PromoteSettings


@dataclass(frozen=True)
class Difference:
    """An IoU of the champion and of the candidate, and the interval of what the candidate has over the champion."""

    name: str
    champion: float
    candidate: float
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{100 * self.champion:.2f} → {100 * self.candidate:.2f}, {100 * self.difference:+.2f} points "
            f"({100 * self.low:+.2f} to {100 * self.high:+.2f})"
        )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same photos: their mIoU with its 95 % interval, and the classes that are in the truth.

    The classes' intervals are corrected for their number (Bonferroni): all of them hold together with 95 %.
    """

    miou: Difference
    classes: tuple[Difference, ...]


@dataclass(frozen=True)
class Check:
    """One question of the gate: its answer, and a sentence with the numbers behind it."""

    name: str
    passed: bool
    says: str


def compare(champion: Tensor, candidate: Tensor, classes: Sequence[str], resamplings: int) -> Comparison:
    """The paired comparison of two models.

    Args:
        champion: confusion matrices `[N, C, C]`, one per photo.
        candidate: those of the candidate, of the same photos in the same order.
        classes: C names.
        resamplings: of the photos, behind the intervals.

    Raises:
        ValueError: the two are not of the same photos.
    """
    if not torch.equal(champion.sum(-1), candidate.sum(-1)):
        raise ValueError("the two stacks of confusion matrices are not of the same masks")
    before, after = champion.sum(0), candidate.sum(0)
    present = before.sum(1).nonzero().flatten().tolist()
    level = 1 - (1 - LEVEL) / max(1, len(present))
    ends, class_ends = bootstrap_iou_difference(champion, candidate, resamplings, level)

    def difference(name: str, old: float, new: float, interval: Tensor) -> Difference:
        return Difference(name, old, new, new - old, *interval.tolist())

    old, new = class_iou(before).tolist(), class_iou(after).tolist()
    return Comparison(
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
    ends of 21 such intervals would refuse nearly every model, equal ones included.
    """
    # photo by photo, then the median: what else the machine does changes both times of a photo, and cancels
    ratio = median(new / old for old, new in zip(champion_seconds, candidate_seconds, strict=True))
    return [
        _gain(comparison.miou, settings.min_gain),
        _classes(comparison.classes, settings.max_class_drop),
        Check(
            "latency",
            ratio <= settings.max_latency_ratio,
            f"{median(candidate_seconds):.4f} s a photo against {median(champion_seconds):.4f} s, in the median photo "
            f"{ratio:.2f} times as long; at most {settings.max_latency_ratio:g} times is allowed",
        ),
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


def _gain(found: Difference, least: float) -> Check:
    passed = found.low > least
    tie = least >= 0 and found.low <= 0 <= found.high
    verdict = "clears" if passed else "near-tie, the interval includes 0; it must lie above" if tie else "is not above"
    return Check("gain", passed, f"mIoU {found}: {verdict} {100 * least:+g} points")


def _classes(found: Sequence[Difference], drop: float) -> Check:
    worse = sorted((one for one in found if one.high < -drop), key=lambda one: one.difference)
    says = f"{len(worse) or 'none'} of {len(found)} classes surely lost more than {100 * drop:g} points"
    if worse:
        says += ", most of all " + "; ".join(f"{one.name} {one}" for one in worse[:3])
    return Check("classes", not worse, says)
