from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from segmentation.checks.checks import DataChecks, check_masks
from segmentation.checks.rules import rules
from segmentation.data.images import Pixels, mask_image, read_mask
from segmentation.data.palettes import find_reference
from segmentation.data.preprocess import SCHEMA, preprocess
from segmentation.data.voc import CLASSES as VOC_CLASSES
from segmentation.data.voc import VOID, VocFolder, palette
from segmentation.errors import PipelineError

CLASSES = ["background", "cat", "dog", "car"]
SIZE = 16


@dataclass
class Pair:
    """A listed pair in order; tests break one thing of it. `row` overrides what the manifest says."""

    id: str
    split: str
    photo: Pixels
    mask: Pixels
    row: dict[str, Any] = field(default_factory=dict)

    def manifest_row(self) -> dict[str, Any]:
        counts = np.bincount(self.mask.ravel(), minlength=256)
        row = {
            "id": self.id,
            "split": self.split,
            "photo_format": "JPEG",
            "photo_width": 50,
            "photo_height": 40,
            "mask_width": 50,
            "mask_height": 40,
            "size": SIZE,
            "original_labels": np.flatnonzero(counts).tolist(),
            "original_colors": [f"#{bytes(palette()[3 * x : 3 * x + 3]).hex()}" for x in np.flatnonzero(counts)],
            "original_palette": "voc",
            "labels": np.flatnonzero(counts).tolist(),
            "pixels": counts[: len(CLASSES)].tolist(),
            "void_share": float(counts[VOID] / self.mask.size),
            "image_sha256": hashlib.sha256(self.photo.tobytes()).hexdigest(),
            "mask_sha256": hashlib.sha256(self.mask.tobytes()).hexdigest(),
        }
        return dict.fromkeys(SCHEMA.names) | row | self.row

    def lose_photo(self, problem: str) -> None:
        nothing = dict.fromkeys(("photo_format", "photo_width", "photo_height", "image_sha256"))
        self.row |= nothing | {"photo_problem": problem}

    def lose_mask(self, problem: str) -> None:
        nothing = (
            "mask_width",
            "mask_height",
            "original_labels",
            "original_colors",
            "original_palette",
            "labels",
            "pixels",
            "void_share",
            "mask_sha256",
        )
        self.row |= dict.fromkeys(nothing) | {"mask_problem": problem}


Pairs = dict[str, Pair]


def pair(identifier: str, split: str, seed: int) -> Pair:
    photo = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2:8, 2:8] = 1 + seed % 3
    mask[1, 2:8] = VOID
    return Pair(identifier, split, photo, mask)


def clean() -> Pairs:
    names = {"t0": "train", "t1": "train", "t2": "train", "v0": "val", "v1": "val", "v2": "val"}
    return {name: pair(name, split, seed) for seed, (name, split) in enumerate(names.items())}


def write(folder: Path, pairs: list[Pair]) -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for each in pairs:
        if not each.row.get("photo_problem"):
            Image.fromarray(each.photo).save(folder / "images" / f"{each.id}.png")
        if not each.row.get("mask_problem"):
            mask_image(each.mask).save(folder / "masks" / f"{each.id}.png")
    rows = [each.manifest_row() for each in pairs]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "manifest.parquet")
    return folder


def check(folder: Path, docs: Path | None = None, max_void_share: float = 0.5) -> DataChecks:
    return check_masks(folder, CLASSES, SIZE, max_void_share, docs)


def broken(checks: DataChecks) -> dict[str, list[tuple[str, str]]]:
    return {
        rule.rule: [(offender.file, offender.found) for offender in rule.offenders]
        for rule in checks.rules
        if not rule.passed
    }


