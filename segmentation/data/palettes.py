"""Whether the colors of palette masks stand for one class each.

A tool that saves a mask with fewer colors, or sorts them, changes the ids and keeps the picture: every viewer shows the
mask as before, and a cat is a dog. Only the palette tells.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segmentation.data.class_names import CVAT, Color, is_void, parse_color, read_labelmap
from segmentation.data.voc import CLASSES, VOID, VocFolder, palette, read_lines
from segmentation.errors import PipelineError

PALETTE = "palette.txt"
REMEDY = (
    f"write r g b on each line, one line a class in the order of classes.txt, and void's ({VOID}) last, if you like"
)


@dataclass(frozen=True)
class Reference:
    """Which color stands for which label.

    Attributes:
        origin: what says so, in words.
        colors: by label.
        binding: whether a label has this color and no other; else another tool's colors are fine, but not this color at
            another label.
    """

    origin: str
    colors: dict[int, Color]
    binding: bool = False


@dataclass(frozen=True)
class Painted:
    """A palette mask: its file, a hash of its whole palette, and its labels' colors (None: outside of the palette)."""

    file: str
    palette: str
    colors: dict[int, Color | None]


def find_reference(folder: VocFolder, names: Sequence[str]) -> Reference | None:
    """What the folder says about colors: `palette.txt`, else CVAT's `labelmap.txt`, else VOC's own with VOC's names.

    Raises:
        PipelineError: one of the files is malformed.
    """
    if os.path.lexists(path := folder.root / PALETTE):
        lines = read_lines(path, REMEDY)
        if not len(names) <= len(lines) <= len(names) + 1:
            raise PipelineError(f"{path}: {len(lines)} colors for {len(names)} classes; {REMEDY}")
        colors = [parse_color(path, line, line.split()) for line in lines]
        given = dict(zip([*range(len(names)), VOID], colors, strict=False))
        _refuse_twice(path, given)
        return Reference(PALETTE, given, binding=True)
    if os.path.lexists(path := folder.root / CVAT):
        labels = read_labelmap(path)
        known = {label: color for label, name in enumerate(names) if (color := labels.get(name)) is not None}
        for name, color in labels.items():
            if color and is_void(name) and name not in names:
                known[VOID] = color
        _refuse_twice(path, known)
        if known:
            return Reference(CVAT, known)
    if list(map(_plain, names)) == list(CLASSES):
        flat = palette()
        voc = {label: (flat[3 * label], flat[3 * label + 1], flat[3 * label + 2]) for label in range(256)}
        return Reference("VOC's palette", {label: voc[label] for label in (*range(len(CLASSES)), VOID)})
    return None


def _plain(name: str) -> str:
    """A name without what tools add to VOC's: _background_, TV/monitor, dining table."""
    return "".join(filter(str.isalnum, name)).casefold()


def _refuse_twice(path: Path, colors: dict[int, Color]) -> None:
    for label, color in colors.items():
        if same := [other for other, theirs in colors.items() if theirs == color and other != label]:
            raise PipelineError(
                f"{path}: {in_words(color)} is there for label {label} and label {same[0]}; give each its own"
            )


def in_words(color: Color) -> str:
    return "color " + " ".join(map(str, color))


def conflicts(
    masks: Sequence[Painted], reference: Reference | None, ids: Collection[int] = frozenset()
) -> dict[str, str]:
    """What is wrong with the palettes, by the masks' files.

    A palette in which each label has its own grey (label 5 is 5 5 5) says nothing beyond the labels. In a palette of
    greys alone, the grey of another id is refused: a tool has made a palette PNG of a grey mask, and renumbered it. Any
    other palette is held to the reference; what the reference says nothing about must agree within the set: masks of
    the commonest palette are right, others must not have its colors at other labels, nor other colors at its labels.
    One palette may have a color twice.

    Args:
        masks: all palette masks of the set.
        reference: which color stands for which label, if anything says so.
        ids: labels that a grey mask of this set may have.
    """
    found: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    renumbered = _renumbered_greys(masks, ids)
    for mask in masks:
        if all(color == (label,) * 3 for label, color in mask.colors.items()):
            continue
        if mask.palette in renumbered:
            found[mask.file] = renumbered[mask.palette]
            continue
        if (words := _outside(mask) or _against(reference, mask)) is not None:
            found[mask.file] = words
            continue
        known = reference.colors if reference else {}
        free = {label: color for label, color in mask.colors.items() if color and known.get(label) != color}
        groups.setdefault(mask.palette, _Group()).add(mask.file, free)
    agreed = _Agreed()
    for group in sorted(groups.values(), key=lambda group: -len(group.masks)):  # the earlier first where they tie
        if agreed.contradicted_by(group.colors, group.labels) is None:
            agreed.take(group)
        else:
            for file, colors in group.masks.items():
                if (words := agreed.contradicted_by(colors, group.labels)) is not None:
                    found[file] = words
    return found


