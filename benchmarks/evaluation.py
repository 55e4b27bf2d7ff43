"""`evaluate` on 64 real val photos at ViT-B/14, 518×518, against a plain loop with torchmetrics over the same model.

The plain loop reads, resizes and predicts each photo, resizes the logits to the photo's own size and updates
torchmetrics. Ours goes on from the tokens that `encode` kept, and does all that the stage does: boundaries,
calibration, intervals, tables and pictures. Both must give the same IoU of every class and the same accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torchmetrics import Accuracy, JaccardIndex, MetricCollection

from benchmarks.side_by_side import compare, in_a_fresh_process, line, parser, run, settings_for, take_turns
from segmentation.data.fetch import fetch
from segmentation.data.images import read_mask, read_photo, resize_photo
from segmentation.data.pairs import split_ids
from segmentation.data.preprocess import preprocess
from segmentation.data.voc import VOID, VocFolder
from segmentation.errors import PipelineError
from segmentation.evaluation.evaluate import evaluate
from segmentation.model import segmenter as model_files
from segmentation.model.features import encode
from segmentation.settings import Settings
from segmentation.training.loop import model_card


def main() -> None:
    made = parser("evaluation", __doc__)
    made.add_argument("--rounds", type=int, default=1, help="turns of each side (default: %(default)s)")
    made.add_argument("--photos", type=int, default=64, help="val photos (default: %(default)s)")
    made.add_argument("--encoder", default="vit_base_patch14_dinov2", help="a timm name (default: %(default)s)")
    made.add_argument("--size", type=int, default=518, help="side of the photos (default: %(default)s)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = settings_for(
        arguments.voc, fetch__limit=arguments.photos, encoder__name=arguments.encoder,
        preprocess__image_size=arguments.size,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fetch(settings.fetch, Path("raw"))
        lists = VocFolder(Path("raw"))
        lists.split_file("train").write_text(f"{lists.ids('train')[0]}\n")
        preprocess(Path("raw"), Path("processed"), arguments.size)
        torch.manual_seed(settings.train.seed)
        card = model_card(settings, lists.classes())
        model_files.save(model_files.build(card), card, Path("models"))
        encode(settings, Path("processed"), Path("features"), Path("scratch"))
        found: dict[str, Any] = {}
        sides = {"plain": lambda: found.update(plain(arguments.size)), "ours": lambda: ours(settings)}
        seconds = take_turns(sides, arguments.rounds)
        check(found)
        memory = {"all": in_a_fresh_process(ours, settings).peak_gb}
        lists.split_file("val").write_text("".join(f"{name}\n" for name in lists.ids("val")[:8]))
        preprocess(Path("raw"), Path("processed"), arguments.size)
        encode(settings, Path("processed"), Path("features"), Path("scratch"))
        memory["8 photos"] = in_a_fresh_process(ours, settings).peak_gb
        os.chdir(arguments.voc)  # out of the folder that goes
    row = compare(seconds["plain"], seconds["ours"])
    print(f"{f'{arguments.photos} photos, {arguments.encoder}':44}{'plain':>12}{'ours':>12}{'ratio':>9}")
    line("evaluation", row)
    print(f"peak memory of ours: {memory['all']:.2f} GB, with 8 photos {memory['8 photos']:.2f} GB")
    return {**row, "peak_memory_gb": memory, "checked": "IoU of every class and pixel accuracy are equal"}


@torch.inference_mode()
def plain(size: int) -> dict[str, Any]:
    model, card = model_files.load(Path("models"))
    classes, folder = len(card.classes), VocFolder(Path("raw"))
    scores = MetricCollection(
        {
            "iou": JaccardIndex("multiclass", num_classes=classes, ignore_index=VOID, average=None),
            "accuracy": Accuracy("multiclass", num_classes=classes, ignore_index=VOID, average="micro"),
        }
    )
    for identifier in split_ids(Path("processed/manifest.parquet"), "val"):
        photo, _ = read_photo(folder.photo(identifier))
        truth = torch.tensor(read_mask(folder.mask(identifier))).long()[None]
        pixels = torch.from_numpy(np.array(resize_photo(photo, size, size))).permute(2, 0, 1)[None]
        logits = F.interpolate(model(pixels), size=truth.shape[1:], mode="bilinear")
        scores.update(logits.argmax(1), truth)
    return scores.compute()


def ours(settings: Settings) -> None:
    manifest = Path("processed/manifest.parquet")
    evaluate(Path("models"), Path("raw"), Path("features"), manifest, Path("reports"), settings.evaluate)


def check(found: dict[str, Any]) -> None:
    scores = json.loads(Path("reports/metrics.json").read_text(encoding="utf-8"))
    per_class = pd.read_csv("reports/per_class.csv")["iou"]
    # torchmetrics gives 0 where neither truth nor prediction has the class
    if not np.allclose(per_class.fillna(0), found["iou"], atol=1e-5):
        raise PipelineError(f"IoUs differ: {per_class.tolist()} and {found['iou'].tolist()}")
    if abs(scores["pixel_accuracy"] - found["accuracy"].item()) > 1e-5:
        raise PipelineError(f"accuracies differ: {scores['pixel_accuracy']} and {found['accuracy'].item()}")


if __name__ == "__main__":
    main()
