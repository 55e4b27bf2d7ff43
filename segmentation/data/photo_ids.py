"""From the lines of a split's list to ids, and to the files of the data set that they mean.

A list is often written by another tool, on another system, than the photos were: in other case, with a suffix, in
another Unicode form. An id is the photo's file name without its suffix, composed (NFC), whatever the list calls it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segmentation.data.voc import VocFolder
from segmentation.names import name_fault

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
PNG = (".png",)
LONGEST = 200  # bytes; with a suffix, and a temporary file's name around it, below the 255 of most file systems

Problems = dict[str, str]  # by id


@dataclass(frozen=True)
class Listed:
    """What a line of a list means.

    Attributes:
        line: as it is written.
        id: of the pair; the line itself where no photo fits it.
        photo: the file's name in `JPEGImages`, None where there is none.
        mask: the file's name in `SegmentationClass`, None where there is none.
        photo_problem: why there is no photo.
        mask_problem: why there is no mask.
    """

    line: str
    id: str
    photo: str | None = None
    mask: str | None = None
    photo_problem: str | None = None
    mask_problem: str | None = None


def id_fault(identifier: str) -> str | None:
    """Why an id is no plain file name, None where it is one: such an id never leads out of its folder."""
    if not identifier:
        return "'' is empty"
    if fault := name_fault(identifier):
        return fault
    if "/" in identifier or "\\" in identifier:
        return f"{identifier!r} holds a slash: a path, and no file name"
    if identifier.startswith("."):
        return f"{identifier!r} begins with a dot, as hidden files do"
    if (size := len(identifier.encode())) > LONGEST:
        return f"{identifier!r} takes {size} bytes; at most {LONGEST}"
    return None


class PairFinder:
    """Finds the photo and the mask that lines of lists mean.

    Args:
        photos: names of the files in `JPEGImages`.
        masks: names of the files in `SegmentationClass`.
    """

    def __init__(self, photos: Iterable[str], masks: Iterable[str]) -> None:
        self._photos, self._masks = _by_stem(photos), _by_stem(masks)
        self._of_id: dict[str, str] = {}  # the photo that an id was given to

    def find(self, line: str) -> Listed:
        """The pair of a line. A name that fits to the letter goes first, then other suffixes, then other case."""
        line = unicodedata.normalize("NFC", line)
        found = self._photos_of(line)
        if not found:
            return self._without_photo(line)
        if len(found) > 1:
            text = f"{_photo(line)}: {' and '.join(found)} are both meant; rename one of them"
            return Listed(line, line, photo_problem=text, mask_problem=f"{_mask(line)}: not looked for")
        (photo,) = found
        identifier = _stem(photo)
        if fault := id_fault(identifier):  # a file can be called what is no id
            return Listed(line, line, photo_problem=f"id {fault}", mask_problem=f"id {fault}")
        if (first := self._of_id.setdefault(identifier, photo)) != photo:
            text = f"{_photo(identifier)}: {first} and {photo} have one id; rename one of them"
            return Listed(line, identifier, photo_problem=text, mask_problem=f"{_mask(identifier)}: not looked for")
        return self._with_mask(Listed(line, identifier, photo))

    def _photos_of(self, line: str) -> list[str]:
        if found := _match(self._photos, line, JPEG):
            return found
        found = _match(self._photos, stem := _without_suffix(line), JPEG)
        named = [name for name in self._photos.get(_key(stem), ()) if unicodedata.normalize("NFC", name) == line]
        return named if found and named and Path(line).suffix.lower() in JPEG else found

    def _masks_of(self, identifier: str) -> list[str]:
        """The masks that fit; one in other case belongs to the photo that it fits to the letter."""
        of_others = {_stem(photo) for photo in self._photos.get(_key(identifier), ())} - {identifier}
        return [name for name in _match(self._masks, identifier, PNG) if _stem(name) not in of_others]

    def _without_photo(self, line: str) -> Listed:
        why = self._diagnosis(line)
        if fault := id_fault(line):
            text = f"id {line!r}: {why}" if why else f"id {fault}"
            return Listed(line, line, photo_problem=text, mask_problem=text)
        text = f"{_photo(line)} is missing" + f"; {why}" * bool(why)
        return replace(self._with_mask(Listed(line, line)), photo_problem=text)

    def _diagnosis(self, line: str) -> str:
        """What a line without a photo may be meant to say; empty where that cannot be guessed."""
        if line.startswith("#"):
            return "a comment? Lists have none: remove the line"
        if others := _match(self._photos, line, None):
            return f"there is {', '.join(others)}: save it as a JPEG"
        # first what spaces in a name leave whole
        for part in (*re.split(r"[,;|\t]+", line), *re.split(r"[\s,;|\"'#]+", line)):
            name = re.split(r"[/\\]", part.strip())[-1]
            found = self._photos_of(name) if name and name != line else []
            if found:
                paths = sum(bool(re.search(r"[/\\]", word)) for word in line.split())
                holds = "two paths" if paths > 1 else "a path" if paths else "more than an id"
                return f"the line seems to hold {holds}: write {_stem(found[0])} alone"
        return ""

    def _with_mask(self, listed: Listed) -> Listed:
        found, file = self._masks_of(listed.id), _mask(listed.id)
        if len(found) == 1:
            return replace(listed, mask=found[0])
        if found:
            return replace(listed, mask_problem=f"{file}: {' and '.join(found)} are both meant; rename one of them")
        others = _match(self._masks, listed.id, None)
        why = f"; there is {', '.join(others)}" if others else ""
        return replace(listed, mask_problem=f"{file} is missing{why}")


def write_lists(folder: VocFolder, splits: Mapping[str, Sequence[Listed]]) -> None:
    """Write each split's ids, one a line, and what is wrong with pairs, where something is."""
    problems: dict[str, Problems] = {"photos": {}, "masks": {}}
    for split, listed in splits.items():
        path = folder.split_file(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{entry.id}\n" for entry in listed), encoding="utf-8")
        for entry in listed:
            if entry.photo_problem:
                problems["photos"][entry.id] = entry.photo_problem
            if entry.mask_problem:
                problems["masks"][entry.id] = entry.mask_problem
    if any(problems.values()):
        folder.problems_file.write_text(json.dumps(problems, ensure_ascii=False, indent=1), encoding="utf-8")


def read_problems(folder: VocFolder) -> tuple[Problems, Problems]:
    """What `write_lists` knew of photos and of masks that are not in the folder."""
    try:
        problems = json.loads(folder.problems_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}
    return problems["photos"], problems["masks"]


def other_names(listed: Iterable[Listed]) -> list[str]:
    """Where a line or a file is called differently than `<id>.jpg`: `'IMG_1' is img_1.jpg`."""
    unlike = {e.line: e.photo for e in listed if e.photo and not e.line == e.id == e.photo.removesuffix(".jpg")}
    return [f"{line!r} is {photo}" for line, photo in unlike.items()]


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name in sorted(names):
        found[_key(Path(name).stem)].append(name)
    return dict(found)


def _match(names: Mapping[str, list[str]], stem: str, suffixes: Sequence[str] | None) -> list[str]:
    """The names that fit a stem best; all suffixes but these, where they are None."""
    fitting = [name for name in names.get(_key(stem), ()) if suffixes is None or Path(name).suffix.lower() in suffixes]
    same_stem = [name for name in fitting if _stem(name) == stem]
    to_the_letter = [name for name in same_stem if suffixes and Path(name).suffix == suffixes[0]]
    return to_the_letter or same_stem or fitting


def _key(stem: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def _without_suffix(line: str) -> str:
    suffix = Path(line).suffix
    return line.removesuffix(suffix) if suffix.lower() in (*JPEG, *PNG) else line


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", Path(name).stem)


def _photo(identifier: str) -> str:
    return f"JPEGImages/{identifier}.jpg"


def _mask(identifier: str) -> str:
    return f"SegmentationClass/{identifier}.png"
