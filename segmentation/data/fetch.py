"""Bringing photos and masks into `data/raw`, in VOC layout, from wherever `params.yaml` says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
from filelock import FileLock, Timeout

from segmentation.data.archive import check_md5, download, extract_voc
from segmentation.data.class_names import CVAT, assumed, find_class_names
from segmentation.data.color_masks import read_by_color
from segmentation.data.file_kinds import file_kind
from segmentation.data.palettes import PALETTE, find_reference
from segmentation.data.photo_ids import Listed, PairFinder, id_fault, other_names, write_lists
from segmentation.data.sample import draw_sample
from segmentation.data.voc import SPLITS, VocFolder
from segmentation.errors import PipelineError
from segmentation.files import no_file, sha256_json
from segmentation.paths import RAW, project_root, scratch
from segmentation.progress import Progress
from segmentation.settings import FetchSettings

SHOWN = 5  # names in a note

LAYOUT = """expected in it, or in VOC2012/ below it:
  JPEGImages/<id>.jpg
  SegmentationClass/<id>.png
  ImageSets/Segmentation/train.txt and val.txt  one id a line
  classes.txt  optional: one class name a line, background first (labelme's class_names.txt and CVAT's labelmap.txt
               are read, too)"""


def fetch(settings: FetchSettings, root: Path = RAW) -> None:
    """Replace `root` by the data set that the settings name; what goes wrong before the end leaves `root` as it was.

    In `root` a photo is `<id>.jpg` and a mask `<id>.png`, however they are called where they come from. Listed pairs
    that are missing or whose id is unsafe stay in the lists, with the reason, for a later stage to report.

    Raises:
        PipelineError: the source is missing, unreachable, damaged or unsafe, or the disk is full.
    """
    try:
        with _replacing(root) as fresh:
            if settings.source == "voc2012":
                archive = _checked_archive(settings)
                splits = extract_voc(archive, fresh, settings.limit)
                origin = archive.name
            elif settings.source == "directory":
                source = find_own_folder(settings, root)
                splits, origin = _take(source, VocFolder(fresh), settings.limit)
            else:
                draw_sample(fresh, settings.limit)
                splits, origin = {}, "the drawn sample"
            summary = _finish(fresh)
    except OSError as error:
        raise PipelineError(f"{error.filename or root}: {error.strerror or error}") from None
    for split, listed in splits.items():
        _note(f"{split}.txt names photos another way than <id>.jpg", other_names(listed))
    print(f"fetch: {summary} from {origin}")


def fingerprint(settings: FetchSettings, root: Path = RAW) -> str:
    """Changes with whatever `fetch` would read: a photo, a mask, a list or the names of a folder of one's own.

    Files are told apart by size and time of change, as `make` does it. Of an archive and of the sample it is constant:
    `params.yaml` says all that there is to know.

    Raises:
        PipelineError: the folder is missing, or not in VOC layout.
    """
    if settings.source != "directory":
        return settings.source
    try:
        folder = find_own_folder(settings, root)
        listed = (entry for entries in _read_lists(folder, settings.limit).values() for entry in entries)
        files = {path for entry in listed for path in _files(folder, entry) if path}
        files |= {path for path in folder.root.iterdir() if path.is_file()}  # names and colors of classes
        files |= {folder.split_file(split) for split in SPLITS}
        found = sorted((str(path.relative_to(folder.root)), *_state(path)) for path in files)
    except OSError as error:
        raise PipelineError(f"{error.filename or settings.directory}: {error.strerror or error}") from None
    return sha256_json(found)


@contextmanager
def _replacing(root: Path) -> Iterator[Path]:
    """A fresh folder beside `root`, put in its place when the block ends well and removed otherwise."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for stale in root.parent.glob(f".{root.name}.*.tmp"):
        owner = stale.suffixes[-2].removeprefix(".") if len(stale.suffixes) > 1 else ""
        if not (owner.isdecimal() and int(owner) != os.getpid() and psutil.pid_exists(int(owner))):
            shutil.rmtree(stale)
    fresh = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        old = root.with_name(f".{root.name}.old.{os.getpid()}.tmp")
        if root.is_symlink():
            root.unlink()
        elif root.exists():
            root.rename(old)  # not removed in place: a kill must leave all of it or nothing
        fresh.rename(root)
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _checked_archive(settings: FetchSettings) -> Path:
    """The archive, local or downloaded, after its md5 check."""
    if settings.archive is not None:
        archive = project_root() / Path(settings.archive).expanduser()
        check_md5(archive, settings.md5)
        return archive
    name = Path(unquote(urlsplit(settings.url).path)).name
    archive = scratch() / "downloads" / ("voc2012.tar" if id_fault(name) else name)
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{archive}.lock", timeout=0):
            if not archive.exists():
                download(settings.url, archive)
            try:
                check_md5(archive, settings.md5)
            except PipelineError as error:  # the file stays: a typo in fetch.md5 must not cost two gigabytes
                raise PipelineError(
                    f"{error}\nIt came from {settings.url}; to download it again, delete it first"
                ) from None
    except Timeout:
        raise PipelineError(f"{archive}: another run is downloading it; wait for that one, then run again") from None
    return archive


