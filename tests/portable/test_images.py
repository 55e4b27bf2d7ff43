import io
import os

import numpy as np
import pytest
from PIL import Image

from segmentation.data.images import decode_mask, decode_photo, mask_image, read_mask, read_photo, resize_mask
from segmentation.data.voc import VOID, VocFolder, palette
from segmentation.errors import PipelineError
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


def png(kind: int, values: list, bits: int = 16) -> bytes:
    """A PNG of one row; `kind` is the header's color type."""
    row = np.array(values, ">u2" if bits == 16 else "u1")
    return png_declaring(len(values), 1, bits=bits, kind=kind, rows=b"\x00" + row.tobytes())


def test_a_photo_in_16_bit_grey_is_the_same_as_in_8_bits():
    eight = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    eight[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for scale in (257, 256):  # 255 becomes 65,535, or the bits are shifted
        grey = Image.fromarray(eight.astype(np.uint16) * scale)
        photo, kind = read_photo(encoded(grey, "PNG", exif=exif))
        assert (photo.mode, photo.size, kind) == ("RGB", (40, 60), "PNG")
        wanted = np.rot90(eight, -1)
        assert all(np.array_equal(np.asarray(photo)[..., channel], wanted) for channel in range(3))


@pytest.mark.parametrize("kind", [0, 2, 4, 6])  # grey, RGB, grey and alpha, RGB and alpha
def test_photos_of_16_bits_are_read_over_their_whole_range(kind):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    values = [[[0] * channels, [0x4000] * channels, [0x80FF] * channels, [0xFFFF] * channels]]
    photo = decode_photo(png(kind, np.array(values).reshape(4, channels)))
    assert np.asarray(photo.image).tolist() == [[[0] * 3, [0x40] * 3, [0x80] * 3, [0xFF] * 3]]
    assert photo.doubt is None


@pytest.mark.parametrize(("brightest", "bits"), [(1023, 10), (4095, 12), (16383, 14), (16384, None), (0, None)])
def test_a_16_bit_photo_that_uses_few_bits_is_read_as_it_is_and_doubted(brightest, bits):
    source = png(0, [0, brightest // 2, brightest])
    photo = decode_photo(source)
    assert np.asarray(photo.image)[0, :, 0].tolist() == [0, brightest // 2 >> 8, brightest >> 8]
    if bits is None:
        assert photo.doubt is None
        return
    assert f"uses {bits} of its 16 bits" in photo.doubt
    assert "cannot be known" in photo.doubt
    with pytest.warns(UserWarning, match=f"photo: .* uses {bits} of its 16 bits.* scale them to 16 bits, or save 8"):
        read_photo(source)


def test_a_16_bit_photo_of_a_narrow_range_is_doubted():
    thermal = np.linspace(29_000, 31_000, 12, dtype=np.uint16)
    assert "at most 9 of 256 shades remain" in decode_photo(png(0, thermal)).doubt
    wide = np.linspace(9_000, 61_000, 12, dtype=np.uint16)
    assert decode_photo(png(0, wide)).doubt is None


def test_a_jpeg_with_a_second_picture_is_a_jpeg():
    stream = io.BytesIO()
    first, second = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")
    first.save(stream, "MPO", save_all=True, append_images=[second])
    photo = decode_photo(stream.getvalue())
    assert (photo.kind, photo.image.size) == ("JPEG", (4, 2))
    assert photo.image.getpixel((0, 0))[0] > 200


def test_a_dark_16_bit_color_photo_is_doubted_whatever_its_alpha():
    assert "12 of its 16 bits" in decode_photo(png(6, np.array([[4095, 0, 100, 65535]] * 3))).doubt
    assert decode_photo(png(6, np.array([[15, 0, 1, 255]] * 3), bits=8)).doubt is None


@pytest.mark.parametrize(
    ("image", "kind", "tolerance"),
    [
        (Image.new("L", (8, 8), 77), "PNG", 0),
        (Image.new("L", (8, 8), 77), "JPEG", 2),
        (Image.new("LA", (8, 8), (77, 9)), "PNG", 0),
        (Image.new("RGBA", (8, 8), (77, 77, 77, 255)), "PNG", 0),
        (Image.new("L", (8, 8), 77).convert("P"), "PNG", 0),
        (Image.new("RGB", (8, 8), (77, 77, 77)).convert("CMYK"), "JPEG", 3),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_a_photo_of_any_other_mode_keeps_its_brightness(image, kind, tolerance):
    pixels = np.asarray(read_photo(encoded(image, kind))[0]).astype(int)
    assert abs(pixels - 77).max() <= tolerance


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


def test_a_mask_brings_its_own_palette_and_a_grey_one_brings_none():
    ids = np.array([[0, 1, 20, 255]], np.uint8)
    assert decode_mask(encoded(mask_image(ids), "PNG"))[1] == palette()
    assert decode_mask(encoded(Image.fromarray(ids), "PNG"))[1] is None
    short = Image.fromarray(ids).convert("P")
    short.putpalette([9] * 3 * 21)
    read, colors = decode_mask(encoded(short, "PNG"))
    assert np.array_equal(read, ids)
    assert colors == [9] * 3 * 21


@pytest.mark.parametrize("mode", ["1", "I;16", "LA", "RGB", "RGBA"])
def test_a_mask_of_another_mode_is_refused(mode):
    mask = Image.new(mode, (4, 4))
    with pytest.raises(PipelineError, match=f"mode {mode}; a mask has one 8-bit channel"):
        read_mask(encoded(mask, "PNG"))


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


HEADS = {
    "a WebP picture": encoded(noise(), "WEBP"),
    "a BMP picture": encoded(noise(), "BMP"),
    "a TIFF picture": encoded(noise(), "TIFF"),
    "a GIF picture": encoded(noise(), "GIF"),
    "a JPEG 2000 picture": encoded(noise(), "JPEG2000"),
    "an AVIF picture": encoded(noise(), "AVIF"),
    "a HEIC picture": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "a camera raw picture": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
    "a video": b"\0\0\0\x18ftypisom\0\0\2\0isommp41",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "an HTML page": b"\n<!DOCTYPE html><html><title>404",
    "an SVG drawing": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PDF file": b"%PDF-1.7\n",
    "an empty file": b"",
    "a file of zeros": bytes(600),
}


@pytest.mark.parametrize(("kind", "content"), HEADS.items())
def test_a_file_that_is_named_as_a_photo_is_called_what_it_is(kind, content, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source, name in ((path, f"{tmp_path.name}/x.jpg"), (content, "photo")):
        with pytest.raises(PipelineError) as refusal:
            read_photo(source)
        assert str(refusal.value).startswith(f"{name}: no readable JPEG or PNG: it is {kind}")
        assert ("; save it as JPEG" in str(refusal.value)) == kind.endswith("picture")


def test_what_no_format_begins_like_is_said_without_an_address_in_memory():
    for unknown in (b"BM is how this text begins", b"hello"):
        with pytest.raises(
            PipelineError, match="photo: no readable JPEG or PNG: its first bytes are those of no known"
        ):
            read_photo(unknown)
    with pytest.raises(PipelineError, match="it begins as a JPEG, but is damaged"):
        read_photo(encoded(noise(), "JPEG")[:20])
    with pytest.raises(PipelineError, match="no readable PNG: it is a JPEG; save it as PNG"):
        read_mask(encoded(noise(), "JPEG"))


def test_a_pipe_named_as_a_photo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").mkdir()
    for name, kind in (("x", "a pipe"), ("y", "a folder")):
        with pytest.raises(PipelineError, match=f"{name}.jpg: {kind}, not a file"):
            read_photo(tmp_path / f"{name}.jpg")
