"""A registered model over a folder or a list of photos: mask files and one table, resumed where it was ended."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from segmentation.errors import PipelineError
from segmentation.files import atomic_path
from segmentation.images import Pixels, mask_image, read_photo
from segmentation.predictor import Predictor, class_shares
from segmentation.progress import Progress

SUFFIXES = {".jpg", ".jpeg", ".png"}
TABLE = "predictions.parquet"
RECORD = "predictions.sqlite"  # its presence also tells an output folder from a folder of photos
ROWS = 10_000  # of the table, held in memory at once

SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "mask": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "classes": pa.list_(pa.string()),
        "shares": pa.list_(pa.float64()),
        "model_version": pa.string(),
        "seconds": pa.float64(),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class Photo:
    """A photo's absolute path, and what it is called below `masks/` and `overlays/`, without their suffix."""

    path: Path
    name: str


@dataclass(frozen=True)
class Outcome:
    """How many photos a run was about, how many of them failed, and how many had been done before."""

    photos: int
    failed: int
    done_before: int
    table: Path


def find_photos(source: Path) -> list[Photo]:
    """The photos of a folder, or of a text file with one path a line, in order of name or of the list.

    Of a folder: files named as JPEG or PNG at any depth, through links, each folder once; nothing hidden, and nothing
    that an earlier run wrote. Of a list: every path as it is, relative ones from the list's folder, each once.

    Raises:
        PipelineError: there is none, or something cannot be read.
    """
    if source.is_dir():
        photos = list(_walk(Path(os.path.normpath(source.absolute()))))
    else:
        try:
            lines = source.read_bytes().decode("utf-8-sig").split("\n")
        except OSError as error:
            raise PipelineError(f"{source}: no folder and no list of photos: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PipelineError(f"{source}: no UTF-8 text; write the path of one photo a line") from None
        folder = source.absolute().parent
        paths = dict.fromkeys(os.path.normpath(folder / line.rstrip("\r")) for line in lines if line.strip())
        photos = [Photo(Path(path), path.lstrip("/")) for path in paths]
    if not photos:
        raise PipelineError(f"{source}: no photo in it (JPEG or PNG)")
    return photos


def _walk(root: Path) -> Iterator[Photo]:
    def fail(error: OSError) -> None:
        raise PipelineError(f"{error.filename}: cannot be read: {error.strerror}")

    seen = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen or RECORD in files:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Photo(path, str(path.relative_to(root)))


def predict_photos(
    predictor: Predictor,
    version: ModelVersion,
    source: Path,
    out: Path,
    overlays: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Write `masks/<name>.png`, with `overlays` also `overlays/<name>.jpg`, and then the table `predictions.parquet`.

    A photo is left as it is when this very version has done it, nothing has changed its size or time since, and its
    files are there; one that failed is tried again. The table has a row for every photo of `source`, in order; it is
    away while a run is under way or was ended.

    Args:
        predictor: the model of `version`.
        version: as it is named in the table.
        source: as `find_photos` takes it.
        out: the output folder, of one `source`.
        overlays: also write each photo with its mask over it, half transparent.
        progress: called with the number of finished photos, and of all.

    Raises:
        PipelineError: there is no photo, or `out` is of another source, inside it the source, in use, full or not
            writable.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise PipelineError(f"{out}: {source} lies in it, and would be mixed with its masks; choose another folder")
    photos = find_photos(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0), closing(_open_record(out / RECORD)) as record:
            return _predict(predictor, version, photos, out, overlays, progress, record)
    except Timeout:
        raise PipelineError(f"{out}: another run is writing into it; wait for its end, or choose another") from None
    except (OSError, sqlite3.Error) as error:
        raise PipelineError(f"{out}: cannot be written: {error}; the next run goes on from here") from None


def _predict(
    predictor: Predictor,
    version: ModelVersion,
    photos: list[Photo],
    out: Path,
    overlays: bool,
    progress: Callable[[int, int], None],
    record: sqlite3.Connection,
) -> Outcome:
    for left in out.rglob(".*.tmp.*"):  # half a file of a run that was killed
        left.unlink()
    todo = [photo for photo in photos if not _is_done(record, photo, version, out, overlays)]
    if todo:
        (out / TABLE).unlink(missing_ok=True)
    before = len(photos) - len(todo)
    with Progress("predict", len(photos), "photo", before=before) as bar:
        progress(before, len(photos))
        for done, photo in enumerate(todo, before + 1):
            key, row = _predict_one(predictor, version, photo, out, overlays)
            with record:
                record.execute(
                    "INSERT OR REPLACE INTO photos VALUES (?, ?, ?)", (os.fsencode(photo.name), key, json.dumps(row))
                )
            bar.advance()
            progress(done, len(photos))
    return Outcome(len(photos), _write_table(record, photos, out / TABLE), before, out / TABLE)


def _open_record(path: Path) -> sqlite3.Connection:
    record = sqlite3.connect(path)
    # what a killed process has written the system keeps; waiting for the disk would cost more than some predictions
    record.execute("PRAGMA synchronous = OFF")
    record.execute("CREATE TABLE IF NOT EXISTS photos (name BLOB PRIMARY KEY, key TEXT, row TEXT) WITHOUT ROWID")
    return record


def _find_row(record: sqlite3.Connection, photo: Photo) -> tuple[str, dict[str, Any]] | None:
    found = record.execute("SELECT key, row FROM photos WHERE name = ?", (os.fsencode(photo.name),)).fetchone()
    return found and (found[0], json.loads(found[1]))


def _is_done(record: sqlite3.Connection, photo: Photo, version: ModelVersion, out: Path, overlays: bool) -> bool:
    if not (found := _find_row(record, photo)):
        return False
    key, row = found
    if row["path"] != str(photo.path):
        raise PipelineError(f"{out}: has the mask of {_text(row['path'])}; choose another folder for {photo.path}")
    mask, overlay = _targets(out, photo)
    try:
        return (
            row["error"] is None
            and key == _key(photo.path, version)
            and mask.exists()
            and (overlay.exists() or not overlays)
        )
    except (OSError, ValueError, PipelineError):
        return False


def _targets(out: Path, photo: Photo) -> tuple[Path, Path]:
    return out / "masks" / f"{photo.name}.png", out / "overlays" / f"{photo.name}.jpg"


def _key(path: Path, version: ModelVersion) -> str:
    """What a finished photo is known by: its file as it was, and the model."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise PipelineError(f"{path}: not a file")
    # the number alone is another model's in another store
    return f"{found.st_size} {found.st_mtime_ns} {version.version} {version.model_id}"


def _predict_one(
    predictor: Predictor, version: ModelVersion, photo: Photo, out: Path, overlays: bool
) -> tuple[str, dict[str, Any]]:
    """The key and the row of one photo, with its files written, or with the error and without any file."""
    key, started = "", time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"path": str(photo.path), "model_version": str(version.version)}
    mask_file, overlay_file = _targets(out, photo)
    try:
        key = _key(photo.path, version)  # first: what changes while it is read must be read again
        picture, _ = read_photo(photo.path)
        row |= {"width": picture.width, "height": picture.height}
        mask = predictor.mask(picture)
        if overlays:
            with atomic_path(overlay_file) as temporary:
                _overlay(picture, mask).save(temporary, quality=90)
        else:  # one of an earlier state would pass for this mask's
            overlay_file.unlink(missing_ok=True)
        with atomic_path(mask_file) as temporary:
            mask_image(mask).save(temporary)
        shares = class_shares(mask)
        names = [predictor.card.classes[label] for label in shares]
        row |= {"mask": str(mask_file.relative_to(out)), "classes": names, "shares": list(shares.values())}
    except Exception as error:  # whatever it is, the next photo may be better
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        row["error"] = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        for file in (mask_file, overlay_file):  # of an earlier state of the photo
            with suppress(OSError, ValueError):  # most often none is there
                file.unlink()
    row["seconds"] = round(time.perf_counter() - started, 4)
    return key, row


def _overlay(photo: Image.Image, mask: Pixels) -> Image.Image:
    blend = Image.blend(photo, mask_image(mask).convert("RGB"), 0.5)
    return Image.composite(blend, photo, Image.fromarray(mask != 0))


def _write_table(record: sqlite3.Connection, photos: list[Photo], path: Path) -> int:
    """The rows of all photos, in order; returns how many have an error."""
    failed, rest = 0, iter(photos)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        while some := list(islice(rest, ROWS)):
            rows = []
            for photo in some:
                found = _find_row(record, photo)
                assert found is not None
                rows.append(found[1] | {key: _text(found[1][key]) for key in ("path", "mask", "error")})
            failed += sum(row["error"] is not None for row in rows)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return failed


def _text(value: str | None) -> str | None:
    """A name that is no UTF-8, as text: with its bytes as `\\x…`."""
    return value and value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