def test_a_clean_folder_passes_every_rule(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = clean()
    checks = check(write(tmp_path, list(pairs.values())))
    assert any(VOID in np.unique(each.mask) for each in pairs.values())
    assert all(rule.passed and not rule.offenders for rule in checks.rules)
    assert [rule.rule for rule in checks.rules] == [rule.name for rule in rules(CLASSES, SIZE, 0.5)]
    assert checks.result == checks.to_json()["result"] == "passed"
    assert {name: split.pairs for name, split in checks.splits.items()} == {"train": 3, "val": 3}
    checks.raise_if_critical()
    out, err = capfd.readouterr()
    assert out == f"validate: 3 train, 3 val pairs, {len(checks.rules)} rules: passed\n"
    assert "it/s" not in err and "Calculating" not in err  # no progress bar of anybody's


def drop_val(pairs: Pairs) -> None:
    for name in ("v0", "v1", "v2"):
        del pairs[name]


def unsafe_id(pairs: Pairs) -> None:
    bad = pairs["v0"]
    bad.id = "../escape"
    bad.lose_photo("id '../escape' holds a slash: a path, and no file name")
    bad.lose_mask("id '../escape' holds a slash: a path, and no file name")


def in_both_splits(pairs: Pairs) -> None:
    again = pair("t0", "val", 0)
    pairs["t0 again"] = again


def listed_twice(pairs: Pairs) -> None:
    pairs["v1 again"] = pair("v1", "val", 4)


def missing_photo(pairs: Pairs) -> None:
    pairs["v0"].lose_photo("JPEGImages/v0.jpg is missing")


def truncated_photo(pairs: Pairs) -> None:
    pairs["t0"].lose_photo("JPEGImages/t0.jpg: no readable JPEG or PNG: image file is truncated")


def missing_mask(pairs: Pairs) -> None:
    pairs["v2"].lose_mask("SegmentationClass/v2.png is missing")


def original_sizes_differ(pairs: Pairs) -> None:
    pairs["v0"].row |= {"mask_width": 40, "mask_height": 50}


def photo_of_wrong_size(pairs: Pairs) -> None:
    pairs["v0"].photo = pairs["v0"].photo[:12].copy()


def mask_of_wrong_size(pairs: Pairs) -> None:
    pairs["v0"].mask = pairs["v0"].mask[:, :12].copy()


def unknown_label(pairs: Pairs) -> None:
    pairs["t1"].mask[9:11, 3] = [4, 200]


def unknown_label_lost_in_resizing(pairs: Pairs) -> None:
    pairs["t1"].row |= {"original_labels": [0, 1, 2, 3, 77, VOID], "original_colors": None}


def new_label(pairs: Pairs) -> None:
    pairs["t1"].row |= {"original_labels": [0, VOID], "original_colors": None}


def all_void(pairs: Pairs) -> None:
    pairs["v0"].mask[:] = VOID


def much_void(pairs: Pairs) -> None:
    pairs["v0"].mask[8:] = VOID


def changed_mask(pairs: Pairs) -> None:
    pairs["v0"].row["mask_sha256"] = "0" * 64


def changed_photo(pairs: Pairs) -> None:
    pairs["v0"].row["image_sha256"] = None


def same_photo(pairs: Pairs) -> None:
    pairs["v1"].photo = pairs["t2"].photo


def val_only_class(pairs: Pairs) -> None:
    pairs["t2"].mask[pairs["t2"].mask == 3] = 1


def class_of_no_mask(pairs: Pairs) -> None:
    for each in pairs.values():
        each.mask[each.mask == 3] = 1


def class_0_of_no_mask(pairs: Pairs) -> None:
    for each in pairs.values():
        each.mask[each.mask == 0] = 1


def one_class_in_val(pairs: Pairs) -> None:
    for each in pairs.values():
        if each.split == "val":
            each.mask[each.mask > 0] = 0


def foreground_255_in_one(pairs: Pairs) -> None:
    pairs["v1"].mask[pairs["v1"].mask > 0] = VOID


def swapped_colors(pairs: Pairs) -> None:
    swapped = {"original_labels": [0, 1, 2, VOID], "original_colors": ["#000000", "#008000", "#800000", "#e0e0c0"]}
    pairs["t1"].row |= swapped | {"original_palette": "another"}


def dark_photo(pairs: Pairs) -> None:
    pairs["t0"].row["photo_doubt"] = "the brightest pixel uses 12 of its 16 bits, so it is dark"


def png_named_jpg(pairs: Pairs) -> None:
    pairs["t0"].row["photo_format"] = "PNG"


CASES: list[tuple[Callable[[Pairs], None], str, str, str]] = [
    (drop_val, "splits_have_pairs", "ImageSets/Segmentation/val.txt", "lists no pair"),
    (unsafe_id, "id_is_file_name", "ImageSets/Segmentation/val.txt", "id '../escape'"),
    (in_both_splits, "id_in_one_split", "ImageSets/Segmentation/val.txt", "id 't0' is in train.txt too"),
    (listed_twice, "id_listed_once", "ImageSets/Segmentation/val.txt", "id 'v1' is listed 2 times"),
    (missing_photo, "photo_readable", "JPEGImages/v0.jpg", "is missing"),
    (truncated_photo, "photo_readable", "JPEGImages/t0.jpg", "no readable JPEG or PNG: image file is truncated"),
    (missing_mask, "mask_readable", "SegmentationClass/v2.png", "is missing"),
    (original_sizes_differ, "sizes_match", "SegmentationClass/v0.png", "mask is 40×50, its photo 50×40"),
    (photo_of_wrong_size, "photo_has_training_size", "JPEGImages/v0.jpg", "processed copy images/v0.png is 16×12"),
    (mask_of_wrong_size, "mask_has_training_size", "SegmentationClass/v0.png", "processed copy masks/v0.png is 12×16"),
    (unknown_label, "labels_are_classes", "SegmentationClass/t1.png", "labels 4, 200"),
    (unknown_label_lost_in_resizing, "labels_are_classes", "SegmentationClass/t1.png", "labels 77"),
    (new_label, "no_new_labels", "SegmentationClass/t1.png", "labels 2 are in the processed copy only"),
    (all_void, "mask_not_all_void", "SegmentationClass/v0.png", "every pixel is void"),
    (much_void, "void_share", "SegmentationClass/v0.png", "void share 0.5234"),
    (
        changed_mask,
        "copies_unchanged",
        "SegmentationClass/v0.png",
        "processed copy masks/v0.png is not what the manifest describes",
    ),
    (
        changed_photo,
        "copies_unchanged",
        "JPEGImages/v0.jpg",
        "processed copy images/v0.png is not what the manifest describes",
    ),
    (same_photo, "photo_in_one_split", "JPEGImages/v1.jpg", "same picture in train: t2"),
    (
        val_only_class,
        "classes_in_train",
        "ImageSets/Segmentation/train.txt",
        "car (class 3) is in 1 masks of val, in none of train",
    ),
    (class_of_no_mask, "classes_in_train", "ImageSets/Segmentation/train.txt", "car (class 3) is in no mask"),
    (class_0_of_no_mask, "classes_in_train", "ImageSets/Segmentation/train.txt", "background (class 0) is in no mask"),
    (
        one_class_in_val,
        "val_shows_two_classes",
        "ImageSets/Segmentation/val.txt",
        "all its masks show class 0 (background) alone",
    ),
    (
        foreground_255_in_one,
        "void_is_not_foreground",
        "SegmentationClass/v1.png",
        "labels 0 and 255; 255 is void; write foreground as 1",
    ),
    (
        swapped_colors,
        "palette_fits_labels",
        "SegmentationClass/t1.png",
        "color 0 128 0 is label 1, but label 2 in SegmentationClass/v1.png",
    ),
    (dark_photo, "photo_uses_its_range", "JPEGImages/t0.jpg", "the brightest pixel uses 12 of its 16 bits"),
    (png_named_jpg, "photo_is_jpeg", "JPEGImages/t0.jpg", "is a PNG"),
]


@pytest.mark.parametrize(("fault", "rule", "file", "found"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_fault_breaks_its_rule_and_no_other(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Pairs], None],
    rule: str,
    file: str,
    found: str,
) -> None:
    pairs = clean()
    fault(pairs)
    checks = check(write(tmp_path, list(pairs.values())))
    offenders = broken(checks)
    assert list(offenders) == [rule]
    assert len(offenders[rule]) == 1
    assert offenders[rule][0][0] == file
    assert offenders[rule][0][1].startswith(found)
    (judged,) = [each for each in checks.rules if each.rule == rule]
    if judged.severity == "critical":
        assert checks.result == "failed"
        with pytest.raises(PipelineError) as error:
            checks.raise_if_critical()
        text = str(error.value)
    else:
        assert checks.result == "passed with warnings"
        checks.raise_if_critical()
        text = capsys.readouterr().out
        assert f"warning: {rule}" in text
    assert file in text
    assert found in text
    assert judged.remedy in text


def test_every_rule_has_a_case_that_breaks_it() -> None:
    elsewhere = {
        "mask_has_one_channel",  # test_a_colour_mask_…
        "train_shows_two_classes",  # test_one_class_alone_…
    }
    assert {case[1] for case in CASES} | elsewhere == {rule.name for rule in rules(CLASSES, SIZE, 0.5)}


def only(labels: list[int]) -> Pairs:
    """Pairs whose masks show these labels alone."""
    pairs = clean()
    for each in pairs.values():
        each.mask[:] = labels[0]
        each.mask[3:9, 3:9] = labels[-1]
    return pairs


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, VOID], "all its masks show class 0 (background) alone, and void: 255 is void; write foreground as 1"),
        ([0], "all its masks show class 0 (background) alone"),
        ([2], "all its masks show class 2 (dog) alone"),
        ([2, VOID], "all its masks show class 2 (dog) alone"),
        ([77], "all its masks show class 77 alone"),
    ],
)
def test_one_class_alone_in_all_masks_is_refused_with_a_hint_where_foreground_is_255(
    tmp_path: Path, labels: list[int], found: str
) -> None:
    checks = check(write(tmp_path, list(only(labels).values())), max_void_share=1)
    assert checks.result == "failed"
    assert broken(checks)["train_shows_two_classes"] == [("ImageSets/Segmentation/train.txt", found)]
    named = {text for _, text in broken(checks)["classes_in_train"]}
    shown = {CLASSES[label] for label in labels if label < len(CLASSES)}
    assert {text.split(" (")[0] for text in named} == set(CLASSES) - shown
    with pytest.raises(PipelineError) as error:
        checks.raise_if_critical()
    assert found in str(error.value)


