"""How far scores would move with other photos of the same kind: Student's t on a jackknife over the photos.

Each photo is left out in turn; how far the score then moves gives its variance (Efron and Stein 1981) and its skewness
(Hall 1992). Nothing is drawn at random: the same photos always give the same interval, and it always holds the score.
How often it holds the score of the whole population is measured by `benchmarks/coverage.py` (docs/operations.md).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import stdtrit  # type: ignore[import-untyped]
from torch import Tensor

LEVEL = 0.95
PHOTOS = 20  # with fewer, an interval of the mIoU holds the true one too seldom
CLASS_PHOTOS = 5  # the same of a class's IoU: photos whose truth shows the class


def too_few(photos: int) -> str | None:
    """Why the mIoU of so many photos has no interval, None where it has one."""
    return f"{photos} photos are too few for a 95 % interval, it takes {PHOTOS}" if photos < PHOTOS else None


def labelled(confusions: Tensor) -> int:
    """How many photos say something: those of `[N, C, C]` with a pixel that is not void."""
    return int(confusions.flatten(1).any(1).sum())


def iou_intervals(confusions: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals of the IoU on the population that the photos were drawn from, at `LEVEL`.

    Args:
        confusions: `[N, C, C]`, one per photo.

    Returns:
        Low and high end, float64: of the mIoU `[2]`, NaN for fewer than `PHOTOS` photos; of each class's IoU `[2, C]`,
        NaN for a class that fewer than `CLASS_PHOTOS` photos show.
    """
    one = _Jackknife(confusions)
    mean = _ends(one.mean, one.mean - one.mean_without, one.photos, one.photos - 1, LEVEL, one.unseen_variance(), True)
    classes = _ends(one.iou, one.iou - one.iou_without, one.involved.sum(0), one.shown - 1, LEVEL, 0.0, True)
    return _enough(mean, one.photos, PHOTOS).clamp(0, 1), _enough(classes, one.shown, CLASS_PHOTOS).clamp(0, 1)


def iou_difference_intervals(first: Tensor, second: Tensor, class_level: float) -> tuple[Tensor, Tensor]:
    """Intervals of what the second model's IoU has over the first's on the population; both are of the same photos.

    What makes a photo easy or hard is in both scores and cancels, so these intervals are narrower than the distance of
    two intervals of `iou_intervals`.

    Args:
        first: `[N, C, C]`, one per photo.
        second: those of the other model, of the same photos in the same order.
        class_level: of the classes' intervals; the mIoU's is `LEVEL`.

    Returns:
        As `iou_intervals`, of the differences.
    """
    one, two = _Jackknife(first), _Jackknife(second)
    shift = (two.mean - one.mean) - (two.mean_without - one.mean_without)
    unseen = two.unseen_variance(one)
    mean = _ends(two.mean - one.mean, shift, one.photos, one.photos - 1, LEVEL, unseen, False)
    shift = (two.iou - one.iou) - (two.iou_without - one.iou_without)
    involved = (one.involved | two.involved).sum(0)
    classes = _ends(two.iou - one.iou, shift, involved, one.shown - 1, class_level, 0.0, False)
    return _enough(mean, one.photos, PHOTOS).clamp(-1, 1), _enough(classes, one.shown, CLASS_PHOTOS).clamp(-1, 1)


class _Jackknife:
    """The IoU of all photos and without each of them; photos without a labelled pixel are left out.

    A class whose only photo is left out says nothing, rather than 0 for wrong pixels elsewhere.
    """

    def __init__(self, confusions: Tensor) -> None:
        confusions = confusions[confusions.flatten(1).any(1)]
        hits, truth = confusions.diagonal(dim1=-2, dim2=-1).double(), confusions.sum(-1).double()
        unions = truth + confusions.sum(-2) - hits
        self.photos = torch.tensor(len(confusions))
        self.shown, self.involved = (truth > 0).sum(0), unions > 0  # [C], [N, C]
        self.unseen = (self.shown == 0) & self.involved.any(0)  # [C]: predicted, but in no truth
        self.iou = hits.sum(0) / unions.sum(0)  # [C]
        alone = (truth > 0) & (self.shown == 1)
        self.iou_without = ((hits.sum(0) - hits) / (unions.sum(0) - unions)).masked_fill(alone, torch.nan)  # [N, C]
        self.mean, self.mean_without = self.iou.nanmean(), self.iou_without.nanmean(1)

    def unseen_variance(self, other: _Jackknife | None = None) -> float:
        """What classes add that were predicted but that no photo shows: they count as 0, whatever they would have had.

        Args:
            other: where it is of the difference, the model that is subtracted.
        """
        either = self.unseen if other is None else self.unseen | other.unseen
        models = [(self, 1.0)] if other is None else [(self, 1.0), (other, -1.0)]
        total = 0.0
        for label in either.nonzero().flatten().tolist():
            rest = torch.arange(len(self.iou)) != label
            total += sum(sign * (one.iou[rest].nanmean() - one.mean).item() for one, sign in models) ** 2
        return total


def _ends(
    score: Tensor, shift: Tensor, photos: Tensor, freedom: Tensor, level: float, variance: float, lopsided: bool
) -> Tensor:
    """Low and high end `[2, …]` around scores `[…]`.

    Args:
        score: what was measured.
        shift: by how much each photo moved it, `[N, …]`.
        photos: how many photos can move it, `[…]`.
        freedom: degrees of freedom of Student's t, `[…]`.
        level: the share of such intervals that hold the true score.
        variance: added to that which the photos give.
        lopsided: whether the ends follow the skewness. A difference of two models has next to none, and to estimate it
            anyway makes its intervals worse.
    """
    squares, photos = shift.square().sum(0), photos.double()
    error = (squares * (photos - 1) / photos + variance).sqrt()
    t = torch.from_numpy(np.asarray(stdtrit(freedom.clamp(min=1).numpy(), (1 + level) / 2)))
    if not lopsided:
        return torch.stack([score - t * error, score + t * error])
    a = (shift.pow(3).sum(0) / squares.pow(1.5)).nan_to_num(0.0)  # the skewness over the root of the photos
    a = torch.where(a.abs() < 1e-6, 1e-6, a)  # the limit at 0 is t itself
    # Hall's cubic transformation of t, inverted; |a| is at most 1, so the ends lie on either side of the score
    high, low = (3 / a * (_cube_root(1 + a * (sign * t - a / 6)) - 1) for sign in (1, -1))
    return torch.stack([score - high * error, score - low * error])


def _cube_root(values: Tensor) -> Tensor:
    return values.sign() * values.abs().pow(1 / 3)


def _enough(ends: Tensor, photos: Tensor, least: int) -> Tensor:
    return ends.masked_fill(photos < least, torch.nan)
