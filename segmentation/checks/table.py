"""The table that the data checks judge: one row a listed pair, from the manifest and from the written files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segmentation.data.images import read_mask, read_photo
from segmentation.data.palettes import Painted, Reference, conflicts
from segmentation.data.parallel import thread_pool
from segmentation.data.photo_ids import id_fault
from segmentation.data.voc import VOID
from segmentation.errors import PipelineError
from segmentation.progress import Progress

if TYPE_CHECKING:  # the workers that read files import this module: keep it light
    import pandas as pd


@dataclass(frozen=True)
class MaskRow:
    """What the rules see of one listed pair; the columns of the table.

    A column is `None` where it is in order, or where a fault in another column leaves nothing to judge.
    """

    split: str
    id: str
    listed_in: str  # "train", "val" or "train and val"
    times_listed: int  # in this split
    unsafe_id: str | None = None
    photo_problem: str | None = None
    mask_problem: str | None = None
    mask_mode: str | None = None  # Pillow's name of the pixel format
    photo_format: str | None = None
    photo_doubt: str | None = None
    photo_size: str | None = None  # of the written file, "518×518"
    mask_size: str | None = None
    photo_original_size: str | None = None
    mask_original_size: str | None = None
    labels: str | None = None  # in the written mask, "0, 15, 255"
    every_label: str | None = None  # in the written mask or in the original, which is what evaluate scores
    highest_label: int | None = None  # of them, void aside
    new_labels: str | None = None  # those that the original mask has not
    palette_conflict: str | None = None  # of the original
    void_share: float | None = None  # of a mask that is not all void
    changed: str | None = None  # "photo", "mask" or "photo and mask": no longer what the manifest describes
    same_photo_in_train: str | None = None  # ids, for a row of val
    labels_missing_in_train: str | None = None  # class ids, for a row of val; those of no mask, for the first of train
    only_labels: str | None = None  # of all masks of train, where they show one class alone; for the first of train
    only_labels_in_val: str | None = None  # the same of val, for the first of train


@dataclass(frozen=True)
class Written:
    """What a file under `data/processed` turned out to be when read back; either `problem` or the rest is set."""

    problem: str | None = None
    size: str | None = None
    sha256: str | None = None
    mode: str | None = None
    labels: tuple[int, ...] = ()
    void_share: float | None = None


@dataclass(frozen=True)
class Copies:
    """The two files of a pair, each `None` where the manifest says that there is none."""

    photo: Written | None = None
    mask: Written | None = None


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The manifest's rows in list order.

    Raises:
        PipelineError: it is missing, unreadable or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from segmentation.data.preprocess import SCHEMA

    remedy = "run `python -m stages.preprocess` again"
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: no readable Parquet file ({error}); {remedy}") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise PipelineError(f"{path}: lacks the columns {', '.join(missing)}; {remedy}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def build_rows(
    processed: Path, manifest: Sequence[dict[str, Any]], classes: int, reference: Reference | None
) -> list[MaskRow]:
    """Read every written file back, on all cores, and describe every listed pair.

    Args:
        processed: what preprocess wrote.
        manifest: its rows.
        classes: how many there are.
        reference: what the colors of palette masks stand for; None = they are held to each other alone.
    """
    copies = _read_all(processed, {row["id"]: row for row in manifest})
    times = Counter((row["split"], row["id"]) for row in manifest)
    listed_in = defaultdict(set)
    ids_in_train = defaultdict(set)  # by hash of the photo
    labels_in_train: set[int] = set()
    labels_in_val: set[int] = set()
    for row in manifest:
        listed_in[row["id"]].add(row["split"])
        if row["split"] == "train":
            ids_in_train[row["image_sha256"]].add(row["id"])
        if mask := copies[row["id"]].mask:
            shown = labels_in_train if row["split"] == "train" else labels_in_val
            shown |= set(mask.labels)
    painted = [found for row in manifest if (found := _painted(row))]
    grey = {label for row in manifest if row["original_colors"] is None for label in row["original_labels"] or ()}
    clashes = conflicts(painted, reference, {*range(classes), *grey})
    # facts of the set as a whole, which the first row of train carries
    whole = {
        "labels_missing_in_train": _text(x for x in range(classes) if x not in labels_in_train | labels_in_val),
        "only_labels": _if_one_class(labels_in_train),
        "only_labels_in_val": _if_one_class(labels_in_val),
    }
    rows = []
    for row in manifest:
        identifier, pair = row["id"], copies[row["id"]]
        facts = _facts(row, pair) | {"palette_conflict": clashes.get(_mask_file(identifier))}
        # Without a readable mask in train every class would be missing there; the cause is reported elsewhere.
        if row["split"] == "train" and labels_in_train:
            facts |= whole
            whole = {}
        if row["split"] == "val":
            # The same id in both splits is a fault of the lists, and reported as one.
            twins = ids_in_train[row["image_sha256"]] - {identifier} if row["image_sha256"] else set()
            facts["same_photo_in_train"] = _text(sorted(twins))
            if pair.mask and labels_in_train:
                missing = set(pair.mask.labels) - labels_in_train
                facts["labels_missing_in_train"] = _text(x for x in sorted(missing) if x < classes)
        splits = " and ".join(sorted(listed_in[identifier]))
        rows.append(MaskRow(row["split"], identifier, splits, times[row["split"], identifier], **facts))
    return rows


def to_frame(rows: Sequence[MaskRow]) -> pd.DataFrame:
    """The rows as a data frame whose column types do not depend on what is null.

    Text is HTML-escaped: Data Docs put it into their pages as it is, and ids come from whoever wrote the lists.
    """
    import pandas as pd

    values = [{name: escape(x) if isinstance(x, str) else x for name, x in asdict(row).items()} for row in rows]
    frame = pd.DataFrame(values, columns=[column.name for column in fields(MaskRow)])
    kinds = {"times_listed": "int64", "highest_label": "Int64", "void_share": "float64"}
    return frame.astype({name: kinds.get(name, "object") for name in frame.columns})


def _read_all(processed: Path, manifest: dict[str, dict[str, Any]]) -> dict[str, Copies]:
    identifiers = list(manifest)
    photos = [id_fault(name) is None and manifest[name]["photo_problem"] is None for name in identifiers]
    masks = [id_fault(name) is None and manifest[name]["mask_problem"] is None for name in identifiers]
    if not any(photos) and not any(masks):
        return dict.fromkeys(identifiers, Copies())
    copies: dict[str, Copies] = {}
    with (
        Progress("validate: read back", len(identifiers), "pair") as progress,
        thread_pool(len(identifiers)) as (pool, _),
    ):
        found = pool.map(partial(_read_back, processed), identifiers, photos, masks)
        for identifier, pair in zip(identifiers, found, strict=True):
            copies[identifier] = pair
            progress.advance()
    return copies


def _read_back(processed: Path, identifier: str, photo: bool, mask: bool) -> Copies:
    return Copies(
        _read_photo(processed / "images" / f"{identifier}.png") if photo else None,
        _read_mask(processed / "masks" / f"{identifier}.png") if mask else None,
    )


def _read_photo(path: Path) -> Written:
    try:
        photo, _ = read_photo(path)
    except FileNotFoundError:
        return Written(problem=f"processed copy images/{path.name} is missing")
    except PipelineError as error:
        return Written(problem=f"processed copy {error}")
    return Written(size=f"{photo.width}×{photo.height}", sha256=hashlib.sha256(photo.tobytes()).hexdigest())


def _read_mask(path: Path) -> Written:
    try:
        mask = read_mask(path)
    except FileNotFoundError:
        return Written(problem=f"processed copy masks/{path.name} is missing")
    except PipelineError as error:
        return Written(problem=f"processed copy {error}")
    counts = np.bincount(mask.ravel(), minlength=256)
    return Written(
        size=f"{mask.shape[1]}×{mask.shape[0]}",
        sha256=hashlib.sha256(mask.tobytes()).hexdigest(),
        mode="P or L",  # `read_mask` accepts no other
        labels=tuple(np.flatnonzero(counts).tolist()),
        void_share=float(counts[VOID] / mask.size),
    )


def _facts(row: dict[str, Any], copies: Copies) -> dict[str, Any]:
    """The columns that say something of this pair alone."""
    if fault := id_fault(row["id"]):
        return {"unsafe_id": row["photo_problem"] or f"id {fault}"}
    photo, mask = copies.photo or Written(), copies.mask or Written()
    photo_problem = row["photo_problem"] or photo.problem
    mask_problem = row["mask_problem"] or mask.problem
    mode = mask.mode
    # `read_mask`'s words: the file decodes, but is no mask. That has its own rule and its own remedy.
    if mask_problem and (found := re.search(r"mode (\S+); a mask has one", mask_problem)):
        mode, mask_problem = found[1], None
    changed = [
        name
        for name, copy in (("photo", photo), ("mask", mask))
        if copy.sha256 and copy.sha256 != row["image_sha256" if name == "photo" else "mask_sha256"]
    ]
    facts: dict[str, Any] = {
        "photo_problem": photo_problem,
        "mask_problem": mask_problem,
        "mask_mode": mode,
        "photo_format": row["photo_format"],
        "photo_doubt": row["photo_doubt"],
        "photo_size": photo.size,
        "mask_size": mask.size,
        "photo_original_size": _size(row["photo_width"], row["photo_height"]),
        "mask_original_size": _size(row["mask_width"], row["mask_height"]),
        "changed": " and ".join(changed) or None,
    }
    if mask.labels:
        new = set(mask.labels) - set(row["original_labels"] or mask.labels)
        facts["labels"] = _text(mask.labels)
        every = {*mask.labels, *(int(label) for label in row["original_labels"] or ())}
        facts["every_label"] = _text(sorted(every))
        facts["highest_label"] = max(every - {VOID}, default=None)
        facts["new_labels"] = _text(sorted(new))
        facts["void_share"] = mask.void_share if mask.labels != (VOID,) else None
    return facts


def _if_one_class(labels: set[int]) -> str | None:
    return _text(sorted(labels)) if len(labels - {VOID}) == 1 else None


def _painted(row: dict[str, Any]) -> Painted | None:
    """What the palette of a pair's original mask says; None where it has none."""
    if row["original_colors"] is None or id_fault(row["id"]) is not None:
        return None
    colors = {
        int(label): (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)) if text else None
        for label, text in zip(row["original_labels"], row["original_colors"], strict=True)
    }
    return Painted(_mask_file(row["id"]), row["original_palette"], colors)


def _mask_file(identifier: str) -> str:
    return f"SegmentationClass/{identifier}.png"


def _size(width: int | None, height: int | None) -> str | None:
    return None if width is None or height is None else f"{int(width)}×{int(height)}"


def _text(values: Any) -> str | None:
    return ", ".join(map(str, values)) or None