def test_one_class_alone_in_train_is_refused_whatever_val_shows(tmp_path: Path) -> None:
    pairs = only([0])
    for name, label in (("v0", 1), ("v1", 2), ("v2", 3)):
        pairs[name].mask[3:9, 3:9] = label
    offenders = broken(check(write(tmp_path, list(pairs.values()))))
    assert set(offenders) == {"train_shows_two_classes", "classes_in_train"}
    assert [text for _, text in offenders["classes_in_train"]] == [
        f"{name} (class {label}) is in 1 masks of val, in none of train"
        for label, name in sorted(enumerate(CLASSES[1:], 1), key=lambda each: each[1])
    ]


def test_masks_that_are_all_void_are_no_class_alone(tmp_path: Path) -> None:
    offenders = broken(check(write(tmp_path, list(only([VOID]).values())), max_void_share=1))
    assert set(offenders) == {"mask_not_all_void", "classes_in_train"}


def test_a_reference_speaks_where_the_masks_agree_among_themselves(tmp_path: Path) -> None:
    pairs = clean()
    shifted = [f"#{bytes(palette()[3 * x : 3 * x + 3]).hex()}" for x in (0, 12, 8, 7)]
    for each in pairs.values():
        each.row |= {"original_labels": [0, 1, 2, 3], "original_colors": shifted}
    processed = write(tmp_path, list(pairs.values()))
    voc = find_reference(VocFolder(tmp_path), VOC_CLASSES)
    assert "palette_fits_labels" not in broken(check(processed))
    checks = check_masks(processed, CLASSES, SIZE, 0.5, None, voc)
    found = "label 1 has color 64 0 128, which is label 12 in VOC's palette"
    assert broken(checks)["palette_fits_labels"] == [(f"SegmentationClass/{name}.png", found) for name in sorted(pairs)]


