"""Masks that are painted in colors, as CVAT exports them, become masks of class ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.images import Pixels, read_color_mask
from segmentation.data.palettes import Reference, in_words
from segmentation.data.voc import VocFolder
from segmentation.errors import PipelineError
from segmentation.files import atomic_path

SHOWN = 20


def read_by_color(folder: VocFolder, reference: Reference) -> None:
    """Turn every color mask whose colors the reference knows into a grey mask of class ids, in place; say how many.

    A mask with another color stays as it is, for `validate` to refuse, and is named.
    """
    done = 0
    unknown: list[str] = []
    for path in filter(_has_colors, sorted(folder.mask("any").parent.glob("*.png"))):
        name = f"{path.parent.name}/{path.name}"
        try:
            labels = by_color(read_color_mask(path), reference)
        except PipelineError as error:
            unknown.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
            continue
        with atomic_path(path) as temporary:
            Image.fromarray(labels).save(temporary)
        done += 1
    if done:
        print(f"fetch: color masks that became class ids, by the colors of {reference.origin}: {done}")
    for text in unknown[:SHOWN]:
        print(f"warning: {text}")
    if len(unknown) > SHOWN:
        print(f"warning: … and {len(unknown) - SHOWN} more color masks that are not read")


def by_color(colors: Pixels, reference: Reference) -> Pixels:
    """The labels `[H, W]` of a mask's colors `[H, W, 3]`.

    Raises:
        PipelineError: the reference lacks one of the colors.
    """
    codes = {_code(np.array(color)).item(): label for label, color in reference.colors.items()}
    known = np.array(sorted(codes))
    labels = np.array([codes[code] for code in known.tolist()], np.uint8)
    wanted = _code(colors)
    place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    if (missing := known[place] != wanted).any():
        row, column = np.argwhere(missing)[0].tolist()
        red, green, blue = colors[row, column].tolist()
        raise PipelineError(
            f"{in_words((red, green, blue))} at ({column}, {row}) is not in {reference.origin}; "
            f"{missing.mean():.2%} of the pixels have such colors"
        )
    return labels[place]


def _code(colors: NDArray[Any]) -> NDArray[np.int32]:
    """One number a color: `[…, 3]` to `[…]`."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return (red << 16) + (green << 8) + blue


def _has_colors(path: Path) -> bool:
    """Whether a PNG's header says so; what is wrong with the file otherwise shows later."""
    with path.open("rb") as stream:
        header = stream.read(26)
    return header.startswith(b"\x89PNG\r\n\x1a\n") and len(header) == 26 and header[24] == 8 and header[25] in (2, 6)
