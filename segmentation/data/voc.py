"""Pascal VOC's folder layout, class names and colours.

<root>/JPEGImages/<id>.jpg               photos
<root>/SegmentationClass/<id>.png        palette or grey PNG of class ids, 255 = void
<root>/ImageSets/Segmentation/<split>.txt  one id a line
<root>/classes.txt                       one class name a line, background first (optional; else VOC's 21)
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segmentation.errors import PipelineError
from segmentation.files import no_file
from segmentation.names import name_fault

VOID = 255
IGNORE = "__ignore__"
SPLITS = ("train", "val")
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def palette() -> list[int]:
    """VOC's colours for PNG masks: 256 RGB triples, flat (the devkit's `VOClabelcolormap`)."""
    colours = []
    for label in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (label >> (3 * bit + channel) & 1) << (7 - bit)
        colours += rgb
    return colours


@dataclass(frozen=True)
class VocFolder:
    """Paths and lists of a folder in VOC layout; reads no image."""

    root: Path

    def photo(self, identifier: str) -> Path:
        return self.root / "JPEGImages" / f"{identifier}.jpg"

    def mask(self, identifier: str) -> Path:
        return self.root / "SegmentationClass" / f"{identifier}.png"

    def split_file(self, split: str) -> Path:
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"

    @property
    def classes_file(self) -> Path:
        return self.root / "classes.txt"

    @property
    def problems_file(self) -> Path:
        """Of `data/raw` alone: why listed photos and masks are not in it (`segmentation.data.photo_ids`)."""
        return self.root / "problems.json"

    def ids(self, split: str) -> list[str]:
        """The ids of a split in list order, as they are written: ask `photo_ids.id_fault` before use as a path.

        Raises:
            PipelineError: the list is missing or no UTF-8 text.
        """
        path = self.split_file(split)
        return read_lines(path, "write one photo id a line, without .jpg")

    def classes(self) -> list[str]:
        """Class names by id, background first: those of `classes.txt`, else VOC's 21.

        Raises:
            PipelineError: see `check_names`.
        """
        path = self.classes_file
        if not os.path.lexists(path):
            return list(CLASSES)
        names = read_lines(path, "write one class name a line, background first")
        check_names(path, names)
        return names


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse class names, by id, that cannot be what the masks mean.

    Raises:
        PipelineError: fewer than 2 or more than 255 names, one twice, one that is no plain text or no class, or
                background not first.
    """
    if not 2 <= len(names) <= VOID:
        raise PipelineError(f"{path}: {len(names)} classes; it must name 2 to {VOID}, background first")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PipelineError(f"{path}: named more than once: {', '.join(twice)}")
    if faults := [fault for name in names if (fault := name_fault(name))]:
        raise PipelineError(f"{path}: class {'; class '.join(faults)}; write it as plain text")
    if faults := [fault for name in names if (fault := _more_than_a_name(name))]:
        raise PipelineError(f"{path}: {'; '.join(faults)}; write one bare name a line, in the order of the ids")
    if all(re.match(r"\d+\s+\S", name) for name in names):
        raise PipelineError(f"{path}: each line begins with a number; write the bare names, in the order of the ids")
    if IGNORE in names:
        raise PipelineError(
            f"{path}: {IGNORE} is no class: it is how labelme's labels.txt writes void, which is {VOID} in a mask. "
            "Remove the line, or every class gets the id after its own"
        )
    if later := [name for name in names[1:] if is_background(name)]:
        raise PipelineError(
            f"{path}: {later[0]} is class {names.index(later[0])}, and background must be class 0: make it the first "
            "line, and renumber masks of class ids if they have it at another id"
        )


def _more_than_a_name(line: str) -> str | None:
    """What a line of a table, of a list in YAML or of code holds beside the name; None where it is a bare name."""
    cases = (
        (r"#.*", "is a comment"),
        (r"\d+\s*[:;,=].*", "begins with an id"),
        (r"-\s+\S.*", "begins with a list mark"),
        (r"(['\"]).*\1,?", "is in quotes"),
        (r".*[,;:]", "ends with a separator"),
        (r".*[,;:]\s*\d+", "holds numbers"),
    )
    return next((f"the line {line!r} {fault}" for pattern, fault in cases if re.fullmatch(pattern, line)), None)


def is_background(name: str) -> bool:
    """Whether a class is what no object covers, as tools spell it: background, Background, _background_, BG."""
    return name.strip("_ ").casefold() in ("background", "bg")


def parse_lines(text: bytes) -> list[str]:
    """The lines of UTF-8 text that are not blank, stripped, composed (NFC), without a byte-order mark.

    Raises:
        UnicodeDecodeError: it is something else.
    """
    # not `splitlines`: it takes control characters for ends of lines, and would make two names of one
    lines = text.decode("utf-8-sig").replace("\r", "\n").split("\n")
    return [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]


def read_lines(path: Path, remedy: str) -> list[str]:
    """`parse_lines` of a file.

    Raises:
        PipelineError: it is missing, no file or no UTF-8 text; the message ends with the remedy.
    """
    if found := no_file(path):
        raise PipelineError(f"{path}: {found}; {remedy}")
    try:
        return parse_lines(path.read_bytes())
    except UnicodeDecodeError:
        raise PipelineError(f"{path}: no UTF-8 text; {remedy}") from None
