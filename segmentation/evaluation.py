"""Scores of the trained model on the val split, at each photo's own size and at training size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from segmentation.data import split_ids
from segmentation.figures import draw_panels
from segmentation.files import atomic_path, write_json
from segmentation.images import Pixels, read_mask, read_photo, resize_mask
from segmentation.metrics import (
    class_iou,
    confusion_matrices,
    mean_class_accuracy,
    miou,
    pixel_accuracy,
    report_miou,
)
from segmentation.predictor import Predictor, mask_at
from segmentation.voc import VocFolder


def evaluate(models: Path, raw: Path, manifest: Path, reports: Path, panels: int) -> None:
    """Predict every val photo and write the scores.

    Writes `metrics.json` (headline numbers at the photo's own size; those at training size, and the report's, beside
    them), `per_class.csv`, `per_image_confusion.npz` (`ids [N]`, and `[N, C, C]` matrices: `confusion` at the photo's
    own size and `confusion_training_size`) and `panels.png`.

    Args:
        models: the folder of the model's two files.
        raw: photos and masks at their own size, VOC layout.
        manifest: `manifest.parquet`; its val rows are scored in list order.
        reports: the output folder.
        panels: how many photos are drawn, the first of the list.
    """
    predictor = Predictor.load(models)
    folder, classes = VocFolder(raw), predictor.card.classes
    ids = split_ids(manifest, "val")
    own_size, training_size = [], []
    drawn: list[tuple[Image.Image, Pixels, Pixels]] = []
    for identifier in tqdm(ids, desc="evaluate", unit="photo", disable=None):
        photo, _ = read_photo(folder.photo(identifier))
        truth = read_mask(folder.mask(identifier))
        logits = predictor.logits(photo)
        prediction = mask_at(logits, *truth.shape)
        own_size.append(_confusion(prediction, truth, len(classes)))
        small_truth = resize_mask(truth, predictor.card.image_size)
        training_size.append(_confusion(logits.argmax(0).cpu().numpy(), small_truth, len(classes)))
        if len(drawn) < panels:
            drawn.append((photo, truth, prediction))

    confusion, small = torch.stack(own_size), torch.stack(training_size)
    scores = {
        **_scores(confusion.sum(0)),
        "training_size": {**_scores(small.sum(0)), "report_miou": report_miou(small)},
        "photos": len(ids),
    }
    write_json(reports / "metrics.json", scores)
    _write_per_class(reports / "per_class.csv", confusion.sum(0), classes)
    with atomic_path(reports / "per_image_confusion.npz") as temporary:
        np.savez_compressed(
            temporary,
            ids=np.array(ids),
            confusion=confusion.numpy().astype(np.uint32),
            confusion_training_size=small.numpy().astype(np.uint32),
        )
    draw_panels(reports / "panels.png", drawn, classes)
    print(f"evaluate: {len(ids)} photos, mIoU {scores['miou']:.4f}, pixel accuracy {scores['pixel_accuracy']:.4f}")


def _confusion(prediction: Pixels, truth: Pixels, classes: int) -> Tensor:
    return confusion_matrices(torch.from_numpy(prediction)[None], torch.tensor(truth)[None], classes)[0]


def _scores(confusion: Tensor) -> dict[str, Any]:
    return {
        "miou": miou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "mean_class_accuracy": mean_class_accuracy(confusion),
    }


def _write_per_class(path: Path, confusion: Tensor, classes: list[str]) -> None:
    """One row a class; `iou` is empty for a class that neither truth nor prediction has."""
    table = pd.DataFrame({"class": classes, "iou": class_iou(confusion), "pixels": confusion.sum(1)})
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index_label="id", float_format="%.6f")
