"""A registered model over a folder or a list of photos: mask files and one table, resumed where it was ended."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from segmentation.data.images import Pixels, mask_image, read_photo
from segmentation.errors import PipelineError, error_text
from segmentation.files import atomic_path, sha256_json
from segmentation.prediction.predictor import Predictor, class_shares
from segmentation.progress import Progress

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png"}
TABLE = "predictions.parquet"
LEFT_OUT = "left_out.txt"
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
class Found:
    """The photos of a source, and the names of a folder's other files, which are left out."""

    photos: list[Photo]
    left_out: list[str]


@dataclass(frozen=True)
class Outcome:
    """How many photos a run was about, how many failed, how many had been done before; and what `Found` left out."""

    photos: int
    failed: int
    done_before: int
    left_out: list[str]
    table: Path


def find_photos(source: Path) -> Found:
    """The photos of a folder, or of a text file with one path a line, in order of name or of the list.

    Of a folder: files named as JPEG or PNG at any depth, through links, each folder once; nothing hidden, and nothing
    that an earlier run wrote. Their paths are real ones: a link to the folder gives the same. Of a list: every path as
    it is, relative ones from the list's folder, each once.

    Raises:
        PipelineError: there is none, or something cannot be read.
    """
    left_out: list[str] = []
    if source.is_dir():
        photos = []
        for file in _walk(_real(source)):
            if file.path.suffix.lower() in SUFFIXES:
                photos.append(file)
            else:
                left_out.append(file.name)
    else:
        try:
            lines = source.read_bytes().decode("utf-8-sig").split("\n")
        except OSError as error:
            raise PipelineError(f"{source}: no folder and no list of photos: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PipelineError(f"{source}: no UTF-8 text; write the path of one photo a line") from None
        folder = _real(source.absolute().parent)
        paths = dict.fromkeys(_plain_path(folder / line.rstrip("\r")) for line in lines if line.strip())
        photos = [Photo(Path(path), path.lstrip("/")) for path in paths]
    if not photos:
        others = f"; {describe(left_out)}" if left_out else ""
        raise PipelineError(f"{source}: no photo in it (JPEG or PNG){others}")
    return Found(photos, left_out)


def describe(left_out: Sequence[str]) -> str:
    """How many files were left out, and the first of each suffix, in a line."""
    kinds = defaultdict(list)
    for name in left_out:
        kinds[Path(name).suffix.lower() or "without suffix"].append(name)
    parts = []
    for kind, names in sorted(kinds.items(), key=lambda one: -len(one[1])):
        parts.append(f"{len(names):,} {_line(kind)} ({', '.join(map(_line, names[:3]))}{', …' if names[3:] else ''})")
    return f"{len(left_out):,} left out, not named as JPEG or PNG: {', '.join(parts)}"


def _plain_path(path: Path) -> str:
    """A path without `..`, which after a link means the parent of what the link leads to."""
    return str(_real(path.parent) / path.name) if ".." in path.parts else os.path.normpath(path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises where links lead in a circle


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
            if not name.startswith("."):
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

    A photo is left as it is when this very model has done it under this version's number, nothing has changed the
    photo's size or time since, and its files are there; one that failed is tried again. The table has a row for every
    photo of `source`, in order; it is away while a run is under way or was ended.

    Args:
        predictor: the model of `version`.
        version: as it is named in the table.
        source: as `find_photos` takes it.
        out: the output folder, of one `source`.
        overlays: also write each photo with its mask over it, half transparent.
        progress: called with the number of finished photos, and of all.

    Raises:
        PipelineError: there is no photo, or `out` is of another source, has photos or masks of its own, is in use, full
            or not writable.
    """
    if _real(source).is_relative_to(_real(out)):
        raise PipelineError(f"{out}: {source} lies in it, and would be mixed with its masks; choose another folder")
    found = find_photos(source)
    try:
        _check_new(out, found.photos)
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0), closing(_open_record(out / RECORD)) as record:
            _claim(record, _real(source), out)
            _check_names(out, found.photos)
            return _predict(predictor, version, found, out, overlays, progress, record)
    except Timeout:
        raise PipelineError(f"{out}: another run is writing into it; wait for its end, or choose another") from None
    except (OSError, sqlite3.Error) as error:
        raise PipelineError(f"{out}: cannot be written: {error}; the next run goes on from here") from None


def _check_new(out: Path, photos: list[Photo]) -> None:
    """Refuse a folder that no run has written to yet, but that holds photos, or files of names that a run gives."""
    if (out / RECORD).exists():
        return
    for name in ("masks", "overlays", TABLE, LEFT_OUT):
        if (out / name).exists():
            raise PipelineError(f"{out}: has {name} already, of no run that could go on; choose another folder")
    if inside := next((photo for photo in photos if photo.path.is_relative_to(_real(out))), None):
        raise PipelineError(f"{out}: {inside.path} lies in it, and would be mixed with masks; choose another folder")


def _claim(record: sqlite3.Connection, source: Path, out: Path) -> None:
    """Note the source that an output folder is of, or refuse another source."""
    with record:
        record.execute("CREATE TABLE IF NOT EXISTS source (path BLOB NOT NULL)")
        found = record.execute("SELECT path FROM source").fetchone()
        if found is None and record.execute("SELECT 1 FROM photos").fetchone():
            raise PipelineError(f"{out}: written before sources were noted there; delete it, or choose another folder")
        if found is None:
            record.execute("INSERT INTO source VALUES (?)", (os.fsencode(source),))
        elif found[0] != os.fsencode(source):
            raise PipelineError(
                f"{out}: has the masks of {os.fsdecode(found[0])}; choose another folder for those of {source} (--out)"
            )


def _check_names(out: Path, photos: list[Photo]) -> None:
    """Refuse photos whose masks would be one file, where the output folder's file system ignores case."""
    lock, other = out / ".lock", out / ".LOCK"
    if not (other.exists() and lock.samefile(other)):
        return
    first: dict[str, Photo] = {}
    for photo in photos:
        same = first.setdefault(unicodedata.normalize("NFC", photo.name).casefold(), photo)
        if same is not photo:
            raise PipelineError(
                f"{out}: its file system keeps one mask of {same.path} and {photo.path}; choose a folder on another"
            )


def _predict(
    predictor: Predictor,
    version: ModelVersion,
    found: Found,
    out: Path,
    overlays: bool,
    progress: Callable[[int, int], None],
    record: sqlite3.Connection,
) -> Outcome:
    for half in (".predictions.*.tmp.*", ".left_out.*.tmp.*", "masks/**/.*.tmp.png", "overlays/**/.*.tmp.jpg"):
        for file in out.glob(half):  # of a run that was killed
            file.unlink()
    photos, model = found.photos, _model_key(predictor, version)
    todo = [photo for photo in photos if not _is_done(record, photo, model, out, overlays)]
    if todo:
        (out / TABLE).unlink(missing_ok=True)
    before = len(photos) - len(todo)
    with Progress("predict", len(photos), "photo", before=before) as bar:
        progress(before, len(photos))
        for done, photo in enumerate(todo, before + 1):
            name = os.fsencode(photo.name)
            with record:  # first: killed from here on, the files may be of this model and the row of the one before
                record.execute("DELETE FROM photos WHERE name = ?", (name,))
            key, row = _predict_one(predictor, model, photo, out, overlays)
            row["model_version"] = str(version.version)
            with record:
                record.execute("INSERT INTO photos VALUES (?, ?, ?)", (name, key, json.dumps(row)))
            bar.advance()
            progress(done, len(photos))
    if found.left_out:
        with atomic_path(out / LEFT_OUT) as temporary:
            temporary.write_text("".join(f"{_line(name)}\n" for name in found.left_out), encoding="utf-8")
    else:
        (out / LEFT_OUT).unlink(missing_ok=True)
    return Outcome(len(photos), _write_table(record, photos, out / TABLE), before, found.left_out, out / TABLE)


def _model_key(predictor: Predictor, version: ModelVersion) -> str:
    """What a model is known by: its number, and what it is made of.

    The number alone is another model's in another store, or where a registered model was deleted and made anew; and
    what is stored under a number may be overwritten. The card has the hash of the weights.
    """
    content = predictor.card.model_dump() | asdict(predictor.augmentation)
    return f"{version.version} {sha256_json(content)}"


def _open_record(path: Path) -> sqlite3.Connection:
    record = sqlite3.connect(path)
    # what a killed process has written the system keeps; waiting for the disk would cost more than some predictions
    record.execute("PRAGMA synchronous = OFF")
    record.execute("CREATE TABLE IF NOT EXISTS photos (name BLOB PRIMARY KEY, key TEXT, row TEXT) WITHOUT ROWID")
    return record


def _find_row(record: sqlite3.Connection, photo: Photo) -> tuple[str, dict[str, Any]] | None:
    found = record.execute("SELECT key, row FROM photos WHERE name = ?", (os.fsencode(photo.name),)).fetchone()
    return found and (found[0], json.loads(found[1]))


def _is_done(record: sqlite3.Connection, photo: Photo, model: str, out: Path, overlays: bool) -> bool:
    if not (found := _find_row(record, photo)):
        return False
    key, row = found
    mask, overlay = _targets(out, photo)
    try:
        return (
            row["error"] is None
            and key == _key(photo.path, model)
            and mask.exists()
            and (overlay.exists() or not overlays)
        )
    except (OSError, ValueError, PipelineError):
        return False


def _targets(out: Path, photo: Photo) -> tuple[Path, Path]:
    return out / "masks" / f"{photo.name}.png", out / "overlays" / f"{photo.name}.jpg"


def _key(path: Path, model: str) -> str:
    """What a finished photo is known by: its file as it was, and the model."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise PipelineError(f"{path}: not a file")
    return f"{found.st_size} {found.st_mtime_ns} {model}"


def _predict_one(
    predictor: Predictor, model: str, photo: Photo, out: Path, overlays: bool
) -> tuple[str, dict[str, Any]]:
    """The key and the row of one photo, with its files written, or with the error and without any file."""
    key, started = "", time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row["path"] = str(photo.path)
    mask_file, overlay_file = _targets(out, photo)
    try:
        key = _key(photo.path, model)  # first: what changes while it is read must be read again
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
        said = error_text(error)
        row["error"] = f"'{_line(said)}" if said.startswith(("=", "+", "-", "@")) else _line(said)
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
                rows.append(found[1] | {key: _text(found[1][key]) for key in ("path", "mask")})
            failed += sum(row["error"] is not None for row in rows)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return failed


def _text(value: str | None) -> str | None:
    """A name that is no UTF-8, as text: with its bytes as `\\x…`."""
    return value and value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _line(text: str) -> str:
    """Text from outside, as part of a line: what would end or reorder the line is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _text(text) or "")
