"""A small data set in VOC layout, drawn on the spot: coloured shapes on photo-like backgrounds, one look per class.

The same bytes on every run, and the same pixels on every machine: random numbers are integers of a fixed PCG64 stream,
one per photo, and pixels come from +, -, *, / and sqrt (exact in IEEE 754, unlike sin or exp) and Pillow's integer
resizing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from segmentation.data.images import Pixels, mask_image
from segmentation.data.voc import CLASSES, VOID, VocFolder
from segmentation.progress import Progress

PHOTOS = {"train": 72, "val": 24}
SIDES = (200, 320)  # shortest and longest side of a photo, pixels

# One colour per object class, far apart in CIELAB; neighbours in hue differ in lightness.
COLOURS = (
    (232, 40, 40), (15, 95, 40), (255, 150, 25), (20, 35, 85), (255, 228, 45), (120, 15, 125), (155, 225, 45),
    (125, 15, 35), (50, 225, 205), (125, 65, 10), (80, 165, 250), (120, 120, 5), (20, 60, 225), (255, 175, 145),
    (165, 100, 250), (35, 175, 65), (255, 140, 205), (0, 105, 115), (205, 0, 120), (210, 190, 255),
)  # fmt: skip
# Tones of the backgrounds: muted, as sky, wall, sand, grass, stone or wood are. (upper, lower)
TONES = (
    ((184, 198, 210), (128, 134, 112)),
    ((206, 198, 186), (142, 126, 110)),
    ((166, 176, 178), (176, 164, 142)),
    ((196, 190, 198), (120, 122, 130)),
    ((150, 160, 150), (112, 108, 98)),
    ((214, 206, 188), (132, 142, 142)),
)

Plane = NDArray[np.float64]
Mask = NDArray[np.bool_]


def draw_sample(root: Path, limit: int | None) -> None:
    """Draw photos, masks, lists and `classes.txt` into `root`; with 72 train and 24 val photos every class is in both.

    Args:
        root: the folder to write, in VOC layout.
        limit: at most so many photos of each split, the first of the list; None = all.
    """
    folder = VocFolder(root)
    splits = {split: [f"{split}_{index + 1:03d}" for index in range(count)][:limit] for split, count in PHOTOS.items()}
    for path in (folder.photo("any"), folder.mask("any"), folder.split_file("any")):
        path.parent.mkdir(parents=True, exist_ok=True)
    with Progress("fetch: draw", sum(map(len, splits.values())), "photo") as progress:
        for number, (split, ids) in enumerate(splits.items()):
            for index, identifier in enumerate(ids):
                photo, mask = _draw(number, index)
                photo.save(folder.photo(identifier), quality=92)
                mask_image(mask).save(folder.mask(identifier))
                progress.advance()
            folder.split_file(split).write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    folder.classes_file.write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def _draw(split: int, index: int) -> tuple[Image.Image, Pixels]:
    """One photo and its mask `[H, W]`; which classes it shows depends on its index alone, so that all take turns."""
    random = np.random.Generator(np.random.PCG64([2012, split, index]))
    width, height = (int(side) for side in random.integers(SIDES[0], SIDES[1] + 1, 2))
    canvas = _background(random, width, height)
    mask = np.zeros((height, width), np.uint8)
    objects = len(CLASSES) - 1
    labels = [index % objects + 1]
    if index % 3:
        labels.append((7 * index + 11) % objects + 1)  # never the same class: 6 i = 9 has no solution modulo 20
    light = 1 if random.integers(2) else -1
    for place, label in enumerate(labels):
        canvas, mask = _add_object(random, canvas, mask, label, place - (len(labels) - 1) / 2, light)
    exposure = _between(random, 0.9, 1.1)
    grain = random.integers(-5, 6, (height, width, 1)) + random.integers(-3, 4, (height, width, 3))
    pixels = np.clip(canvas * exposure + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), mask


def _background(random: np.random.Generator, width: int, height: int) -> Plane:
    """`[H, W, 3]`: an upper tone runs into a lower one over a soft, wavy horizon; noise of several octaves on top."""
    upper, lower = (np.array(tone, np.float64) for tone in TONES[int(random.integers(len(TONES)))])
    rows = np.arange(height, dtype=np.float64)[:, None] / height
    softness = _between(random, 0.1, 0.5)
    waves = (_noise(random, width, height, 2) - 0.5) * 0.4
    blend = np.clip((rows + waves - _between(random, 0.35, 0.65)) / softness + 0.5, 0, 1)[..., None]
    texture = np.zeros((height, width))
    for octave, cells in enumerate((3, 6, 13, 29, 61)):
        texture = texture + (_noise(random, width, height, cells) - 0.5) * (46, 34, 24, 16, 10)[octave]
    tint = np.stack([(_noise(random, width, height, 3) - 0.5) * 16 for _ in range(3)], axis=-1)
    # The ground is rougher than the sky.
    return upper * (1 - blend) + lower * blend + texture[..., None] * (0.35 + 0.65 * blend) + tint


def _add_object(
    random: np.random.Generator, canvas: Plane, mask: Pixels, label: int, offset: float, light: int
) -> tuple[Plane, Pixels]:
    """Paint one object with its shadow over the photo, and its class with a rim of void over the mask.

    Args:
        random: the photo's stream.
        canvas: the photo so far, `[H, W, 3]`.
        mask: its class ids so far, `[H, W]`.
        label: class id, 1 to 20.
        offset: where along the longer side: -0.5, 0 or 0.5 for left, middle and right (or above and below).
        light: 1 when the light comes from the left, -1 from the right.
    """
    height, width = mask.shape
    radii = [_between(random, 0.21, 0.28) if offset else _between(random, 0.25, 0.32) for _ in range(2)]
    along, across = 0.5 + offset * _between(random, 0.42, 0.52), _between(random, 0.44, 0.56)
    x, y = (along, across) if width >= height else (across, along)
    side = (width * 0.6 + height * 0.6) / 1.2  # between both sides, so that objects are neither flat nor tall
    u, v = _object_plane(random, width, height, (x * width, y * height), (radii[0] * side, radii[1] * side))

    kind = label - 1  # 4 shapes and 5 textures: no two of the 20 classes share both
    gauge = _gauge(kind % 4, u, v)
    alpha, accent = _coverage(gauge <= 1), _coverage(_texture(kind % 5, gauge, u, v))
    base = np.array(COLOURS[kind], np.float64)
    bright = int(base.sum()) > 330
    second = base * 0.62 if bright else base * 0.62 + 255 * 0.38
    opacity, share = (np.asarray(image, np.float64)[..., None] / 255 for image in (alpha, accent))
    lit = 1 - 0.10 * (light * u + v)[::2, ::2, None] - 0.10 * np.asarray(gauge)[::2, ::2, None] + 0.06
    paint = (base * (1 - share) + second * share) * np.clip(lit, 0.75, 1.2)

    drop = (light * round(side * 0.025), round(side * 0.035))
    shade = Image.new("L", (width, height))
    shade.paste(alpha, drop)
    shade = shade.resize((width // 8, height // 8), Image.Resampling.BOX).resize(shade.size, Image.Resampling.BICUBIC)
    canvas = canvas * (1 - 0.45 * np.asarray(shade, np.float64)[..., None] / 255)
    canvas = canvas * (1 - opacity) + paint * opacity

    solid = alpha.point(lambda value: 255 * (value > 127))
    outer = np.asarray(solid.filter(ImageFilter.MaxFilter(5))) > 0  # 2 pixels out and 1 in: a rim of 3
    inner = np.asarray(solid.filter(ImageFilter.MinFilter(3))) > 0
    return canvas, np.where(inner, label, np.where(outer, VOID, mask)).astype(np.uint8)


def _object_plane(
    random: np.random.Generator, width: int, height: int, centre: tuple[float, float], radii: tuple[float, float]
) -> tuple[Plane, Plane]:
    """Coordinates in which the object is upright and reaches from -1 to 1, `[2 H, 2 W]`: two samples a pixel's side."""
    lean = _between(random, -0.4, 0.4)
    norm = np.sqrt(1 + lean * lean)
    x = ((np.arange(2 * width) + 0.5) / 2 - centre[0])[None, :]
    y = ((np.arange(2 * height) + 0.5) / 2 - centre[1])[:, None]
    return (x - y * lean) / (norm * radii[0]), (x * lean + y) / (norm * radii[1])


