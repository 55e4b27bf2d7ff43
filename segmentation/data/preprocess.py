"""Resize every listed pair to the training size and describe it in the manifest.

A faulty pair does not stop the run: its row says what is wrong, and `validate` judges all of them together.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segmentation.data.images import Pixels, decode_mask, decode_photo, mask_image, resize_mask, resize_photo
from segmentation.data.parallel import thread_pool
from segmentation.data.photo_ids import Problems, id_fault, read_problems
from segmentation.data.voc import SPLITS, VOID, VocFolder
from segmentation.errors import PipelineError
from segmentation.files import atomic_path
from segmentation.progress import Progress

ROWS = 256  # of the manifest, held in memory at once

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("photo_problem", pa.string()),
        ("mask_problem", pa.string()),
        ("photo_format", pa.string()),
        ("photo_width", pa.int64()),
        ("photo_height", pa.int64()),
        ("mask_width", pa.int64()),
        ("mask_height", pa.int64()),
        ("size", pa.int64()),
        ("photo_doubt", pa.string()),
        ("original_labels", pa.list_(pa.int64())),
        ("original_colors", pa.list_(pa.string())),
        ("original_palette", pa.string()),
        ("labels", pa.list_(pa.int64())),
        ("pixels", pa.list_(pa.int64())),
        ("void_share", pa.float64()),
        ("image_sha256", pa.string()),
        ("mask_sha256", pa.string()),
    ]
)


@dataclass
class Pair:
    """What the manifest says of one listed pair; `None` where a fault left it unknown."""

    photo_problem: str | None = None
    mask_problem: str | None = None
    photo_format: str | None = None
    photo_width: int | None = None
    photo_height: int | None = None
    mask_width: int | None = None
    mask_height: int | None = None
    photo_doubt: str | None = None  # why its brightness may be read wrong
    original_labels: list[int] | None = None
    original_colors: list[str] | None = None  # of these labels, "#rrggbb", or "" outside of the palette; None = grey
    original_palette: str | None = None  # hash of the mask's whole palette
    labels: list[int] | None = None
    pixels: list[int] | None = None
    void_share: float | None = None
    image_sha256: str | None = None
    mask_sha256: str | None = None


def preprocess(raw: Path, processed: Path, size: int) -> None:
    """Write `images/<id>.png`, `masks/<id>.png` and `manifest.parquet` (columns: `SCHEMA`) under `processed`.

    Runs on all cores; memory does not grow with the number of pairs.

    Args:
        raw: a folder in VOC layout.
        processed: the output folder.
        size: side of the square that photos and masks are resized to, pixels.
    """
    folder = VocFolder(raw)
    classes = len(folder.classes())
    listed = [(split, identifier) for split in SPLITS for identifier in folder.ids(split)]
    times = Counter(identifier for _, identifier in listed)
    for name in ("images", "masks"):
        (processed / name).mkdir(parents=True, exist_ok=True)

    faulty = 0
    with (
        atomic_path(processed / "manifest.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA) as writer,
        Progress(f"preprocess: resize to {size}×{size}", len(times), "pair") as progress,
    ):
        finished = _process_all(raw, processed, size, classes, list(times))
        repeated: dict[str, Pair] = {}
        waiting = iter(listed)
        while some := list(islice(waiting, ROWS)):
            rows = []
            for split, identifier in some:
                if (pair := repeated.get(identifier)) is None:
                    pair = next(finished)
                    progress.advance()
                    faulty += bool(pair.photo_problem or pair.mask_problem)
                    if times[identifier] > 1:
                        repeated[identifier] = pair
                rows.append({"id": identifier, "split": split, "size": size, **asdict(pair)})
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    counts = ", ".join(f"{sum(split == s for s, _ in listed)} {split}" for split in SPLITS)
    print(f"preprocess: {counts} pairs at {size}×{size}" + (f"; {faulty} faulty, see validate" if faulty else ""))


def _process_all(raw: Path, processed: Path, size: int, classes: int, identifiers: list[str]) -> Iterator[Pair]:
    """Process pairs on all cores, a bounded number in flight; yields them in their order."""
    problems = read_problems(VocFolder(raw))
    with thread_pool(len(identifiers)) as (pool, workers):
        running: deque[Future[Pair]] = deque()
        for identifier in identifiers:
            running.append(pool.submit(_process, raw, processed, size, classes, identifier, problems))
            if len(running) == 4 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _process(
    raw: Path, processed: Path, size: int, classes: int, identifier: str, problems: tuple[Problems, Problems]
) -> Pair:
    pair, known = Pair(), [found.get(identifier) for found in problems]
    if fault := id_fault(identifier):
        pair.photo_problem = pair.mask_problem = known[0] or f"id {fault}"
        return pair
    folder = VocFolder(raw)
    try:
        decoded = decode_photo(folder.photo(identifier))
        photo, pair.photo_format, pair.photo_doubt = decoded.image, decoded.kind, decoded.doubt
        pair.photo_width, pair.photo_height = photo.size
        photo = resize_photo(photo, size, size)
        pair.image_sha256 = hashlib.sha256(photo.tobytes()).hexdigest()
        with atomic_path(processed / "images" / f"{identifier}.png") as temporary:
            photo.save(temporary, compress_level=1)
    except FileNotFoundError:
        pair.photo_problem = known[0] or f"JPEGImages/{identifier}.jpg is missing"
    except PipelineError as error:
        pair.photo_problem = str(error)
    try:
        original, colors = decode_mask(folder.mask(identifier))
        pair.mask_height, pair.mask_width = original.shape
        labels = np.unique(original).tolist()
        pair.original_labels = labels
        if colors is not None:
            flat = bytes(colors)
            triples = [flat[3 * label : 3 * label + 3].hex() for label in labels]
            pair.original_colors = [f"#{triple}" if triple else "" for triple in triples]
            pair.original_palette = hashlib.sha256(flat).hexdigest()
        mask = resize_mask(original, size)
        _describe(pair, mask, classes)
        with atomic_path(processed / "masks" / f"{identifier}.png") as temporary:
            mask_image(mask).save(temporary)
    except FileNotFoundError:
        pair.mask_problem = known[1] or f"SegmentationClass/{identifier}.png is missing"
    except PipelineError as error:
        pair.mask_problem = str(error)
    return pair


def _describe(pair: Pair, mask: Pixels, classes: int) -> None:
    counts = np.bincount(mask.ravel(), minlength=256)
    pair.labels = np.flatnonzero(counts).tolist()
    pair.pixels = counts[:classes].tolist()
    pair.void_share = float(counts[VOID] / mask.size)
    pair.mask_sha256 = hashlib.sha256(mask.tobytes()).hexdigest()
