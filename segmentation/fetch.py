"""Bringing photos and masks into `data/raw`, in VOC layout, from wherever `params.yaml` says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
from filelock import FileLock, Timeout

from segmentation.archive import check_md5, download, extract_voc, write_list
from segmentation.class_names import CVAT, assumed, find_class_names
from segmentation.color_masks import read_by_color
from segmentation.errors import PipelineError
from segmentation.palettes import PALETTE, find_reference
from segmentation.paths import RAW, project_root, scratch
from segmentation.progress import Progress
from segmentation.sample import draw_sample
from segmentation.settings import FetchSettings
from segmentation.voc import SPLITS, VocFolder, is_safe_id

LAYOUT = """expected in it, or in VOC2012/ below it:
  JPEGImages/<id>.jpg
  SegmentationClass/<id>.png
  ImageSets/Segmentation/train.txt and val.txt  one id a line
  classes.txt  optional: one class name a line, background first (labelme's class_names.txt and CVAT's labelmap.txt
               are read, too)"""


def fetch(settings: FetchSettings, root: Path = RAW) -> None:
    """Replace `root` by the data set that the settings name; what goes wrong before the end leaves `root` as it was.

    Listed pairs that are missing or whose id is unsafe stay in the lists for a later stage to report.

    Raises:
        PipelineError: the source is missing, unreachable, damaged or unsafe, or the disk is full.
    """
    try:
        with _replacing(root) as fresh:
            if settings.source == "voc2012":
                archive = _checked_archive(settings)
                extract_voc(archive, fresh, settings.limit)
                origin = archive.name
            elif settings.source == "directory":
                source = _voc_folder(project_root() / settings.directory, root)
                origin = _take(source, VocFolder(fresh), settings.limit)
            else:
                draw_sample(fresh, settings.limit)
                origin = "the drawn sample"
            summary = _finish(fresh)
    except OSError as error:
        raise PipelineError(f"{error.filename or root}: {error.strerror or error}") from None
    print(f"fetch: {summary} from {origin}")


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
    archive = scratch() / "downloads" / (name if is_safe_id(name) else "voc2012.tar")
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


def _voc_folder(directory: Path, root: Path) -> VocFolder:
    """The folder in VOC layout that `fetch.directory` means: itself, or `VOC2012` below it."""
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
    raise PipelineError(f"{directory}: {state} (fetch.directory); {LAYOUT}")


def _take(source: VocFolder, fresh: VocFolder, limit: int | None) -> str:
    """Copy a folder of the user's, whatever tool its class names and masks are from; returns the origin, in words."""
    names = find_class_names(source)  # first: refuses a faulty file under the name that the user knows
    reference = find_reference(source, names.names)
    if names.file is None:
        print(f"warning: {assumed(source)}")
    elif names.file != source.classes_file:
        print(f"fetch: class names from {names.file}")
    _copy(source, fresh.root, limit)
    fresh.classes_file.write_text("".join(f"{name}\n" for name in names.names), encoding="utf-8")
    if reference is not None:
        read_by_color(fresh, reference)
    return f"{source.root}" + (", with VOC's class names" if names.file is None else "")


def _copy(source: VocFolder, root: Path, limit: int | None) -> None:
    """Copy the listed photos and masks, and the names; of a link its content."""
    target = VocFolder(root)
    identifiers: dict[str, None] = {}  # a set that keeps the order
    for split in SPLITS:
        listed = source.ids(split)[:limit]
        write_list(target, split, listed)
        identifiers.update(dict.fromkeys(listed))
    files = [source.root / name for name in (PALETTE, CVAT)]
    files += [path for name in identifiers if is_safe_id(name) for path in (source.photo(name), source.mask(name))]
    with Progress("fetch: copy", len(files), "file") as progress:
        for path in files:
            if path.is_file():
                copy = root / path.relative_to(source.root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            progress.advance()


def _finish(root: Path) -> str:
    """Write `classes.txt` and say in words what `root` holds."""
    folder = VocFolder(root)
    names = folder.classes()
    folder.classes_file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    ids = {split: folder.ids(split) for split in SPLITS}
    every = {identifier for listed in ids.values() for identifier in listed}
    missing = sum(
        not is_safe_id(name) or not folder.photo(name).exists() or not folder.mask(name).exists() for name in every
    )
    counts = ", ".join(f"{len(listed)} {split}" for split, listed in ids.items())
    note = f" ({missing} of them without photo or mask: see validate)" if missing else ""
    return f"{counts} pairs{note} of {len(names)} classes"