def test_a_colour_mask_is_told_from_an_unreadable_one(tmp_path: Path) -> None:
    colour = tmp_path / "raw" / "SegmentationClass" / "v0.png"
    colour.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(colour)
    with pytest.raises(PipelineError) as refused:
        read_mask(colour)
    pairs = clean()
    pairs["v0"].lose_mask(str(refused.value))
    processed = write(tmp_path / "processed", list(pairs.values()))
    Image.new("RGBA", (SIZE, SIZE)).save(processed / "masks" / "v1.png")
    assert broken(check(processed)) == {
        "mask_has_one_channel": [("SegmentationClass/v0.png", "mode RGB"), ("SegmentationClass/v1.png", "mode RGBA")]
    }


def test_written_files_are_read_back(tmp_path: Path) -> None:
    processed = write(tmp_path, list(clean().values()))
    (processed / "masks" / "t0.png").unlink()
    (processed / "masks" / "t1.png").write_bytes((processed / "masks" / "t1.png").read_bytes()[:90])
    (processed / "images" / "v0.png").write_bytes(b"")
    (processed / "images" / "v1.png").unlink()
    Image.open(processed / "masks" / "v2.png").transpose(Image.Transpose.ROTATE_90).save(processed / "masks/v2.png")
    offenders = broken(check(processed))
    # Without t0 and t1 no readable mask of train shows classes 1 and 2: a warning, and true.
    assert set(offenders) == {"mask_readable", "photo_readable", "copies_unchanged", "classes_in_train"}
    masks, photos = dict(offenders["mask_readable"]), dict(offenders["photo_readable"])
    assert masks["SegmentationClass/t0.png"] == "processed copy masks/t0.png is missing"
    assert masks["SegmentationClass/t1.png"].startswith("processed copy masks/t1.png: no readable PNG")
    assert photos["JPEGImages/v0.jpg"].startswith("processed copy images/v0.png: no readable JPEG or PNG")
    assert photos["JPEGImages/v1.jpg"] == "processed copy images/v1.png is missing"
    assert [file for file, _ in offenders["copies_unchanged"]] == ["SegmentationClass/v2.png"]


