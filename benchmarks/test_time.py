"""Test-time augmentation on the trained model: what each kind adds to the val mIoU, and what it costs in time.

    python -m benchmarks.test_time --photos 200 --json test_time.json

Time is that of the predictions alone, as a ratio of the plain one's in the same run; reading photos is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from segmentation.data.images import read_mask, read_photo
from segmentation.data.pairs import split_ids
from segmentation.data.voc import VocFolder
from segmentation.errors import PipelineError
from segmentation.files import write_json
from segmentation.metrics.confusion import confusion_matrices, miou
from segmentation.paths import MANIFEST, MODEL, RAW
from segmentation.prediction.predictor import Augmentation, Predictor

SCALES = (0.75, 1.0, 1.25)
VARIANTS = {
    "plain": Augmentation(),
    "flip": Augmentation(flip=True),
    "scales": Augmentation(scales=SCALES),
    "sliding window": Augmentation(sliding_window=True),
    "all": Augmentation(flip=True, scales=SCALES, sliding_window=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, help="only so many val photos, the first of the list")
    parser.add_argument("--json", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    try:
        measure(arguments.photos, arguments.json)
    except PipelineError as error:
        sys.exit(f"error: {error}")


def measure(photos: int | None, result: Path | None) -> None:
    """Predict the first `photos` val photos in every way and print the table."""
    plain, folder = Predictor.load(MODEL), VocFolder(RAW)
    ids, classes = split_ids(MANIFEST, "val")[:photos], len(plain.card.classes)
    predictors = {name: replace(plain, augmentation=augmentation) for name, augmentation in VARIANTS.items()}
    seconds = dict.fromkeys(VARIANTS, 0.0)
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in VARIANTS}
    warm, _ = read_photo(folder.photo(ids[0]))
    for predictor in predictors.values():
        predictor.mask(warm)
    # Variants take turns on each photo, so that a machine that slows down slows all of them.
    for identifier in tqdm(ids, unit="photo", disable=None):
        photo, _ = read_photo(folder.photo(identifier))
        truth = torch.tensor(read_mask(folder.mask(identifier)))[None]
        for name, predictor in predictors.items():
            started = time.perf_counter()
            mask = predictor.mask(photo)  # on the CPU when it returns, so a GPU has finished
            seconds[name] += time.perf_counter() - started
            confusion[name] += confusion_matrices(torch.from_numpy(mask)[None], truth, classes)[0]

    rows = [
        {
            "variant": name,
            "miou": miou(confusion[name]),
            "gain": miou(confusion[name]) - miou(confusion["plain"]),
            "seconds_a_photo": seconds[name] / len(ids),
            "cost": seconds[name] / seconds["plain"],
        }
        for name in VARIANTS
    ]
    print(f"{len(ids)} photos, {plain.card.encoder} at {plain.card.image_size}, {plain.device}")
    print(f"{'':16}{'mIoU':>8}{'gain':>9}{'cost':>8}")
    for row in rows:
        print(f"{row['variant']:16}{row['miou']:8.4f}{row['gain']:+9.4f}{row['cost']:7.2f}×")
    if result:
        write_json(result, {"photos": len(ids), "device": str(plain.device), "rows": rows})


if __name__ == "__main__":
    main()
