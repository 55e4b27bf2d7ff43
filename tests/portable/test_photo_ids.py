import unicodedata
from collections.abc import Iterable

import pytest

from segmentation.data.photo_ids import Listed, PairFinder, id_fault, other_names, read_problems, write_lists
from segmentation.data.voc import VocFolder

HINDI = "बिल्ली क्षि"
NFC = "Ünïcödé é"
NFD = unicodedata.normalize("NFD", NFC)


def find(line: str, photos: Iterable[str], masks: Iterable[str] | None = None) -> Listed:
    """What a line means among photos, each with the mask `<name>.png` where none are given."""
    names = list(photos)
    of_photos = [f"{name.rpartition('.')[0]}.png" for name in names]
    return PairFinder(names, of_photos if masks is None else masks).find(line)


@pytest.mark.parametrize(
    "good",
    [
        "2007_000033", "IMG 0012", "straße-3.crop", "p0.tar", HINDI, NFC, "می\u200cخواهم", "p (1)",
        "a+b, c & d @ #1 100%?", "-1", "+49 5", "@user_1", "+1 (3)", "@x (2)", "#1",
        "a=b;c'd\"[*]<b>$a$|:", "🐈", "x" * 200,
    ],
)  # fmt: skip
def test_an_id_is_whatever_a_file_can_safely_be_called(good):
    assert id_fault(good) is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("../x", "a slash"), ("a/b", "a slash"), ("a\\b", "a slash"), ("", "empty"), (".", "a dot"), ("..", "a dot"),
        (".hidden", "a dot"), ("a\0b", r"control character U\+0000"), ("a\nb", r"control character U\+000A"),
        ("a\x7fb", r"control character U\+007F"), ("\u202egpj", "right-to-left override"), ("a\ufeffb", "zero width"),
        ("=cmd|' /C calc'!A0", "formula"), ("=1", "formula"), ("+HYPERLINK(1)", "formula"),
        ("-2+3+cmd|' /C x'!A", "formula"), ("x" * 201, "201 bytes; at most 200"),
        ("क्षि" * 20, "240 bytes; at most 200"),
    ],
)  # fmt: skip
def test_an_id_that_could_leave_its_folder_or_run_is_refused_with_the_reason(bad, why):
    with pytest.raises(ValueError, match=why):
        raise ValueError(id_fault(bad))


@pytest.mark.parametrize(
    ("line", "photo", "identifier"),
    [
        ("p0", "p0.jpg", "p0"),
        ("p0", "p0.JPG", "p0"),
        ("p0", "p0.jpeg", "p0"),
        ("p0", "p0.Jpe", "p0"),
        ("p0", "p0.jfif", "p0"),
        ("IMG_1", "img_1.jpg", "img_1"),
        ("STRASSE", "straße.JPG", "straße"),
        (NFC, f"{NFD}.jpg", NFC),
        (NFD, f"{NFC}.jpg", NFC),
        (HINDI, f"{HINDI}.jpg", HINDI),
        ("p0.jpg", "p0.jpg", "p0"),
        ("p0.JPEG", "p0.jpg", "p0"),
        ("p0.png", "p0.jpg", "p0"),  # the mask's name
        ("p0.jpg", "p0.jpg.jpg", "p0.jpg"),
        ("p0,1", "p0,1.jpg", "p0,1"),
        ("p0 p1", "p0 p1.jpg", "p0 p1"),
        ("# 1", "# 1.jpg", "# 1"),
        ("p0.v2", "p0.v2.jpg", "p0.v2"),
    ],
)
def test_a_line_finds_its_photo_and_the_id_is_the_photos(line, photo, identifier):
    found = find(line, [photo, "p0 unlike.jpg"])
    assert (found.id, found.photo, found.photo_problem, found.mask_problem) == (identifier, photo, None, None)
    assert found.mask == f"{photo.rpartition('.')[0]}.png"


