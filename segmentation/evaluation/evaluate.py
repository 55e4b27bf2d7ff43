"""Scores of the trained model on the val split, at each photo's own size and at training size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from segmentation.data.images import Pixels, read_mask, read_photo, resize_mask
from segmentation.data.pairs import split_ids
from segmentation.data.voc import VocFolder, is_background
from segmentation.errors import PipelineError
from segmentation.evaluation.verdict import caveat
from segmentation.files import atomic_path, write_json
from segmentation.metrics.boundary import boundary_counts, boundary_iou
from segmentation.metrics.calibration import calibration_error, reliability_counts, reliability_table
from segmentation.metrics.confusion import (
    class_iou,
    mean_class_accuracy,
    miou,
    photo_confusion,
    pixel_accuracy,
    report_miou,
)
from segmentation.metrics.intervals import iou_intervals, labelled, too_few
from segmentation.model.decoder import upsample
from segmentation.model.features import open_features
from segmentation.prediction.predictor import Augmentation, Predictor, mask_at
from segmentation.progress import Progress
from segmentation.reporting.figures import Drawn, draw_confusion, draw_panels, draw_per_class, draw_reliability
from segmentation.settings import EvaluateSettings

WORST, BEST = 10, 3


def evaluate(
    models: Path, raw: Path, features: Path, manifest: Path, reports: Path, settings: EvaluateSettings
) -> None:
    """Predict every val photo and write the scores.

    Tables: `metrics.json` (headline numbers at the photo's own size; those at training size, and the report's, beside
    them; those of the answer "background everywhere", where class 0 is a background; a number that is undefined is left
    out, and `interval` is the mIoU's in words, or why there is none), `per_class.csv`, `per_image.csv` (list order),
    `reliability.csv` and
    `per_image_confusion.npz` (`ids [N]`, and `[N, C, C]` matrices: `confusion` at the photo's own size and
    `confusion_training_size`). Pictures: `panels.png`, `worst.png`, `best.png`, `confusion.png`, `per_class.png` and
    `reliability.png`.

    Calibration is that of the softmax probabilities at training size. With test-time augmentation all numbers are those
    of the averaged logits, resized to the training size where they are not of it.

    Args:
        models: the folder of the model's two files.
        raw: photos and masks at their own size, VOC layout.
        features: `data/features`; kept tokens save the frozen blocks, where nothing is averaged at test time.
        manifest: `manifest.parquet`; its val rows are scored in list order.
        reports: the output folder.
        settings: the section `evaluate` of `params.yaml`.

    Raises:
        PipelineError: the model cannot be loaded, or no val mask has a labelled pixel.
    """
    try:
        predictor = Predictor.load(models, Augmentation(settings.flip, tuple(settings.scales), settings.sliding_window))
    except PipelineError as unusable:
        raise PipelineError(f"{unusable}; run train (`dvc repro`)") from None
    folder, classes, ids = VocFolder(raw), predictor.card.classes, split_ids(manifest, "val")
    kept = None
    if predictor.augmentation == Augmentation():
        kept = open_features(features, predictor.model.encoder, predictor.card.image_size, manifest)

    def logits(position: int) -> Tensor:
        """Of a val photo, from its kept tokens where there are any."""
        if kept is None:
            return predictor.logits(read_photo(folder.photo(ids[position]))[0])
        return predictor.logits_of(kept.tokens("val", position))

    started, sizes, scored = time.perf_counter(), [], []
    with Progress("evaluate", len(ids), "photo") as progress:
        for position, identifier in enumerate(ids):
            truth = read_mask(folder.mask(identifier))
            sizes.append(truth.shape[::-1])
            scored.append(_score(logits(position), truth, predictor.card.image_size))
            progress.advance()
    seconds = (time.perf_counter() - started) / len(ids)
    confusions, small, border, reliability = (torch.stack(counts) for counts in zip(*scored, strict=True))
    if not confusions.any():
        raise PipelineError(f"{raw}: no mask of the val split has a labelled pixel; there is nothing to score")

    confusion, border, reliability = confusions.sum(0), border.sum(0), reliability.sum(0)
    miou_ends, iou_ends = iou_intervals(confusions)
    headline, error = _scores(confusion), calibration_error(reliability)
    metrics = {
        "miou": headline["miou"],
        "miou_low": miou_ends[0].item(),
        "miou_high": miou_ends[1].item(),
        "interval": too_few(labelled(confusions)) or "95 % interval {:.4f} to {:.4f}".format(*miou_ends.tolist()),
        **headline,
        "classes_shown": int((confusion.sum(1) > 0).sum()),
        "boundary_iou": boundary_iou(border).nanmean().item(),
        "calibration_error": error,
        "training_size": {
            **_scores(small.sum(0)),
            "report_miou": report_miou(small),
            "report_miou_ceiling": report_miou(torch.diag_embed(small.sum(-1))),
        },
        "photos": len(ids),
    }
    if is_background(classes[0]):
        everywhere = torch.zeros_like(confusion)
        everywhere[:, 0] = confusion.sum(1)
        metrics["background_everywhere"] = _scores(everywhere)
    per_class = _per_class(confusions, border, iou_ends, classes)
    per_image = _per_image(confusions, ids, sizes)
    bins = reliability_table(reliability)
    write_json(reports / "metrics.json", _defined(metrics))
    for name, table in (("per_class", per_class), ("per_image", per_image), ("reliability", bins)):
        with atomic_path(reports / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f")
    with atomic_path(reports / "per_image_confusion.npz") as temporary:
        np.savez_compressed(
            temporary,
            ids=np.array(ids),
            confusion=confusions.numpy().astype(np.uint32),
            confusion_training_size=small.numpy().astype(np.uint32),
        )

    ranked = rank(per_image)
    chosen = {
        "panels": per_image.head(settings.panels), "worst": ranked.head(WORST), "best": ranked.tail(BEST)[::-1]
    }  # fmt: skip
    with Progress("evaluate: predict again to draw", sum(map(len, chosen.values())), "photo") as progress:
        for name, rows in chosen.items():
            draw_panels(reports / f"{name}.png", _predict_again(logits, folder, rows, progress), classes)
    draw_confusion(reports / "confusion.png", confusion.numpy(), classes)
    draw_per_class(reports / "per_class.png", per_class)
    draw_reliability(reports / "reliability.png", bins, error)
    print(f"evaluate: {len(ids)} photos, mIoU {metrics['miou']:.4f} ({metrics['interval']}), {seconds:.2f} s a photo")
    if note := caveat(metrics):
        print(f"evaluate: {note}")


def rank(per_image: pd.DataFrame) -> pd.DataFrame:
    """The scored rows of `per_image.csv`, worst first: by the share of their labelled pixels that are wrong.

    Not by the mean IoU of a photo, which a few stray pixels of one class can halve. Ranked by the table's six decimals,
    so that its readers rank the same.
    """
    scored = per_image.dropna(subset="pixel_accuracy").round({"pixel_accuracy": 6})
    return scored.sort_values("pixel_accuracy", kind="stable")


def _score(logits: Tensor, truth: Pixels, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One photo's confusion `[C, C]` at its own and at training size, border `[2, C]` and reliability `[3, BINS]`."""
    classes = len(logits)
    prediction = mask_at(logits, *truth.shape)
    small, small_truth = upsample(logits[None], (side, side))[0], resize_mask(truth, side)
    return (
        photo_confusion(prediction, truth, classes),
        photo_confusion(small.argmax(0).cpu().numpy(), small_truth, classes),
        boundary_counts(prediction, truth, classes),
        reliability_counts(small, torch.tensor(small_truth, device=small.device)),
    )


def _per_class(confusions: Tensor, border: Tensor, ends: Tensor, classes: list[str]) -> pd.DataFrame:
    """One row a class; its IoUs are NaN where neither truth nor prediction has it."""
    confusion = confusions.sum(0)
    pixels = confusion.sum(1)
    return pd.DataFrame(
        {
            "id": range(len(classes)),
            "class": classes,
            "iou": class_iou(confusion),
            "iou_low": ends[0],
            "iou_high": ends[1],
            "boundary_iou": boundary_iou(border),
            "pixels": pixels,
            "frequency": pixels / pixels.sum(),
            "photos": confusions.sum(2).count_nonzero(0),
        }
    )


def _per_image(confusions: Tensor, ids: list[str], sizes: list[tuple[int, int]]) -> pd.DataFrame:
    """One row a photo; its scores are NaN where the mask is all void. Its mean IoU is over the classes of the truth."""
    iou = class_iou(confusions).masked_fill(confusions.sum(-1) == 0, torch.nan)
    widths, heights = zip(*sizes, strict=True)
    return pd.DataFrame(
        {
            "id": ids,
            "width": widths,
            "height": heights,
            "miou": iou.nanmean(1),
            "pixel_accuracy": [pixel_accuracy(confusion) for confusion in confusions],
        }
    )


def _scores(confusion: Tensor) -> dict[str, float]:
    return {
        "miou": miou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "mean_class_accuracy": mean_class_accuracy(confusion),
    }


def _defined(scores: dict[str, Any]) -> dict[str, Any]:
    """Without what is NaN: JSON and MLflow know no such number."""
    inner = {key: _defined(value) if isinstance(value, dict) else value for key, value in scores.items()}
    return {key: value for key, value in inner.items() if not (isinstance(value, float) and math.isnan(value))}


def _predict_again(
    logits: Callable[[int], Tensor], folder: VocFolder, rows: pd.DataFrame, progress: Progress
) -> list[Drawn]:
    """Photo, truth and prediction of some rows of `per_image.csv`; of all photos they would fill the memory.

    Args:
        logits: of the val photo at a position; the rows' index is that position.
        folder: photos and masks.
        rows: of the table.
        progress: counts the photos.
    """
    drawn = []
    for position, identifier, right in rows[["id", "pixel_accuracy"]].itertuples():
        photo, truth = read_photo(folder.photo(identifier))[0], read_mask(folder.mask(identifier))
        title = identifier if math.isnan(right) else f"{identifier}  {1 - right:.1%} wrong"
        drawn.append(Drawn(title, photo, truth, mask_at(logits(position), *truth.shape)))
        progress.advance()
    return drawn
