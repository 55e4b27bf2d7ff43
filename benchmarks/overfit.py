"""Overfit eight real pairs, to show that gradients, loss, masks and metrics fit together.

ViT-S/14 with random weights at 224×224; its last block and the decoder are trained. About ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.side_by_side import PARAMS, SUBSET
from segmentation.errors import PipelineError
from segmentation.settings import load_settings

PAIRS = 8
OVERRIDES = {
    "fetch.source": "directory", "fetch.limit": PAIRS, "preprocess.image_size": 224,
    "encoder.name": "vit_small_patch14_dinov2", "encoder.pretrained": False, "decoder.channels": [256, 128, 64, 48],
    "train.lr": 1e-3, "train.cross_entropy": 1.0, "train.lovasz_softmax": 0.5, "train.schedule": "cosine",
    "train.warmup_epochs": 3, "train.gradient_clip": 1.0, "train.panel_epochs": [], "train.keep": "last",
    "train.workers": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.overfit"
    )
    parser.add_argument("--voc", type=Path, default=SUBSET, help="a folder in VOC layout (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=150, help="passes over the eight pairs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--curve", type=Path, help="draw the curve to this PNG")
    arguments = parser.parse_args()
    if not arguments.voc.is_dir():
        parser.error(f"{arguments.voc}: not found; name a folder in VOC layout with --voc")
    try:
        overfit(arguments.voc.resolve(), arguments.epochs, arguments.json, arguments.curve)
    except PipelineError as error:
        sys.exit(f"error: {error}")


def overfit(voc: Path, epochs: int, result: Path | None, curve: Path | None) -> None:
    """Fetch, preprocess, train and evaluate the first pairs of `train.txt`, with `val` made of the same pairs."""
    import pandas as pd

    from segmentation.data.fetch import fetch
    from segmentation.data.preprocess import preprocess
    from segmentation.data.voc import VocFolder
    from segmentation.evaluation.evaluate import evaluate
    from segmentation.files import write_json
    from segmentation.model.features import encode
    from segmentation.reporting.figures import draw_curves
    from segmentation.training.loop import train

    settings = load_settings(PARAMS, OVERRIDES | {"fetch.directory": str(voc), "train.epochs": epochs})
    result, curve = (path.resolve() if path else None for path in (result, curve))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        raw, processed, features = Path("raw"), Path("processed"), Path("features")
        models, reports = Path("models"), Path("reports")
        fetch(settings.fetch, raw)
        lists = VocFolder(raw)
        lists.split_file("val").write_bytes(lists.split_file("train").read_bytes())
        preprocess(raw, processed, settings.preprocess.image_size)
        started = time.monotonic()
        encode(settings, processed, features, Path("scratch"))
        train(settings, processed, features, lists.classes(), models, reports, Path("scratch"))
        seconds = time.monotonic() - started
        evaluate(models, raw, features, processed / "manifest.parquet", reports, settings.evaluate)
        scores = json.loads((reports / "metrics.json").read_text(encoding="utf-8"))
        history = pd.read_csv(reports / "history.csv")
        if curve:
            draw_curves(curve, history, None)
    small = scores["training_size"]["miou"]
    print(
        f"\n{PAIRS} pairs, {epochs} epochs, {seconds / epochs:.1f} s an epoch: true mIoU {small:.4f} at training size, "
        f"{scores['miou']:.4f} at the photos' own size"
    )
    if result:
        write_json(
            result,
            {
                "miou": small,
                "miou_own_size": scores["miou"],
                "pairs": PAIRS,
                "epochs": epochs,
                "seconds_an_epoch": round(seconds / epochs, 2),
                "val_miou": history["val_miou"].tolist(),
            },
        )


if __name__ == "__main__":
    main()