def test_all_of_many_offenders_are_listed(tmp_path: Path) -> None:
    pairs = [pair(f"t{i}", "train", i) for i in range(60)] + [pair(f"v{i}", "val", 60 + i) for i in range(60)]
    for i in range(0, 25):
        pairs[i].lose_photo(f"JPEGImages/t{i}.jpg is missing")
    for i in range(20, 50):
        pairs[i].lose_mask(f"SegmentationClass/t{i}.png: " + "no readable JPEG or PNG: " + "long " * 200)
    for i in range(60, 90):
        pairs[i].mask[9:, 9:] = 77
    for i in range(85, 120):
        pairs[i].row["photo_format"] = "PNG"
    checks = check(write(tmp_path, pairs))
    assert {name: len(found) for name, found in broken(checks).items()} == {
        "photo_readable": 25,
        "mask_readable": 30,
        "labels_are_classes": 30,
        "photo_is_jpeg": 35,
    }
    with pytest.raises(PipelineError) as error:
        checks.raise_if_critical()
    lines = [line.split()[0] for line in str(error.value).splitlines() if line.startswith("    ")]
    expected = {f"JPEGImages/t{i}.jpg" for i in range(25)} | {f"SegmentationClass/t{i}.png" for i in range(20, 50)}
    expected |= {f"SegmentationClass/v{i}.png" for i in range(30)}
    assert set(lines) == expected
    assert len(lines) == len(expected)
    assert max(map(len, str(error.value).splitlines())) < 240
    report = {rule["rule"]: rule for rule in checks.to_json()["rules"]}
    assert report["mask_readable"]["offenders"] == 30
    assert len(report["mask_readable"]["first_offenders"]) == 20


