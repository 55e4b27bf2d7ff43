"""How often the 95 % intervals of the mIoU, and of the difference of two models, hold the true value.

A population of photos is made from real masks: of each, a number of predictions by a simulated model that finds a part
of each object, misses or confuses some, and sees some that are not there. The true value is the score on the whole
population. Sets of photos are drawn from it, and those whose interval holds the true value are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.side_by_side import parser, run
from segmentation.data.images import read_mask
from segmentation.data.voc import CLASSES, SPLITS, VOID, VocFolder
from segmentation.metrics.confusion import miou
from segmentation.metrics.intervals import iou_difference_intervals, iou_intervals

TWO = "background or not"
PREDICTIONS = 40  # of each mask
QUALITIES = {"middling": 2.0, "good": 4.0}  # logits of the share of an object that is found

Floats = NDArray[np.float64]


class Population(NamedTuple):
    """Photos' confusion matrices by a model `[M, C, C]`, by a second one, and how often each photo is drawn `[M]`."""

    first: Tensor
    second: Tensor
    shares: Floats


def main() -> None:
    made = parser("coverage", __doc__)
    made.add_argument("--sets", type=int, default=1000, help="how many sets are drawn (default: %(default)s)")
    made.add_argument("--photos", type=int, nargs="+", default=[20, 40, 135], help="of a set (default: 20 40 135)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, pixels = [], class_pixels(arguments.voc)
    grouped = {"all classes": pixels, TWO: np.stack([pixels[:, 0], pixels[:, 1:].sum(1)], 1)}
    print(f"{'classes, photos drawn, model':44}{'photos':>7}{'mIoU':>8}{'equal':>8}{'better':>8}")
    for classes, even, quality in product(grouped, (False, True), QUALITIES):
        if even and classes == TWO:
            continue  # every photo has both
        counts, ease = grouped[classes], QUALITIES[quality]
        equal, better = (population(counts, even, ease, better) for better in (0.0, 0.3))
        for photos in arguments.photos:
            row: dict[str, Any] = {
                "case": f"{classes}, {'rare classes more often' if even else 'all alike'}, {quality}",
                "photos": photos,
                "miou": covered(equal, photos, arguments.sets, of_miou),
                "equal": covered(equal, photos, arguments.sets, of_difference),
                "better": covered(better, photos, arguments.sets, of_difference),
            }
            rows.append(row)
            numbers = "".join(f"{100 * row[key]:7.1f}%" for key in ("miou", "equal", "better"))
            print(f"{row['case']:44}{photos:7}{numbers}", flush=True)
    return {"rows": rows}


def class_pixels(voc: Path) -> NDArray[np.int64]:
    """Pixels of each class in each mask `[N, C]`."""
    folder = VocFolder(voc)
    masks = (read_mask(folder.mask(name)) for split in SPLITS for name in folder.ids(split))
    return np.array([np.bincount(mask.ravel(), minlength=VOID + 1)[: len(CLASSES)] for mask in masks])


def population(pixels: NDArray[np.int64], even: bool, ease: float, better: float, seed: int = 1) -> Population:
    """Two models on the same photos, the second better by `better` logits.

    Args:
        pixels: `[N, C]`, as `class_pixels`.
        even: whether photos of rare classes are drawn more often; else all alike.
        ease: logit of the share of an object that the first model finds in a middling photo.
        better: added to it for the second model.
        seed: of the predictions.
    """
    random = np.random.default_rng(seed)
    shows = pixels[:, 1:] > 0
    weights = (shows / shows.sum(0).clip(1)).sum(1) if even else np.ones(len(pixels))
    areas, weights = (np.repeat(values, PREDICTIONS, 0).astype(float) for values in (pixels, weights))
    photos, classes = len(areas), len(pixels[0])
    easy, ability = random.normal(0, 1, photos), random.normal(0, 0.7, classes)  # of a photo, of a class
    looks_like = np.array([random.choice(np.delete(np.arange(classes), label), 3) for label in range(classes)])
    shared = random.random((photos, classes)), random.random(photos)  # most mistakes are both models'
    taken_for = np.where(
        random.random((photos, classes)) < 0.5,
        0,
        looks_like[np.arange(classes), random.integers(0, 3, (photos, classes))],
    )
    imagined = random.integers(1, classes, size=photos)
    imagined_share = random.beta(1, 8, size=photos) / 2
    models = []
    for logit in (ease, ease + better):
        own = random.normal(0, 0.5, (photos, classes))
        found = 1 / (1 + np.exp(-logit - ability - easy[:, None] - own))
        unlucky = np.where(random.random((photos, classes)) < 0.7, shared[0], random.random((photos, classes)))
        missed = unlucky < np.exp(ease - logit) / (1 + np.exp(2.5 + ability))
        dreams = np.where(random.random(photos) < 0.7, shared[1], random.random(photos)) < 0.12
        imagined_pixels = np.where(dreams, np.round(areas[:, 0] * imagined_share), 0)
        models.append(
            _confusions(areas, np.where(missed, found * 0.05, found), ~missed, taken_for, imagined, imagined_pixels)
        )
    return Population(models[0], models[1], weights / weights.sum())


def _confusions(
    areas: Floats,
    found: Floats,
    seen: NDArray[np.bool_],
    taken_for: NDArray[np.int64],
    imagined: NDArray[np.int64],
    imagined_pixels: Floats,
) -> Tensor:
    photos, classes = areas.shape
    at, matrices = np.arange(photos), np.zeros((photos, classes, classes))
    for label in range(1, classes):
        right = np.round(areas[:, label] * found[:, label])
        matrices[at, label, label] += right
        matrices[at, label, taken_for[:, label]] += areas[:, label] - right
        spilled = np.round((1 - found[:, label]) * 0.5 * areas[:, label] * seen[:, label])  # beyond its outline
        matrices[:, 0, label] += np.minimum(spilled, areas[:, 0] * 0.2 // 1)
    matrices[at, 0, imagined] += imagined_pixels
    matrices[:, 0, 0] = areas[:, 0] - matrices[:, 0, 1:].sum(1)
    assert (matrices >= 0).all()
    return torch.from_numpy(matrices).long()


def of_miou(first: Tensor, second: Tensor) -> Tensor:
    return iou_intervals(first)[0]


def of_difference(first: Tensor, second: Tensor) -> Tensor:
    return iou_difference_intervals(first, second, 0.95)[0]


def covered(drawn_from: Population, photos: int, sets: int, interval: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The share of sets whose interval holds the true value; ends of it that are NaN hold nothing."""
    first, second, shares = drawn_from
    random, weights = np.random.default_rng(2), torch.from_numpy(shares)[:, None, None]
    scores = [miou((stack * weights).sum(0)) for stack in (first, second)]
    true = scores[0] if interval is of_miou else scores[1] - scores[0]
    held = 0
    for _ in range(sets):
        drawn = torch.from_numpy(random.choice(len(shares), photos, p=shares))
        low, high = interval(first[drawn], second[drawn]).tolist()
        held += low <= true <= high
    return held / sets


if __name__ == "__main__":
    main()
