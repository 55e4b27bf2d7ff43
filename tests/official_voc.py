"""An archive like VOC 2012's own in all that costs time or memory, or that a rule looks at; drawn, the same every time.

Photos and masks have VOC's sizes and weigh about as much; all 21 classes are there, and two masks are as void as the
original's most void ones, a third more so. Beside them lie as many members that nobody asks for as in the original.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.images import Pixels, mask_image
from segmentation.data.voc import CLASSES, VOID

TRAIN, VAL = 1464, 1449
UNLISTED = 14_212  # photos that no list of segmentation names
# Shares of void. The first two are in the original, which has 0.913 and 0.916 at 518×518, and no more above 0.9.
MOST_VOID = {"2009_000562": 0.913, "2008_006981": 0.916, "2011_000006": 0.93}
SIZES = [
    *[(500, 375)] * 16, *[(375, 500)] * 6, *[(500, 333)] * 6, *[(333, 500)] * 3, (500, 400), (500, 281), (486, 500),
    (320, 240), (200, 150), (142, 71),
]  # fmt: skip


def write_official(archive: Path) -> None:
    """Write the tar: not compressed, all in `VOCdevkit/VOC2012/`."""
    lists = {
        "train": sorted([*_ids("2007", TRAIN - 1), "2009_000562"]),
        "val": sorted([*_ids("2010", VAL - 2), "2008_006981", "2011_000006"]),
    }
    ids = sorted(identifier for listed in lists.values() for identifier in listed)
    others = list(_ids("2012", UNLISTED))
    lists["trainval"] = ids
    random = np.random.default_rng(2012)
    bases = [_base(random, *size) for size in SIZES]
    annotation = b"<annotation>" + b"<object><name>dog</name></object>" * 30 + b"</annotation>"
    with tarfile.open(archive, "w") as tar:
        for identifier in (*ids, *others):
            _add(tar, f"Annotations/{identifier}.xml", annotation)
        for name in CLASSES[1:]:
            for split in ("train", "val", "trainval"):
                _add(tar, f"ImageSets/Main/{name}_{split}.txt", "".join(f"{name} -1\n" for name in others).encode())
        for split, listed in lists.items():
            _add(tar, f"ImageSets/Segmentation/{split}.txt", "".join(f"{name}\n" for name in listed).encode())
        masks = {}
        for number, identifier in enumerate(ids):
            photo, mask = _pair(bases, number)
            if identifier in MOST_VOID:
                mask = _mostly_void(mask.shape, MOST_VOID[identifier])
            elif number % 40 == 0:  # and some in between
                mask = _mostly_void(mask.shape, 0.2 + 0.7 * (number % 400) / 400)
            masks[identifier] = _encoded(mask_image(mask), "PNG")
            _add(tar, f"JPEGImages/{identifier}.jpg", _encoded(Image.fromarray(photo), "JPEG", quality=94))
        small = _encoded(Image.fromarray(bases[-1][0]), "JPEG", quality=70)
        for identifier in others:
            _add(tar, f"JPEGImages/{identifier}.jpg", small)
        for folder in ("SegmentationClass", "SegmentationObject"):
            for identifier, mask_png in masks.items():
                _add(tar, f"{folder}/{identifier}.png", mask_png)


def _ids(year: str, count: int) -> Iterator[str]:
    """As VOC names its photos, with gaps: 2007_000033, 2007_000040, …"""
    return (f"{year}_{33 + 7 * number:06d}" for number in range(count))


def _pair(bases: list[tuple[Pixels, Pixels]], number: int) -> tuple[Pixels, Pixels]:
    """A base, moved a little, so that no photo is there twice; its objects are of other classes each time."""
    photo, objects = bases[number % len(bases)]
    moved = number // len(bases)
    shift = (moved % 11 * 3, moved // 11 * 5)
    table = np.arange(256, dtype=np.uint8)
    table[1:4] = [(number + 7 * place) % (len(CLASSES) - 1) + 1 for place in range(3)]
    return np.roll(photo, shift, (0, 1)), table[np.roll(objects, shift, (0, 1))]


def _base(random: np.random.Generator, width: int, height: int) -> tuple[Pixels, Pixels]:
    """A photo-like picture `[H, W, 3]`, noise of all octaves, with three blobs; and these blobs `[H, W]`, 1 to 3."""
    canvas: NDArray[np.float64] = np.full((height, width, 3), 128.0)
    for cells, strength in ((3, 90), (7, 60), (17, 45), (41, 30), (97, 24)):
        grid = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        canvas += (np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), float) / 255 - 0.5) * strength
    objects = np.zeros((height, width), np.uint8)
    down, across = np.mgrid[:height, :width] / [[[height]], [[width]]]
    for label in (1, 2, 3):
        y, x = random.uniform(0.25, 0.75, 2)
        radius, edge = random.uniform(0.12, 0.25), random.uniform(0, 0.02, (height, width))
        distance = np.hypot(down - y, across - x) + edge  # a ragged outline, as that of a hand-drawn mask
        objects[distance < radius + 0.02] = VOID
        objects[distance < radius] = label
        canvas[distance < radius] += random.uniform(-60, 60, 3)
    canvas += random.normal(0, 9, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8), objects


def _mostly_void(shape: tuple[int, ...], share: float) -> Pixels:
    """A dog on void."""
    mask, kept = np.full(shape, VOID, np.uint8), (1 - share) ** 0.5 / 2
    down, across = (slice(round(side * (0.5 - kept)), round(side * (0.5 + kept))) for side in shape)
    mask[down, across] = CLASSES.index("dog")
    return mask


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"VOCdevkit/VOC2012/{name}")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