def find_own_folder(settings: FetchSettings, root: Path = RAW) -> VocFolder:
    """The folder in VOC layout that `fetch.directory` means: itself, or `VOC2012` below it.

    Raises:
        PipelineError: there is none, it lacks a part of the layout, or it is `root`.
    """
    try:
        directory = project_root() / Path(settings.directory).expanduser()
    except RuntimeError:  # `~name` of an account that is not there
        raise PipelineError(f"{settings.directory}: no such account (fetch.directory); write the whole path") from None
    if root.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise PipelineError(f"{directory}: fetch.directory is this stage's own output; keep your photos elsewhere")
    for place in (directory, directory / "VOC2012", directory / "VOCdevkit" / "VOC2012"):
        folder = VocFolder(place)
        lists = [folder.split_file(split) for split in SPLITS]
        if (
            folder.photo("any").parent.is_dir()
            and folder.mask("any").parent.is_dir()
            and all(p.is_file() for p in lists)
        ):
            return folder
    state = "lacks a part of the VOC layout" if directory.is_dir() else "no such folder"
    if directory.is_file():
        state = "is a file, not a folder"
    raise PipelineError(f"{directory}: {state} (fetch.directory); {LAYOUT}")


def _take(source: VocFolder, fresh: VocFolder, limit: int | None) -> tuple[dict[str, list[Listed]], str]:
    """Copy a folder of the user's, whatever tool its class names and masks are from.

    Returns:
        What the lists' lines mean, by split; and the origin, in words.
    """
    names = find_class_names(source)  # first: refuses a faulty file under the name that the user knows
    reference = find_reference(source, names.names)
    if names.file is None:
        print(f"warning: {assumed(source)}")
    elif names.file != source.classes_file:
        print(f"fetch: class names from {names.file}")
    splits = _copy(source, fresh, limit)
    fresh.classes_file.write_text("".join(f"{name}\n" for name in names.names), encoding="utf-8")
    if reference is not None:
        read_by_color(fresh, reference)
    return splits, f"{source.root}" + (", with VOC's class names" if names.file is None else "")


def _copy(source: VocFolder, target: VocFolder, limit: int | None) -> dict[str, list[Listed]]:
    """Copy the listed photos and masks, and what names colors; of a link its content.

    Returns:
        What the lists' lines mean, by split.
    """
    splits = _read_lists(source, limit)
    write_lists(target, splits)
    copies = {source.root / name: target.root / name for name in (PALETTE, CVAT)}
    for entry in (entry for listed in splits.values() for entry in listed):
        photo, mask = _files(source, entry)
        copies |= ({photo: target.photo(entry.id)} if photo else {}) | ({mask: target.mask(entry.id)} if mask else {})
    with Progress("fetch: copy", len(copies), "file") as progress:
        for path, copy in copies.items():
            if path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            progress.advance()
    outside = [f"{path.relative_to(source.root)} is {path.resolve()}" for path in copies if _lies_outside(source, path)]
    _note(f"links out of {source.root}, whose content is copied", outside)
    return splits


def _read_lists(source: VocFolder, limit: int | None) -> dict[str, list[Listed]]:
    """What the lists' lines mean, by split; files that are not to be copied are problems."""
    folders = (source.photo("any").parent, source.mask("any").parent)
    finder = PairFinder(*([path.name for path in folder.iterdir()] for folder in folders))
    return {split: [_checked(source, finder.find(line)) for line in source.ids(split)[:limit]] for split in SPLITS}


def _files(source: VocFolder, entry: Listed) -> tuple[Path | None, Path | None]:
    photos, masks = source.photo("any").parent, source.mask("any").parent
    return photos / entry.photo if entry.photo else None, masks / entry.mask if entry.mask else None


def _checked(source: VocFolder, entry: Listed) -> Listed:
    photo, mask = _files(source, entry)
    if photo and (why := _not_copied(source, photo)):
        entry = replace(entry, photo=None, photo_problem=f"JPEGImages/{entry.id}.jpg: {photo.name} is {why}")
    if mask and (why := _not_copied(source, mask)):
        entry = replace(entry, mask=None, mask_problem=f"SegmentationClass/{entry.id}.png: {mask.name} is {why}")
    return entry


def _not_copied(source: VocFolder, path: Path) -> str | None:
    """What a path is that is not copied: no file, or a link that takes into `data/raw` what is no picture."""
    if found := no_file(path):
        return found
    if _lies_outside(source, path) and (kind := file_kind(path)) not in ("a JPEG", "a PNG"):
        return f"a link out of the folder, to {path.resolve()}, which is {kind or 'no picture'}"
    return None


def _lies_outside(source: VocFolder, path: Path) -> bool:
    linked = path.is_symlink() or path.parent.is_symlink()
    return linked and not path.resolve().is_relative_to(source.root.resolve())


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _note(what: str, cases: Sequence[str]) -> None:
    if cases:
        more = f" and {len(cases) - SHOWN} more" * (len(cases) > SHOWN)
        print(f"fetch: note: {what}: {', '.join(cases[:SHOWN])}{more}")


def _finish(root: Path) -> str:
    """Write `classes.txt` and say in words what `root` holds."""
    folder = VocFolder(root)
    names = folder.classes()
    folder.classes_file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    ids = {split: folder.ids(split) for split in SPLITS}
    every = {identifier for listed in ids.values() for identifier in listed}
    missing = sum(
        id_fault(name) is not None or not folder.photo(name).exists() or not folder.mask(name).exists()
        for name in every
    )
    counts = ", ".join(f"{len(listed)} {split}" for split, listed in ids.items())
    note = f" ({missing} of them without photo or mask: see validate)" if missing else ""
    return f"{counts} pairs{note} of {len(names)} classes"
