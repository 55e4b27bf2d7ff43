"""Reading photos and masks safely, and resizing them: the same for preprocessing, evaluation and serving."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from segmentation.errors import PipelineError
from segmentation.file_kinds import HEAD, file_kind, kind_of
from segmentation.files import no_file
from segmentation.voc import palette

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000

Pixels = NDArray[np.uint8]


def read_photo(source: Path | bytes) -> tuple[Image.Image, str]:
    """Decode a photo to RGB, upright (EXIF orientation applied).

    Args:
        source: a file, or a photo's bytes.

    Returns:
        The image and its real format, "JPEG" or "PNG", whatever the file is called.

    Raises:
        PipelineError: no JPEG or PNG, truncated, or larger than `MAX_BYTES` or `MAX_PIXELS`.
    """
    image, _ = _open(source, ("JPEG", "PNG"))
    kind = image.format or ""
    return ImageOps.exif_transpose(image).convert("RGB"), kind


def read_mask(source: Path | bytes) -> Pixels:
    """Decode a mask to its class ids, `[H, W]` uint8.

    Raises:
        PipelineError: no PNG (JPEG blurs labels), truncated, too large, or not exactly one 8-bit channel.
    """
    image, stored = _open(source, ("PNG",))
    # Pillow stretches grey of 2 or 4 bits over 0…255, which makes other labels of them
    mode = stored if stored in ("L;2", "L;4") else image.mode
    if mode not in ("P", "L"):
        raise PipelineError(f"{_name(source)}: mode {mode}; a mask has one 8-bit channel of class ids (P or L)")
    return np.asarray(image)


def resize_photo(photo: Image.Image, height: int, width: int) -> Image.Image:
    """Resize (not crop) to `height` × `width`, antialiased bilinear."""
    return photo.resize((width, height), Image.Resampling.BILINEAR)


def resize_mask(mask: Pixels, size: int) -> Pixels:
    """Resize (not crop) to `size` × `size` by nearest neighbour: no label appears that was not there."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def mask_image(mask: Pixels) -> Image.Image:
    """A mask `[H, W]` of class ids as a palette picture: its pixel values are the ids, its colours are VOC's."""
    image = Image.fromarray(mask).convert("P")
    image.putpalette(palette())
    return image


def _open(source: Path | bytes, formats: tuple[str, ...]) -> tuple[Image.Image, str]:
    """The decoded picture, and Pillow's name of how its pixels are stored."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if isinstance(source, Path) and (found := no_file(source)):
        raise PipelineError(f"{_name(source)}: {found}")
    if size > MAX_BYTES:
        raise PipelineError(f"{_name(source)}: {size:,} bytes; at most {MAX_BYTES:,} are read")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures at its own limit; ours is checked below, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
            if image.width * image.height > MAX_PIXELS:
                raise PipelineError(
                    f"{_name(source)}: declares {image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are decoded"
                )
            stored = image.tile[0][3]
            image.load()
    except PipelineError:
        raise
    except Image.DecompressionBombError as error:
        raise PipelineError(f"{_name(source)}: declares too many pixels: {error}") from None
    except UnidentifiedImageError:
        why = _unlike(source, formats)
        raise PipelineError(f"{_name(source)}: no readable {' or '.join(formats)}: {why}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise PipelineError(f"{_name(source)}: no readable {' or '.join(formats)}: {error}") from None
    return image, str(stored)


def _unlike(source: Path | bytes, formats: tuple[str, ...]) -> str:
    """What a source is that Pillow cannot open as one of the formats."""
    kind = kind_of(source[:HEAD]) if isinstance(source, bytes) else file_kind(source)
    if kind is None:
        return "its first bytes are those of no known format"
    if kind in [f"a {name}" for name in formats]:
        return f"it begins as {kind}, but is damaged"
    return f"it is {kind}" + f"; save it as {formats[0]}" * ("picture" in kind or kind in ("a JPEG", "a PNG"))


def _name(source: Path | bytes) -> str:
    return "photo" if isinstance(source, bytes) else f"{source.parent.name}/{source.name}"
