"""Eight epochs on 64 real pairs at ViT-B/14, 518×518, batch 2: `encode` and `train` against the plain recipe's loop.

Ours is measured whole, Lightning, loaders and checkpoints included, each stage in a process of its own. Every epoch of
the plain loop costs the same, so some of its steps are measured, half of them before ours and half after, and
multiplied; validation is left out of both (ours has one photo of it). With `--measured-epochs` below `--epochs` our
epochs are multiplied as well, not `encode`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import in_a_fresh_process, line, parser, run, settings_for, timed
from benchmarks.training_step import PlainStep
from segmentation.data.fetch import fetch
from segmentation.data.pairs import PairDataset, split_ids
from segmentation.data.preprocess import preprocess
from segmentation.data.voc import VocFolder
from segmentation.model.features import encode
from segmentation.training.loop import train


def main() -> None:
    made = parser("training_run", __doc__)
    made.add_argument("--pairs", type=int, default=64, help="train pairs (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=8, help="passes over them (default: %(default)s)")
    made.add_argument("--measured-epochs", type=int, help="how many of ours are measured (default: all)")
    made.add_argument("--plain-steps", type=int, default=8, help="how many plain steps are (default: %(default)s)")
    made.add_argument("--encoder", default="vit_base_patch14_dinov2", help="a timm name (default: %(default)s)")
    made.add_argument("--size", type=int, default=518, help="side of the photos (default: %(default)s)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    epochs, measured = arguments.epochs, arguments.measured_epochs or arguments.epochs
    settings = settings_for(
        arguments.voc, fetch__limit=arguments.pairs, encoder__name=arguments.encoder,
        preprocess__image_size=arguments.size, train__epochs=measured, train__panel_epochs=[],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        raw, processed, features, scratch = (Path(name) for name in ("raw", "processed", "features", "scratch"))
        fetch(settings.fetch, raw)
        lists = VocFolder(raw)
        lists.split_file("val").write_text(f"{lists.ids('val')[0]}\n")
        preprocess(raw, processed, arguments.size)
        pairs = PairDataset(processed, split_ids(processed / "manifest.parquet", "train"))
        plain = PlainStep(arguments.encoder, arguments.size)

        def step(index: int) -> None:
            batch = [pairs[(2 * index + k) % len(pairs)] for k in range(2)]
            plain(torch.stack([image for image, _, _ in batch]), torch.stack([mask for _, mask, _ in batch]))

        def plain_steps(count: int) -> list[float]:
            return [timed(partial(step, index)) for index in range(count)]

        plain_steps(1)
        steps = plain_steps(arguments.plain_steps // 2)
        encoding = in_a_fresh_process(encode, settings, processed, features, scratch)
        size = sum(path.stat().st_size for path in features.iterdir())
        training = in_a_fresh_process(
            train, settings, processed, features, lists.classes(), Path("m"), Path("r"), scratch
        )
        steps += plain_steps(arguments.plain_steps - len(steps))
        os.chdir(arguments.voc)  # out of the folder that goes
    whole = {
        "plain_s": statistics.median(steps) * epochs * -(-arguments.pairs // 2),
        "ours_s": encoding.seconds + training.seconds / measured * epochs,
    }
    whole["ratio"] = whole["plain_s"] / whole["ours_s"]
    print(f"{f'{arguments.pairs} pairs, {epochs} epochs, {arguments.encoder}':44}{'plain':>12}{'ours':>12}{'ratio':>9}")
    line("whole run", whole)
    print(f"encode: {encoding.seconds:.1f} s, {size / 1e6:.0f} MB kept, peak memory {encoding.peak_gb:.2f} GB")
    print(f"train: {training.seconds / measured:.1f} s an epoch, peak memory {training.peak_gb:.2f} GB")
    return {
        **whole,
        "encode": {**encoding._asdict(), "bytes": size},
        "epoch_s": training.seconds / measured,
        "training_peak_gb": training.peak_gb,
        "measured_epochs": measured,
        "plain_steps_s": steps,
    }


if __name__ == "__main__":
    main()
