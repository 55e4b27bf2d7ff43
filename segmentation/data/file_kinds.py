"""What a file is by its first bytes, whatever it is called: for messages about files that are not what was expected."""

from __future__ import annotations

from pathlib import Path

HEAD = 512  # bytes that `kind_of` looks at

# Where they stand, what they are, what that is.
_MAGIC = (
    (0, b"\xff\xd8\xff", "a JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"II+\0", "a TIFF picture"),
    (0, b"MM\0+", "a TIFF picture"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"8BPS", "a Photoshop file"),
    (128, b"DICM", "a DICOM file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"%PDF", "a PDF file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"PK\x05\x06", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow and Keras write it"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"version https://git-lfs", "a Git LFS pointer, which stands for a file that has not been downloaded"),
    (0, b"version https://hawser", "a Git LFS pointer, which stands for a file that has not been downloaded"),
    (0, b"/annex/objects/", "a git-annex pointer, which stands for a file that has not been downloaded"),
)
# Of the ISO media format: pictures and videos of phones.
_BRANDS = {
    b"avif": "an AVIF picture", b"avis": "an AVIF picture", b"heic": "a HEIC picture", b"heix": "a HEIC picture",
    b"heim": "a HEIC picture", b"heis": "a HEIC picture", b"hevc": "a HEIC picture", b"hevx": "a HEIC picture",
    b"mif1": "a HEIF picture", b"msf1": "a HEIF picture", b"crx ": "a camera raw picture",
}  # fmt: skip


def kind_of(head: bytes) -> str | None:
    """What a file is that begins with these bytes, such as "a WebP picture"; None where they do not say.

    Args:
        head: the first `HEAD` bytes, or all of a shorter file.
    """
    if not head:
        return "an empty file"
    if not any(head):
        return "a file of zeros"
    if head[4:8] == b"ftyp":
        # "mif1" says that it is a picture; which, say the brands after it
        end = min(len(head), int.from_bytes(head[:4], "big"))
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
        kinds = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        return next((kind for kind in kinds if "HEIF" not in kind), kinds[0] if kinds else "a video")
    # "BM" alone could begin a text; the size of the second header follows
    if head[:2] == b"BM" and head[14:18] in (size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)):
        return "a BMP picture"
    for at, magic, kind in _MAGIC:
        if head.startswith(magic, at):
            return kind
    return _text_kind(head)


def file_kind(path: Path) -> str | None:
    """`kind_of` a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return kind_of(stream.read(HEAD))


def _text_kind(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, as servers answer with instead of a file"
    if b"<svg" in text and text.startswith(b"<"):
        return "an SVG drawing"
    if text.startswith(b"<?xml"):
        return "an XML file"
    if text.startswith((b"{", b"[")) and not any(byte < 9 for byte in head):
        return "a JSON file"
    return None