def test_a_fault_is_reported_once_where_an_id_is_listed_in_both_splits(tmp_path: Path) -> None:
    pairs = clean()
    in_both_splits(pairs)
    for each in pairs.values():
        if each.id == "t0":
            each.lose_photo("JPEGImages/t0.jpg is missing")
    offenders = broken(check(write(tmp_path, list(pairs.values()))))
    assert {name: len(found) for name, found in offenders.items()} == {"id_in_one_split": 1, "photo_readable": 1}


def test_an_unsafe_id_never_becomes_a_path(tmp_path: Path) -> None:
    pairs = clean()
    pairs["v0"].id = "../outside"  # the manifest claims that all is well
    processed = write(tmp_path / "processed", [each for each in pairs.values() if each.id != "../outside"])
    rows = [each.manifest_row() for each in pairs.values()]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), processed / "manifest.parquet")
    (processed / "outside.png").write_bytes(b"bait")
    assert list(broken(check(processed))) == ["id_is_file_name"]


def test_an_empty_manifest_fails_for_both_splits(tmp_path: Path) -> None:
    checks = check(write(tmp_path, []), docs=tmp_path / "docs")
    assert broken(checks) == {
        "splits_have_pairs": [
            ("ImageSets/Segmentation/train.txt", "lists no pair"),
            ("ImageSets/Segmentation/val.txt", "lists no pair"),
        ]
    }


def test_a_manifest_of_faulty_pairs_only_names_each_file_once(tmp_path: Path) -> None:
    pairs = clean()
    for each in pairs.values():
        each.lose_photo(f"JPEGImages/{each.id}.jpg is missing")
        each.lose_mask(f"SegmentationClass/{each.id}.png is missing")
    checks = check(write(tmp_path, list(pairs.values())), docs=tmp_path / "docs")
    assert {name: len(found) for name, found in broken(checks).items()} == {"photo_readable": 6, "mask_readable": 6}


def test_a_manifest_written_by_pandas_reads_the_same(tmp_path: Path) -> None:
    pairs = clean()
    missing_photo(pairs)
    missing_mask(pairs)
    processed = write(tmp_path, list(pairs.values()))
    before = check(processed).to_json()
    frame = pd.read_parquet(processed / "manifest.parquet")
    assert isinstance(frame["labels"][0], np.ndarray)  # and nullable whole numbers have become floats
    frame.to_parquet(processed / "manifest.parquet")
    assert check(processed).to_json() == before


def test_the_report_is_the_same_wherever_and_however_often(tmp_path: Path) -> None:
    texts = []
    for name in ("here", "there"):
        pairs = clean()
        missing_mask(pairs)
        unknown_label(pairs)
        processed = write(tmp_path / name, list(pairs.values()))
        texts += [json.dumps(check(processed, docs).to_json()) for docs in (None, tmp_path / name / "docs")]
    assert len(set(texts)) == 1
    assert str(tmp_path) not in texts[0]


def test_fingerprints_follow_the_content_of_their_split(tmp_path: Path) -> None:
    pairs = clean()
    before = check(write(tmp_path / "a", list(pairs.values()))).splits
    assert check(write(tmp_path / "b", list(pairs.values())[::-1])).splits == before
    pairs["t0"].mask[12, 12] = 1
    after = check(write(tmp_path / "c", list(pairs.values()))).splits
    assert after["train"].sha256 != before["train"].sha256
    assert after["val"] == before["val"]


def test_the_void_limit_is_inclusive(tmp_path: Path) -> None:
    pairs = clean()
    pairs["v0"].mask[:] = 1
    pairs["v0"].mask[:8] = VOID
    processed = write(tmp_path, list(pairs.values()))
    assert broken(check(processed)) == {}
    assert list(broken(check(processed, max_void_share=0.49))) == ["void_share"]


