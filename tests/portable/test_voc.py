import os
import re

import pytest

from segmentation.data.voc import CLASSES, SPLITS, VocFolder, is_background, parse_lines
from segmentation.errors import PipelineError


def test_a_folder_names_its_photos_masks_lists_and_classes(tmp_path):
    folder = VocFolder(tmp_path)
    assert folder.photo("a b") == tmp_path / "JPEGImages/a b.jpg"
    assert folder.mask("a b") == tmp_path / "SegmentationClass/a b.png"
    assert [folder.split_file(split).name for split in SPLITS] == ["train.txt", "val.txt"]
    assert folder.classes() == list(CLASSES)
    folder.classes_file.write_text("ground\n\nstraße\n", encoding="utf-8")
    assert folder.classes() == ["ground", "straße"]


def test_a_list_that_is_missing_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"train\.txt"):
        VocFolder(tmp_path).ids("train")


def test_a_byte_order_mark_is_no_part_of_a_listed_id() -> None:
    assert parse_lines(b"\xef\xbb\xbf2007_000033\r\n\n 2007_000063 \n") == ["2007_000033", "2007_000063"]


def test_a_background_is_told_by_its_name_as_tools_spell_it() -> None:
    assert all(map(is_background, ["background", "Background", "_background_", "__BACKGROUND__"]))
    assert not any(map(is_background, ["sky", "ground", "background clutter", "void"]))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("__ignore__\n_background_\ncat\n", "classes.txt: __ignore__ is no class"),
        ("cat\nbackground\n", "classes.txt: background is class 1, and background must be class 0"),
        ("background\ncat\nBackground\n", "classes.txt: Background is class 2"),
    ],
)
def test_names_that_cannot_be_what_the_ids_mean_are_refused(tmp_path, names, words) -> None:
    folder = VocFolder(tmp_path)
    folder.classes_file.write_text(names)
    with pytest.raises(PipelineError, match=words):
        folder.classes()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("# my classes\nsky\nroad\n", "the line '# my classes' is a comment"),
        ("1: cat\n2: dog\n0: background\n", "the line '1: cat' begins with an id"),
        ("2 dog\n1 cat\n0 background\n", "each line begins with a number"),
        ("cat,\nbackground,\ndog,\n", "the line 'cat,' ends with a separator"),
        ('"cat"\n"background"\n', "is in quotes"),
        ("names:\n- background\n- cat\n", "the line 'names:' ends with a separator; the line '- background' begins"),
        ("background;0;0;0\ncat;64;0;0\n", "the line 'background;0;0;0' holds numbers"),
        ("cat\nBG\ndog\n", "BG is class 1, and background must be class 0"),
    ],
)
def test_lines_that_hold_more_than_a_name_are_refused(tmp_path, lines, words) -> None:
    folder = VocFolder(tmp_path)
    folder.classes_file.write_text(lines)
    with pytest.raises(PipelineError, match=re.escape(words)):
        folder.classes()


def test_names_with_numbers_and_signs_are_names(tmp_path) -> None:
    folder = VocFolder(tmp_path)
    names = ["sky", "2 wheeler", "tv/monitor", "stop-sign", "cat, sleeping", "c#", "n02084071"]
    folder.classes_file.write_text("\n".join(names))
    assert folder.classes() == names


def test_a_set_needs_no_background(tmp_path) -> None:
    folder = VocFolder(tmp_path)
    folder.classes_file.write_text("sky\nroad\n")
    assert folder.classes() == ["sky", "road"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("=cmd|' /C calc'!A0", "begins like a formula"),
        ("@SUM(1+1)*cmd|' /C calc'!A0", "begins like a formula"),
        ("cat\x1b[2J", r"the control character U\+001B"),
        (
            "cat\x85dog",
            r"the control character U\+0085",
        ),  # a line's end to `str.splitlines`, which made two classes of it
        ("cat\u2028dog", "line separator"),
        ("\u202egod", "right-to-left override"),
        ("c\u200bat", "zero width space"),
    ],
)
def test_a_class_name_that_would_run_or_deceive_in_a_table_is_refused(tmp_path, name, why):
    folder = VocFolder(tmp_path)
    folder.classes_file.write_text(f"ground\n{name}\n", encoding="utf-8")
    with pytest.raises(PipelineError, match=f"classes.txt: class .*{why}"):
        folder.classes()


def test_class_names_of_all_scripts_are_taken_and_compared_composed(tmp_path):
    folder = VocFolder(tmp_path)
    names = ["ground", "बिल्ली", "می\u200cخواهم", "+ other", "-", "a=b", "cat & dog (small) <b>", "🏴"]
    folder.classes_file.write_text("\n".join(names), encoding="utf-8")
    assert folder.classes() == names
    folder.classes_file.write_text("ground\ncafé\ncafe\u0301\n", encoding="utf-8")
    with pytest.raises(PipelineError, match="named more than once: café"):
        folder.classes()


def test_a_list_or_names_that_are_no_file_are_refused_and_not_waited_for(tmp_path):
    folder = VocFolder(tmp_path)
    os.mkfifo(folder.classes_file)
    with pytest.raises(PipelineError, match=r"classes\.txt: a pipe, not a file"):
        folder.classes()
    folder.classes_file.unlink()
    folder.classes_file.symlink_to(tmp_path / "gone.txt")
    with pytest.raises(PipelineError, match=r"classes\.txt: a link to .*gone.txt, which does not exist"):
        folder.classes()  # and not VOC's names
