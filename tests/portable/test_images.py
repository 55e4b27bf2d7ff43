import io

import numpy as np
import pytest
from PIL import Image

from segmentation.errors import PipelineError
from segmentation.images import mask_image, read_mask, read_photo, resize_mask
from segmentation.voc import VOID, VocFolder, is_safe_id, palette
from tests.conftest import png_declaring


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_photo_is_upright_rgb_and_says_what_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to view
    photo, kind = read_photo(encoded(noise(), "JPEG", exif=exif))
    assert (photo.mode, photo.size, kind) == ("RGB", (40, 60), "JPEG")
    assert read_photo(encoded(noise(), "PNG"))[1] == "PNG"


@pytest.mark.parametrize("bad", [b"", b"hello", encoded(noise(), "GIF"), encoded(noise(), "JPEG")[:-500]])
def test_what_is_no_whole_jpeg_or_png_is_refused(bad):
    with pytest.raises(PipelineError, match="no readable JPEG or PNG"):
        read_photo(bad)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 5_001)])
def test_too_many_declared_pixels_are_refused_before_decoding(width, height):
    with pytest.raises(PipelineError, match="declares"):
        read_photo(png_declaring(width, height))


def test_a_mask_keeps_its_ids_and_rgb_is_refused(tmp_path):
    ids = np.array([[0, 1, 20], [255, 254, 7]], dtype=np.uint8)
    assert np.array_equal(read_mask(encoded(mask_image(ids), "PNG")), ids)
    assert np.array_equal(read_mask(encoded(Image.fromarray(ids), "PNG")), ids)
    path = tmp_path / "x.png"
    noise().save(path)
    with pytest.raises(PipelineError, match=r"x.png: mode RGB"):
        read_mask(path)


def test_a_mask_that_would_be_read_as_other_labels_is_refused():
    with pytest.raises(PipelineError, match="no readable PNG"):
        read_mask(encoded(Image.fromarray(np.zeros((9, 9), np.uint8)), "JPEG"))
    with pytest.raises(PipelineError, match="mode L;2; a mask has one 8-bit channel"):
        read_mask(png_declaring(4, 1, bits=2, kind=0, rows=b"\x00\x1b"))  # 0 1 2 3, which Pillow reads as 0 85 170 255


def test_mask_resizing_takes_the_pixel_under_each_centre_on_real_masks(voc_subset):
    folder = VocFolder(voc_subset)
    for name in folder.ids("val")[:10]:
        mask = read_mask(folder.mask(name))
        assert VOID in mask
        # Centre of output pixel i, in whole numbers: (i + 1/2) · in / out; on the edge of two pixels either will do.
        centres = [np.divmod((2 * np.arange(518) + 1) * side, 2 * 518) for side in mask.shape]
        (rows, row_rest), (columns, column_rest) = centres
        inside = (row_rest > 0)[:, None] & (column_rest > 0)
        assert inside.mean() > 0.99
        assert np.array_equal(resize_mask(mask, 518)[inside], mask[np.ix_(rows, columns)][inside])


def test_the_palette_is_that_of_real_voc_masks(voc_subset):
    folder = VocFolder(voc_subset)
    real = Image.open(folder.mask(folder.ids("val")[0])).getpalette()
    assert palette()[: len(real)] == real


@pytest.mark.parametrize("bad", ["../x", "a/b", "", ".", "..", ".hidden", "a\\b", "a\0b", "x" * 201])
def test_an_id_that_could_leave_its_folder_is_unsafe(bad):
    assert not is_safe_id(bad)


@pytest.mark.parametrize("good", ["2007_000033", "IMG 0012", "straße-3.crop"])
def test_plain_file_names_are_safe(good):
    assert is_safe_id(good)