def _renumbered_greys(masks: Sequence[Painted], ids: Collection[int]) -> dict[str, str]:
    """What is wrong with palettes of greys alone, by palette; black may stand anywhere, as padding and void do."""
    palettes: dict[str, dict[int, Color]] = {}
    for mask in masks:
        known = {label: color for label, color in mask.colors.items() if color is not None}
        palettes.setdefault(mask.palette, {}).update(known)
    found = {}
    for name, colors in palettes.items():
        if any(len(set(color)) > 1 for color in colors.values()):
            continue
        own = any(label and color[0] == label for label, color in colors.items())
        for label, (grey, *_) in sorted(colors.items()):
            # white is the one grey that people paint with: as void it is known by its neighbors or by other masks
            if grey not in (0, label) and (grey in ids or (grey == VOID and own)):
                found[name] = f"label {label} has the grey {grey} {grey} {grey}, which is label {grey} in a grey mask"
                break
    return found


@dataclass
class _Group:
    """Masks of one palette, and what all of them show of it."""

    masks: dict[str, dict[int, Color]] = field(default_factory=dict)
    colors: dict[int, Color] = field(default_factory=dict)
    labels: dict[Color, set[int]] = field(default_factory=dict)

    def add(self, file: str, colors: dict[int, Color]) -> None:
        self.masks[file] = colors
        self.colors |= colors
        for label, color in colors.items():
            self.labels.setdefault(color, set()).add(label)


@dataclass
class _Agreed:
    """What the palettes so far say, and in which mask: colors by label, and labels by color."""

    colors: dict[int, tuple[Color, str]] = field(default_factory=dict)
    labels: dict[Color, dict[int, str]] = field(default_factory=dict)

    def take(self, group: _Group) -> None:
        for file, colors in group.masks.items():
            for label, color in colors.items():
                self.colors.setdefault(label, (color, file))
                self.labels.setdefault(color, {}).setdefault(label, file)

    def contradicted_by(self, colors: dict[int, Color], labels: dict[Color, set[int]]) -> str | None:
        for label, color in sorted(colors.items()):
            places = self.labels.get(color)
            if places is not None and not labels[color] & set(places):
                other, file = next(iter(places.items()))
                return f"{in_words(color)} is label {label}, but label {other} in {file}"
            # void alone is of no class, and tools paint it as they like
            if label != VOID and label in self.colors and self.colors[label][0] != color:
                other_color, file = self.colors[label]
                return f"label {label} has {in_words(color)}, but {in_words(other_color)} in {file}"
        return None


def _outside(mask: Painted) -> str | None:
    """Pillow stores a palette of up to 16 colors in up to 4 bits, and cuts the labels to them: 255 becomes 3, or 15."""
    for label, color in mask.colors.items():
        if color is None and label < 16:
            return f"label {label} lies outside of its palette: a larger label ({VOID}?) was cut when it was saved"
    return None


def _against(reference: Reference | None, mask: Painted) -> str | None:
    if reference is None:
        return None
    for label, color in sorted(mask.colors.items()):
        if color is None or reference.colors.get(label) == color:
            continue
        if owners := [owner for owner, owned in reference.colors.items() if owned == color]:
            return f"label {label} has {in_words(color)}, which is label {owners[0]} in {reference.origin}"
        if reference.binding and label in reference.colors:
            wanted = in_words(reference.colors[label])
            return f"label {label} has {in_words(color)}; in {reference.origin} it has {wanted}"
    return None
