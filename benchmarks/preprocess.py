"""Resizing all pairs: `preprocess` against a plain single-process loop with torchvision, and how both grow.

The plain loop opens photo and mask, resizes them with torchvision (antialiased bilinear, nearest) and saves PNGs. Ours
does the same on all cores, and checks and hashes every pair and writes the manifest. Masks must be identical.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from benchmarks.side_by_side import compare, in_a_fresh_process, parser, run, settings_for, take_turns
from segmentation.data.fetch import fetch
from segmentation.data.preprocess import preprocess
from segmentation.data.voc import SPLITS, VocFolder
from segmentation.errors import PipelineError


def main() -> None:
    made = parser("preprocess", __doc__)
    made.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    made.add_argument("--photos", type=int, nargs="+", default=[10, 300], help="numbers of pairs (default: 10 300)")
    made.add_argument("--size", type=int, default=518, help="side of the squares (default: %(default)s)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    print(f"{'pairs':44}{'plain':>12}{'ours':>12}{'ratio':>9}{'peak memory':>14}")
    for photos in arguments.photos:
        with tempfile.TemporaryDirectory() as folder:
            raw, theirs, ours = (Path(folder) / name for name in ("raw", "plain", "ours"))
            fetch(settings_for(arguments.voc, fetch__limit=photos // 2).fetch, raw)
            sides = {
                "plain": lambda raw=raw, out=theirs: plain(raw, out, arguments.size),
                "ours": lambda raw=raw, out=ours: preprocess(raw, out, arguments.size),
            }
            seconds = take_turns(sides, arguments.rounds)
            check(raw, theirs, ours)
            row: dict[str, float] = {"pairs": sum(len(VocFolder(raw).ids(split)) for split in SPLITS)}
            row |= compare(seconds["plain"], seconds["ours"])
            row["peak_memory_gb"] = in_a_fresh_process(preprocess, raw, Path(folder) / "again", arguments.size).peak_gb
        rows.append(row)
        print(
            f"{row['pairs']:<44.0f}{row['plain_s']:10.3f} s{row['ours_s']:10.3f} s{row['ratio']:8.2f}×"
            f"{row['peak_memory_gb']:11.2f} GB",
            flush=True,
        )
    return {"ratio": rows[-1]["ratio"], "rows": rows, "checked": "masks are identical"}


def plain(raw: Path, out: Path, size: int) -> None:
    folder = VocFolder(raw)
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for identifier in folder.ids(split):
            photo = Image.open(folder.photo(identifier)).convert("RGB")
            functional.resize(photo, [size, size]).save(out / "images" / f"{identifier}.png")
            mask = Image.open(folder.mask(identifier))
            functional.resize(mask, [size, size], InterpolationMode.NEAREST).save(out / "masks" / f"{identifier}.png")


def check(raw: Path, theirs: Path, ours: Path) -> None:
    for split in SPLITS:
        for identifier in VocFolder(raw).ids(split):
            one, other = (np.array(Image.open(root / "masks" / f"{identifier}.png")) for root in (theirs, ours))
            if not np.array_equal(one, other):
                raise PipelineError(f"{identifier}: the masks differ")


if __name__ == "__main__":
    main()