def _gauge(shape: int, u: Plane, v: Plane) -> Plane:
    """0 at the heart of the shape, 1 on its outline, more beyond."""
    if shape == 0:  # ellipse
        return np.sqrt(u * u + v * v)
    if shape == 1:  # rectangle
        return np.maximum(abs(u), abs(v)) / 0.88
    if shape == 2:  # triangle
        return np.maximum(v, abs(u) * 1.73 - v) / 0.9
    return np.maximum(abs(v), abs(u) * 0.866 + abs(v) * 0.5) / 0.92  # hexagon


def _texture(texture: int, gauge: Plane, u: Plane, v: Plane) -> Mask:
    """Where the class's second tone is."""
    if texture == 0:  # plain
        return np.zeros_like(gauge, dtype=bool)
    if texture == 1:  # stripes
        return _wave(v * 2.5) < 0.4
    if texture == 2:  # dots
        return _wave(u * 2.5) ** 2 + _wave(v * 2.5) ** 2 < 0.4
    if texture == 3:  # rings
        return abs(gauge - 0.62) < 0.14
    return (_wave(u * 1.5) < 0.5) ^ (_wave(v * 1.5) < 0.5)  # checks


def _wave(values: Plane) -> Plane:
    """Triangle wave of period 1: 0 at whole numbers, 1 halfway between."""
    return abs(values - np.floor(values + 0.5)) * 2


def _coverage(inside: Mask) -> Image.Image:
    """Share of each pixel that is inside, 0 to 255, from 2 × 2 samples."""
    return Image.fromarray(inside.astype(np.uint8) * 255).reduce(2)


def _noise(random: np.random.Generator, width: int, height: int, cells: int) -> Plane:
    """Smooth noise from 0 to 1, `[H, W]`, with about `cells` bumps along a side."""
    small = Image.fromarray(random.integers(0, 256, (cells, cells), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float64) / 255


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * (int(random.integers(1025)) / 1024)
