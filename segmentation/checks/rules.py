"""What a data set must fulfil: each rule as a Great Expectations expectation, with words for people.

Expectations are named, not imported, so that reading the rules does not cost Great Expectations' import.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from segmentation.checks.table import MaskRow
from segmentation.data.voc import SPLITS, VOID

Severity = Literal["critical", "warning"]


@dataclass(frozen=True, order=True)
class Offender:
    """A file that breaks a rule, named relative to `data/raw`, and what was found in it."""

    file: str
    found: str


@dataclass(frozen=True)
class Rule:
    """One expectation over the table of `MaskRow`.

    Attributes:
        says: what must hold, in plain words.
        remedy: what to do about an offender.
        expectation: name of the class in `great_expectations.expectations`.
        arguments: its arguments.
        describe: turns the rows that break the rule (all rows, where the expectation judges the table as a whole) into
            the files to name.
    """

    name: str
    severity: Severity
    says: str
    remedy: str
    expectation: str
    arguments: dict[str, Any]
    describe: Callable[[Sequence[MaskRow]], list[Offender]]


def rules(classes: Sequence[str], size: int, max_void_share: float) -> list[Rule]:
    """All rules, in the order in which they are reported."""
    square, last = f"{size}×{size}", len(classes) - 1

    def classes_missing_in_train(rows: Sequence[MaskRow]) -> list[Offender]:
        val, nowhere = (
            Counter(label for row in rows if row.split == split for label in _labels(row.labels_missing_in_train))
            for split in ("val", "train")
        )
        return [
            Offender(
                _list("train"),
                f"{classes[label]} (class {label}) is in "
                + (f"{val[label]} masks of val, in none of train" if label in val else "no mask"),
            )
            for label in sorted({*val, *nowhere})
        ]

    def one_class(split: str, labels: Sequence[int]) -> Offender:
        shown = ", ".join(f"{label} ({classes[label]})" for label in labels if label < len(classes)) or str(labels[0])
        hint = f", and void: {VOID} is void; write foreground as 1" if list(labels) == [0, VOID] else ""
        return Offender(_list(split), f"all its masks show class {shown} alone{hint}")

    return [
        Rule(
            "splits_have_pairs",
            "critical",
            "both splits, train and val, list at least one pair",
            "write at least one photo id into the list",
            "ExpectColumnDistinctValuesToContainSet",
            {"column": "split", "value_set": list(SPLITS)},
            lambda rows: [
                Offender(_list(split), "lists no pair") for split in SPLITS if split not in {row.split for row in rows}
            ],
        ),
        _null(
            "id_is_file_name",
            "unsafe_id",
            "every listed id is a plain file name",
            "write one id a line, the photo's name without .jpg; rename photo and mask where the name is at fault",
            lambda row: Offender(_list(row.split), row.unsafe_id or ""),
        ),
        Rule(
            "id_in_one_split",
            "critical",
            "no id is listed in both splits",
            "take the id out of one of the two lists; a model must not be judged on photos that it was trained on",
            "ExpectColumnValuesToBeInSet",
            {"column": "listed_in", "value_set": list(SPLITS)},
            _each(lambda row: Offender(_list("val"), f"id {row.id!r} is in train.txt too")),
        ),
        Rule(
            "id_listed_once",
            "critical",
            "no id is listed twice in one split",
            "remove the repeated lines",
            "ExpectCompoundColumnsToBeUnique",
            {"column_list": ["split", "id"]},
            _each(lambda row: Offender(_list(row.split), f"id {row.id!r} is listed {row.times_listed} times")),
        ),
        _null(
            "photo_readable",
            "photo_problem",
            "every listed photo exists and decodes",
            "put a whole JPEG there, or take the id out of its list; if only the processed copy is at fault, delete "
            "data/processed and repeat preprocess",
            lambda row: Offender(_photo(row), _without_name(row.photo_problem, _photo(row))),
        ),
        _null(
            "mask_readable",
            "mask_problem",
            "every listed mask exists and decodes",
            "put a whole PNG there, or take the id out of its list; if only the processed copy is at fault, delete "
            "data/processed and repeat preprocess",
            lambda row: Offender(_mask(row), _without_name(row.mask_problem, _mask(row))),
        ),
        Rule(
            "mask_has_one_channel",
            "critical",
            "every mask has one 8-bit channel of class ids (Pillow's mode P or L)",
            "save the mask as an 8-bit grey or palette PNG whose pixel values are class ids, not colors; or write the "
            "colors into palette.txt (docs/own-data.md), and fetch reads masks of colors",
            "ExpectColumnValuesToBeInSet",
            {"column": "mask_mode", "value_set": ["P or L"]},
            _each(lambda row: Offender(_mask(row), f"mode {row.mask_mode}")),
        ),
        Rule(
            "sizes_match",
            "critical",
            "photo and mask of a pair have one original size",
            "export photo and mask at the same size and the same way up",
            "ExpectColumnPairValuesToBeEqual",
            {
                "column_A": "photo_original_size",
                "column_B": "mask_original_size",
                "ignore_row_if": "either_value_is_missing",
            },
            _each(
                lambda row: Offender(
                    _mask(row), f"mask is {row.mask_original_size}, its photo {row.photo_original_size}"
                )
            ),
        ),
        Rule(
            "photo_has_training_size",
            "critical",
            f"every processed photo is exactly {square}",
            "delete data/processed and repeat preprocess",
            "ExpectColumnValuesToBeInSet",
            {"column": "photo_size", "value_set": [square]},
            _each(lambda row: Offender(_photo(row), f"processed copy images/{row.id}.png is {row.photo_size}")),
        ),
        Rule(
            "mask_has_training_size",
            "critical",
            f"every processed mask is exactly {square}",
            "delete data/processed and repeat preprocess",
            "ExpectColumnValuesToBeInSet",
            {"column": "mask_size", "value_set": [square]},
            _each(lambda row: Offender(_mask(row), f"processed copy masks/{row.id}.png is {row.mask_size}")),
        ),
        Rule(
            "labels_are_classes",
            "critical",
            f"every label is a class id, 0 to {last}, or {VOID} (void)",
            f"repaint those pixels, or name the classes in classes.txt (it has {len(classes)})",
            "ExpectColumnValuesToBeBetween",
            {"column": "highest_label", "min_value": 0, "max_value": last},
            _each(
                lambda row: Offender(
                    _mask(row), "labels " + ", ".join(str(x) for x in _labels(row.every_label) if last < x < VOID)
                )
            ),
        ),
        _null(
            "palette_fits_labels",
            "palette_conflict",
            "a color of the masks' palettes stands for one label, the same in every mask",
            "a tool has most likely renumbered the labels of these masks and kept their colors: export them again with "
            "their class ids. If the labels are right, save the masks as grey PNGs, which have no palette. If only the "
            "colors are right, write these into palette.txt and save the masks as RGB (docs/own-data.md)",
            lambda row: Offender(_mask(row), row.palette_conflict or ""),
        ),
        _null(
            "no_new_labels",
            "new_labels",
            "resizing brings no label into a mask that was not there",
            "delete data/processed and repeat preprocess; masks must be resized by nearest neighbour",
            lambda row: Offender(_mask(row), f"labels {row.new_labels} are in the processed copy only"),
        ),
        Rule(
            "mask_not_all_void",
            "critical",
            f"no mask is all void ({VOID}) at {square}",
            "label the photo, or take the id out of its list; labels that are lost in resizing need larger areas, or a "
            "larger preprocess.image_size",
            "ExpectColumnValuesToNotBeInSet",
            {"column": "labels", "value_set": [str(VOID)]},
            _each(lambda row: Offender(_mask(row), _all_void(row))),
        ),
        Rule(
            "train_shows_two_classes",
            "critical",
            "the masks of train show at least two classes",
            f"a model learns to tell classes apart, and needs two; {VOID} is void (not scored), so an object that is "
            f"written as {VOID} teaches nothing: write it as its class id, 1 for the first object class",
            "ExpectColumnValuesToBeNull",
            {"column": "only_labels"},
            _each(lambda row: one_class("train", _labels(row.only_labels))),
        ),
        Rule(
            "val_shows_two_classes",
            "warning",
            "the masks of val show at least two classes",
            "move pairs of other classes from train to val: a score over one class does not say whether the model "
            "tells classes apart",
            "ExpectColumnValuesToBeNull",
            {"column": "only_labels_in_val"},
            _each(lambda row: one_class("val", _labels(row.only_labels_in_val))),
        ),
        Rule(
            "void_is_not_foreground",
            "warning",
            f"no mask shows class 0 and void ({VOID}) alone",
            f"if {VOID} is the object, write it as its class id, for {VOID} is not scored; nothing need be done if "
            "it is meant so",
            "ExpectColumnValuesToNotBeInSet",
            {"column": "every_label", "value_set": [f"0, {VOID}"]},
            _each(lambda row: Offender(_mask(row), f"labels 0 and {VOID}; {VOID} is void; write foreground as 1")),
        ),
        Rule(
            "void_share",
            "warning",
            f"at most {max_void_share:.4g} of a mask's pixels are void ({VOID})",
            "look at the mask: a model learns only from what is labeled; nothing need be done if it is meant so "
            "(validate.max_void_share in params.yaml sets the share)",
            "ExpectColumnValuesToBeBetween",
            {"column": "void_share", "max_value": max_void_share},
            _each(lambda row: Offender(_mask(row), f"void share {row.void_share:.4f}")),
        ),
        Rule(
            "copies_unchanged",
            "critical",
            "the processed files are those that preprocess wrote, pixel for pixel",
            "delete data/processed and repeat preprocess; make changes in data/raw",
            "ExpectColumnValuesToBeNull",
            {"column": "changed"},
            _changed_copies,
        ),
        _null(
            "photo_in_one_split",
            "same_photo_in_train",
            "no photo of val is, under another id, a photo of train too",
            "take one of the two out of its list; a model must not be judged on photos that it was trained on",
            lambda row: Offender(_photo(row), f"same picture in train: {row.same_photo_in_train}"),
        ),
        Rule(
            "classes_in_train",
            "warning",
            "every class of classes.txt is in a mask of train",
            "add photos of the class to train: a model cannot learn what it never sees. If the masks have it at "
            "another id, or classes.txt has a name too many, correct that",
            "ExpectColumnValuesToBeNull",
            {"column": "labels_missing_in_train"},
            classes_missing_in_train,
        ),
        Rule(
            "photo_uses_its_range",
            "warning",
            "every 16-bit photo uses the range of its values",
            "nothing need be done if the photo is meant so; else scale its values to 16 bits or save 8, and do so "
            "with photos that the model sees later",
            "ExpectColumnValuesToBeNull",
            {"column": "photo_doubt"},
            _each(lambda row: Offender(_photo(row), row.photo_doubt or "")),
        ),
        Rule(
            "photo_is_jpeg",
            "warning",
            "every photo named .jpg is a JPEG",
            "nothing need be done, it is read all the same; convert it if other tools stumble over it",
            "ExpectColumnValuesToBeInSet",
            {"column": "photo_format", "value_set": ["JPEG"]},
            _each(lambda row: Offender(_photo(row), f"is a {row.photo_format}")),
        ),
    ]


def _null(name: str, column: str, says: str, remedy: str, describe: Callable[[MaskRow], Offender]) -> Rule:
    """A critical rule over a column that says what is wrong and is null where nothing is."""
    return Rule(name, "critical", says, remedy, "ExpectColumnValuesToBeNull", {"column": column}, _each(describe))


def _each(describe: Callable[[MaskRow], Offender]) -> Callable[[Sequence[MaskRow]], list[Offender]]:
    return lambda rows: [describe(row) for row in rows]


def _all_void(row: MaskRow) -> str:
    lost = [label for label in _labels(row.every_label) if label != VOID]
    if not lost:
        return "every pixel is void"
    return f"every pixel is void in the processed copy: resizing lost the labels {', '.join(map(str, lost))}"


def _changed_copies(rows: Sequence[MaskRow]) -> list[Offender]:
    offenders = []
    for row in rows:
        for kind, file, folder in (("photo", _photo(row), "images"), ("mask", _mask(row), "masks")):
            if kind in (row.changed or ""):
                found = f"processed copy {folder}/{row.id}.png is not what the manifest describes"
                offenders.append(Offender(file, found))
    return offenders


def _photo(row: MaskRow) -> str:
    return f"JPEGImages/{row.id}.jpg"


def _mask(row: MaskRow) -> str:
    return f"SegmentationClass/{row.id}.png"


def _list(split: str) -> str:
    return f"ImageSets/Segmentation/{split}.txt"


def _labels(text: str | None) -> list[int]:
    return [int(label) for label in (text or "").split(", ") if label]


def _without_name(problem: str | None, file: str) -> str:
    """A problem's text without the file's name in front, which stands beside it already."""
    return (problem or "").removeprefix(file).removeprefix(":").strip()