def test_data_docs_name_every_rule_and_replace_older_ones(tmp_path: Path) -> None:
    pairs = clean()
    missing_mask(pairs)
    processed = write(tmp_path / "processed", list(pairs.values()))
    docs = tmp_path / "reports" / "docs"
    for _ in range(2):
        checks = check(processed, docs)
    assert checks.docs_index == docs / "index.html"
    (page,) = (docs / "validations").rglob("*.html")
    assert page.name in checks.docs_index.read_text()
    text = page.read_text()
    for rule in checks.rules:
        assert f"{rule.rule} ({rule.severity})" in text
    assert "SegmentationClass/v2.png is missing" in text
    assert [path.name for path in docs.parent.iterdir()] == ["docs"]
    with pytest.raises(PipelineError, match=str(checks.docs_index)):
        checks.raise_if_critical()


def test_data_docs_run_no_script_from_a_list(tmp_path: Path) -> None:
    pairs = clean()
    unsafe_id(pairs)
    pairs["v0"].id = "<script>alert(1)</script> & co"
    pairs["v0"].lose_photo("id '<script>alert(1)</script> & co' holds a slash")
    checks = check(write(tmp_path / "processed", list(pairs.values())), tmp_path / "docs")
    assert broken(checks) == {
        "id_is_file_name": [("ImageSets/Segmentation/val.txt", "id '<script>alert(1)</script> & co' holds a slash")]
    }
    pages = [path.read_text() for path in (tmp_path / "docs").rglob("*.html")]
    assert not any("<script>alert" in page for page in pages)
    assert any("&lt;script&gt;alert" in page for page in pages)