def test_a_name_that_fits_to_the_letter_goes_first():
    photos = ["a.JPG", "a.jpg", "A.jpg", "a.jpg.jpg", "a,1.jpg"]
    finder = PairFinder(photos, ["a.png", "A.png", "a.jpg.png", "a,1.png"])
    for line in ("a", "A", "a.jpg", "a,1"):
        found = finder.find(line)
        assert (found.id, found.photo, found.mask) == (line, f"{line}.jpg", f"{line}.png")
    assert other_names([finder.find("a")]) == []
    assert other_names([find("IMG_1", ["img_1.JPG"])]) == ["'IMG_1' is img_1.JPG"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("p0,1", "JPEGImages/p0,1.jpg is missing; the line seems to hold more than an id: write p0 alone"),
        ("p0  -1", "JPEGImages/p0  -1.jpg is missing; the line seems to hold more than an id: write p0 alone"),
        ("my cat;3", "JPEGImages/my cat;3.jpg is missing; the line seems to hold more than an id: write my cat alone"),
        ("p0 # bad", "JPEGImages/p0 # bad.jpg is missing; the line seems to hold more than an id: write p0 alone"),
        ('"p0"', "JPEGImages/\"p0\".jpg is missing; the line seems to hold more than an id: write p0 alone"),
        ("# all of May", "JPEGImages/# all of May.jpg is missing; a comment? Lists have none: remove the line"),
        ("p9", "JPEGImages/p9.jpg is missing"),
        ("web", "JPEGImages/web.jpg is missing; there is web.webp: save it as a JPEG"),
        (
            "JPEGImages/p0.jpg SegmentationClass/p0.png",
            "id 'JPEGImages/p0.jpg SegmentationClass/p0.png': the line seems to hold two paths: write p0 alone",
        ),
        (
            "C:\\photos\\P0.JPG",
            "id 'C:\\\\photos\\\\P0.JPG': the line seems to hold a path: write p0 alone",
        ),
        ("p0\t1", "id 'p0\\t1': the line seems to hold more than an id: write p0 alone"),
        ("../../secret", "id '../../secret' holds a slash: a path, and no file name"),
    ],
)  # fmt: skip
def test_a_line_without_a_photo_is_kept_as_it_is_and_diagnosed(line, says):
    found = find(line, ["p0.jpg", "my cat.jpg", "web.webp"])
    assert (found.id, found.photo, found.photo_problem) == (line, None, says)


def test_two_photos_for_one_line_or_one_id_are_refused():
    both = find("a", ["a.jpeg", "a.JPG"])
    assert both.photo is both.mask is None
    assert both.photo_problem == "JPEGImages/a.jpg: a.JPG and a.jpeg are both meant; rename one of them"
    assert find("IMG", ["img.jpg", "Img.jpg"]).photo_problem == (
        "JPEGImages/IMG.jpg: Img.jpg and img.jpg are both meant; rename one of them"
    )
    assert "are both meant" in str(find(NFC, [f"{NFC}.jpg", f"{NFD}.jpg"]).photo_problem)
    finder = PairFinder(["a.jpg", "a.jpeg"], ["a.png"])
    assert [finder.find(line).photo for line in ("a", "a")] == ["a.jpg", "a.jpg"]  # listed twice is another rule's
    second = finder.find("a.jpeg")
    assert (second.id, second.photo, second.mask) == ("a", None, None)
    assert second.photo_problem == "JPEGImages/a.jpg: a.jpg and a.jpeg have one id; rename one of them"


@pytest.mark.parametrize(
    ("masks", "mask", "says"),
    [
        (["p0.PNG"], "p0.PNG", None),
        (["P0.png"], "P0.png", None),
        (["p0.png", "P0.png"], "p0.png", None),
        (["P0.png", "P0.PNG"], None, "SegmentationClass/p0.png: P0.PNG and P0.png are both meant; rename one of them"),
        (["p0.jpg"], None, "SegmentationClass/p0.png is missing; there is p0.jpg"),
        ([], None, "SegmentationClass/p0.png is missing"),
    ],
)
def test_a_mask_is_found_as_a_photo_is(masks, mask, says):
    found = find("p0", ["p0.jpg"], masks)
    assert (found.photo, found.mask, found.mask_problem) == ("p0.jpg", mask, says)


def test_a_mask_in_other_case_is_left_to_the_photo_that_it_fits():
    finder = PairFinder(["a.jpg", "A.jpg"], ["a.png"])
    assert finder.find("a").mask == "a.png"
    assert finder.find("A").mask is None  # and not another photo's mask
    assert finder.find("A").mask_problem == "SegmentationClass/A.png is missing; there is a.png"


def test_lists_and_problems_are_read_back_as_they_were_found(tmp_path):
    folder, finder = VocFolder(tmp_path), PairFinder(["a.JPG"], ["a.png"])
    write_lists(folder, {"train": [finder.find("A")], "val": []})
    assert (folder.ids("train"), folder.ids("val"), read_problems(folder)) == (["a"], [], ({}, {}))
    assert not folder.problems_file.exists()  # sound data consist of the same files as ever
    write_lists(folder, {"train": [finder.find("a")], "val": [finder.find("b")]})
    assert folder.ids("val") == ["b"]
    assert read_problems(folder) == (
        {"b": "JPEGImages/b.jpg is missing"}, {"b": "SegmentationClass/b.png is missing"}
    )  # fmt: skip
