"""Reading photos and masks safely, and resizing them: the same for preprocessing, evaluation and serving."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from segmentation.data.file_kinds import HEAD, file_kind, kind_of
from segmentation.data.voc import palette
from segmentation.errors import PipelineError
from segmentation.files import no_file

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
# A 16-bit photo whose brightest value needs no more bits than this comes, most likely, from a sensor of 10, 12 or 14
# bits, and its values were not scaled to 16.
SENSOR_BITS = 14
NARROW = 2**13  # of 16 bits: 32 of 256 shades

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        image: RGB, upright.
        kind: the real format, "JPEG" or "PNG", whatever the file is called.
        doubt: why its brightness may be read wrong, in words; None where nothing speaks for it.
    """

    image: Image.Image
    kind: str
    doubt: str | None


def read_photo(source: Path | bytes) -> tuple[Image.Image, str]:
    """Decode a photo to RGB, upright (EXIF orientation applied); a doubt about its brightness becomes a Python warning.

    Args:
        source: a file, or a photo's bytes.

    Returns:
        The image and its real format, "JPEG" or "PNG", whatever the file is called.

    Raises:
        PipelineError: no JPEG or PNG, truncated, or larger than `MAX_BYTES` or `MAX_PIXELS`.
    """
    photo = decode_photo(source)
    if photo.doubt:
        warnings.warn(
            f"{_name(source)}: {photo.doubt}; if its values are not meant so, scale them to 16 bits, or save 8",
            stacklevel=2,
        )
    return photo.image, photo.kind


def decode_photo(source: Path | bytes) -> Photo:
    """As `read_photo`, but with the doubt in words instead of a warning."""
    image, stored = _open(source, ("JPEG", "PNG"))
    # phones put a second picture, of depth or for 3D, behind the first: such a JPEG is an MPO
    kind, doubt = "JPEG" if image.format == "MPO" else f"{image.format}", _doubt(image, stored)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits at 255, which makes nearly all of a photo white. The upper byte is what it takes of
        # 16-bit color, too.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return Photo(image.convert("RGB"), kind, doubt)


def read_mask(source: Path | bytes) -> Pixels:
    """Decode a mask to its class ids, `[H, W]` uint8.

    Raises:
        PipelineError: no PNG (JPEG blurs labels), truncated, too large, or not exactly one 8-bit channel.
    """
    return decode_mask(source)[0]


def decode_mask(source: Path | bytes) -> tuple[Pixels, list[int] | None]:
    """As `read_mask`, and the file's own palette: RGB triples by id, flat, as many as it has; None if it is grey."""
    image, stored = _open(source, ("PNG",))
    # Pillow stretches grey of 2 or 4 bits over 0…255, which makes other labels of them
    mode = stored if stored in ("L;2", "L;4") else image.mode
    if mode not in ("P", "L"):
        raise PipelineError(f"{_name(source)}: mode {mode}; a mask has one 8-bit channel of class ids (P or L)")
    return np.asarray(image), image.getpalette() if mode == "P" else None


def read_color_mask(source: Path | bytes) -> Pixels:
    """Decode a mask that is painted in colors, `[H, W, 3]` uint8 RGB.

    Raises:
        PipelineError: no PNG, truncated, too large, or not three opaque 8-bit channels.
    """
    image, stored = _open(source, ("PNG",))
    opaque = stored == "RGB" or (stored == "RGBA" and image.getchannel("A").getextrema() == (255, 255))
    if not opaque:
        raise PipelineError(
            f"{_name(source)}: mode {stored}; a color mask has three 8-bit channels, and no transparency"
        )
    return np.asarray(image.convert("RGB"))


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


def _doubt(image: Image.Image, stored: str) -> str | None:
    """In words, whether a 16-bit photo uses so little of its range that its values may mean something else."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high, brightest = (int(value) for value in np.percentile(values, (1, 99, 100)))
        if high > 2**SENSOR_BITS and 0 < high - low < NARROW:  # thermal cameras, CT
            return (
                f"nearly all its values lie between {low:,} and {high:,} of {2**16 - 1:,}, so at most "
                f"{(high >> 8) - (low >> 8) + 1} of 256 shades remain"
            )
    elif stored.endswith(";16B"):
        # Pillow keeps the upper byte alone, of all channels; alpha is no brightness
        brightest = (int(np.asarray(image.convert("RGB")).max()) << 8) + 255
    else:
        return None
    bits = brightest.bit_length()
    if bits > SENSOR_BITS or brightest == 0:
        return None
    return (
        f"the brightest pixel uses {bits} of its 16 bits, so it is dark; whether the values have 10, 12 or 14 bits "
        "cannot be known"
    )


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