@pytest.mark.parametrize("content", [None, b"", b"no parquet at all"])
def test_an_unreadable_manifest_is_refused_with_the_remedy(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.parquet").write_bytes(content)
    with pytest.raises(PipelineError, match=r"manifest\.parquet: .*stages\.preprocess"):
        check(tmp_path)


def test_a_manifest_without_a_column_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([clean()["t0"].manifest_row()], SCHEMA).drop_columns(["image_sha256"])
    pq.write_table(table, tmp_path / "manifest.parquet")
    with pytest.raises(PipelineError, match="lacks the columns image_sha256"):
        check(tmp_path)


def test_what_preprocess_writes_is_what_the_checks_read(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (raw / name).mkdir(parents=True)
    pairs = clean()
    for each in pairs.values():
        Image.fromarray(each.photo).resize((50, 40)).save(raw / "JPEGImages" / f"{each.id}.jpg")
        mask_image(each.mask).resize((50, 40), Image.Resampling.NEAREST).save(
            raw / "SegmentationClass" / f"{each.id}.png"
        )
    (raw / "classes.txt").write_text("\n".join(CLASSES))
    (raw / "ImageSets/Segmentation/train.txt").write_text("t0\nt1\nt2\n")
    (raw / "ImageSets/Segmentation/val.txt").write_text("v0\nv1\nv2\n")
    preprocess(raw, tmp_path / "clean", SIZE)
    assert broken(check(tmp_path / "clean")) == {}

    (raw / "ImageSets/Segmentation/val.txt").write_text("v0\nv1\nv2\n../v2\nabsent\n")
    Image.new("RGB", (50, 40)).save(raw / "SegmentationClass" / "v0.png")
    photo = raw / "JPEGImages" / "v1.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    Image.open(raw / "JPEGImages" / "v2.jpg").save(raw / "JPEGImages" / "v2.jpg", format="PNG")
    preprocess(raw, tmp_path / "faulty", SIZE)
    offenders = broken(check(tmp_path / "faulty"))
    assert {name: [file for file, _ in found] for name, found in offenders.items()} == {
        "id_is_file_name": ["ImageSets/Segmentation/val.txt"],
        "photo_readable": ["JPEGImages/absent.jpg", "JPEGImages/v1.jpg"],
        "mask_readable": ["SegmentationClass/absent.png"],
        "mask_has_one_channel": ["SegmentationClass/v0.png"],
        "photo_is_jpeg": ["JPEGImages/v2.jpg"],
    }


def write_pair(raw: Path, identifier: str, mask: Pixels) -> None:
    noise = np.random.default_rng(len(identifier)).integers(0, 256, (*mask.shape, 3), np.uint8)
    Image.fromarray(noise).save(raw / "JPEGImages" / f"{identifier}.jpg")
    mask_image(mask).save(raw / "SegmentationClass" / f"{identifier}.png")


def test_a_dog_on_much_void_is_a_warning_and_labels_lost_in_resizing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (raw / name).mkdir(parents=True)
    (raw / "classes.txt").write_text("\n".join(CLASSES))
    (raw / "ImageSets/Segmentation/train.txt").write_text("whole\nothers\n")
    (raw / "ImageSets/Segmentation/val.txt").write_text("2008_006981\nmore\n")
    dog = CLASSES.index("dog")
    whole = np.zeros((100, 125), np.uint8)
    whole[20:60, 20:60] = dog
    write_pair(raw, "whole", whole)
    others = np.zeros((100, 125), np.uint8)
    others[10:40, 10:60], others[50:90, 10:60] = 1, 3
    write_pair(raw, "others", others)
    write_pair(raw, "more", others)
    void = np.full((100, 125), VOID, np.uint8)
    void[30:51, 40:90] = dog  # 91.6 % void, as VOC's own 2008_006981
    write_pair(raw, "2008_006981", void)
    preprocess(raw, tmp_path / "much", 100)
    checks = check_masks(tmp_path / "much", CLASSES, 100, 0.9, None)
    assert broken(checks) == {"void_share": [("SegmentationClass/2008_006981.png", "void share 0.9160")]}
    assert checks.result == "passed with warnings"
    capsys.readouterr()
    checks.raise_if_critical()
    printed = capsys.readouterr().out
    assert printed.startswith("warning: void_share: at most 0.9 of a mask's pixels are void (255)\n  what to do: ")
    assert "SegmentationClass/2008_006981.png  void share 0.9160\n" in printed

    thin = np.full((100, 125), VOID, np.uint8)
    thin[31, :] = dog  # a line of one pixel, which falls between those that are kept
    write_pair(raw, "2008_006981", thin)
    preprocess(raw, tmp_path / "lost", SIZE)
    checks = check(tmp_path / "lost", max_void_share=0.9)
    why = f"every pixel is void in the processed copy: resizing lost the labels {dog}"
    assert broken(checks) == {"mask_not_all_void": [("SegmentationClass/2008_006981.png", why)]}
    with pytest.raises(PipelineError, match=r"2008_006981\.png  every pixel is void in the processed copy"):
        checks.raise_if_critical()


@pytest.mark.parametrize("names", [VOC_CLASSES, tuple(f"class {label}" for label in range(21))], ids=["VOC", "own"])
def test_real_masks_that_a_tool_has_renumbered_are_refused_and_real_ones_pass(
    tmp_path: Path, voc_subset: Path, names: tuple[str, ...]
) -> None:
    source, folder = VocFolder(voc_subset), VocFolder(tmp_path / "raw")
    for path in (folder.photo("x"), folder.mask("x"), folder.split_file("x")):
        path.parent.mkdir(parents=True)
    ids = {split: source.ids(split)[:6] for split in ("train", "val")}
    for split, listed in ids.items():
        folder.split_file(split).write_text("\n".join(listed))
        for name in listed:
            folder.photo(name).symlink_to(source.photo(name))
            folder.mask(name).write_bytes(source.mask(name).read_bytes())
    folder.classes_file.write_text("\n".join(names))
    reference = find_reference(folder, names)

    def palettes(name: str) -> list[tuple[str, str]] | None:
        preprocess(folder.root, tmp_path / name, SIZE)
        return broken(check_masks(tmp_path / name, list(names), SIZE, 1, None, reference)).get("palette_fits_labels")

    assert palettes("as they are") is None

    grey, renumbered = ids["train"][0], ids["val"][0]
    Image.fromarray(read_mask(folder.mask(grey))).save(folder.mask(grey))
    colors = Image.open(folder.mask(renumbered)).convert("RGB")
    assert (224, 224, 192) in {color for _, color in colors.getcolors()}  # void
    colors.quantize().save(folder.mask(renumbered))
    found = palettes("one renumbered")
    assert found is not None
    assert [file for file, _ in found] == [f"SegmentationClass/{renumbered}.png"]
