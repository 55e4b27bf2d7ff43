"""Class names as other tools write them beside masks in VOC layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from segmentation.data.voc import CLASSES, VOID, VocFolder, check_names, read_lines
from segmentation.errors import PipelineError

LABELME, CVAT = "class_names.txt", "labelmap.txt"
# Names in such files are not read; they are told apart from what a folder holds otherwise.
LIKELY_NAMES = (".txt", ".csv", ".names", ".json", ".yaml", ".yml")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassNames:
    """Names by id, and the file that they come from: None where VOC's are assumed."""

    names: list[str]
    file: Path | None


def find_class_names(folder: VocFolder) -> ClassNames:
    """The names of `classes.txt`, else of labelme's `class_names.txt`, else of CVAT's `labelmap.txt`, else VOC's.

    Raises:
        PipelineError: the file is no UTF-8 text, or its names are refused (`segmentation.data.voc.check_names`).
    """
    if os.path.lexists(folder.classes_file):
        return ClassNames(folder.classes(), folder.classes_file)
    if os.path.lexists(path := folder.root / LABELME):
        names = read_lines(path, "write one class name a line, background first")
    elif os.path.lexists(path := folder.root / CVAT):
        names = _without_void(path, list(read_labelmap(path)))
    else:
        return ClassNames(list(CLASSES), None)
    check_names(path, names)
    return ClassNames(names, path)


def read_labelmap(path: Path) -> dict[str, Color | None]:
    """CVAT's `labelmap.txt`: the color of each class, None where it has none, in the order of their ids.

    A line is `name:r,g,b:parts:actions`, of which only the name is necessary; lines with # in front are comments.

    Raises:
        PipelineError: it is no UTF-8 text, a color is no color, or a name is there twice.
    """
    labels: dict[str, Color | None] = {}
    for line in read_lines(path, "write name:r,g,b:: on each line"):
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        name, color = name.strip(), rest.partition(":")[0].strip()
        if not name:
            raise PipelineError(f"{path}: the line {line!r} has no name; write name:r,g,b::")
        if name in labels:
            raise PipelineError(f"{path}: named more than once: {name}")
        labels[name] = parse_color(path, line, color.split(",")) if color else None
    return labels


def is_void(name: str) -> bool:
    """Whether a line of `labelmap.txt` means void, as tools spell it."""
    return name.casefold() in ("ignored", "ignore", "void")


def _without_void(path: Path, names: list[str]) -> list[str]:
    """The classes among the names: void is 255 in a mask, and no class.

    Raises:
        PipelineError: void stands before a class, so which id that class has cannot be known.
    """
    if any(map(is_void, names[:-1])):
        void = next(filter(is_void, names))
        raise PipelineError(
            f"{path}: {void} stands before {names[-1]}. Void is {VOID} in a mask and no class: if the masks are of "
            f"colors, write {void} on the last line; if they are of ids, write the names of all ids into classes.txt"
        )
    return names[:-1] if names and is_void(names[-1]) else names


def parse_color(path: Path, line: str, channels: list[str]) -> Color:
    """The color that a line of a file writes as three numbers from 0 to 255.

    Raises:
        PipelineError: it is none.
    """
    numbers = [channel.strip() for channel in channels]
    if len(numbers) == 3 and all(number.isascii() and number.isdecimal() and int(number) < 256 for number in numbers):
        red, green, blue = map(int, numbers)
        return red, green, blue
    raise PipelineError(f"{path}: the line {line!r} has no color; a color is three numbers from 0 to 255, red first")


def assumed(folder: VocFolder) -> str:
    """In words, that VOC's names are assumed, and which files beside the masks were not read."""
    others = sorted(
        path.name for path in folder.root.iterdir() if path.suffix.lower() in LIKELY_NAMES and path.is_file()
    )
    unread = f" (not read: {', '.join(others)})" if others else ""
    return (
        f"{folder.root}: no classes.txt, {LABELME} or {CVAT}{unread}, so VOC's {len(CLASSES)} class names are assumed. "
        f"If class 1 of your masks is not {CLASSES[1]}, write your names into classes.txt, one a line, background first"
    )
