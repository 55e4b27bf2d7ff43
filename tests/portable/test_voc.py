import pytest

from segmentation.errors import PipelineError
from segmentation.voc import CLASSES, SPLITS, VocFolder, parse_lines


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
