"""Downloading the VOC archive over an unreliable line, checking it, and unpacking the part of it that is needed."""

from __future__ import annotations

import hashlib
import lzma
import posixpath
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests

from segmentation.data.photo_ids import Listed, PairFinder, write_lists
from segmentation.data.voc import SPLITS, VocFolder, parse_lines
from segmentation.errors import PipelineError
from segmentation.files import no_file
from segmentation.progress import Progress

ATTEMPTS = 4  # in a row that bring no new byte
PAUSE = 2.0  # seconds before the second attempt; longer before each one after it
LISTS = "ImageSets/Segmentation"
TIMEOUT = (15, 60)  # seconds to connect, and between two bytes
CHUNK = 1 << 16
HASHED = 1 << 20
REMEDIES = """use one of:
  fetch.archive  a copy of the archive on this machine
  fetch.url      a mirror
  fetch.source   `directory`, for a folder in VOC layout of your own (fetch.directory), or `sample`"""


def download(url: str, destination: Path) -> None:
    """Download to `<destination>.part`, renamed when complete; a part left by an earlier run is continued.

    A broken connection is taken up again where it broke, as long as each few attempts bring new bytes.

    Raises:
        PipelineError: the host cannot be reached or refuses, or the disk is full; names the URL and the remedies.
    """
    part = destination.with_name(f"{destination.name}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        furthest, failures = _size(part), 0
        while True:
            try:
                _receive(url, part)
                break
            except requests.RequestException as error:
                failures = 1 if _size(part) > furthest else failures + 1
                furthest = max(furthest, _size(part))
                if failures == ATTEMPTS or _is_final(error):
                    raise PipelineError(f"{url}: download failed: {error}\n{REMEDIES}") from None
                print(f"{url}: {error}; attempt {failures + 1} of {ATTEMPTS}", flush=True)
                time.sleep(PAUSE * failures)
        part.replace(destination)
    except OSError as error:
        raise PipelineError(f"{part}: {error.strerror}; what has arrived is kept, the next run continues it") from None


def check_md5(path: Path, expected: str) -> None:
    """Hash the archive.

    Raises:
        PipelineError: it is missing or hashes to something else.
    """
    try:
        if found := no_file(path):
            raise PipelineError(f"{path}: {found}; set fetch.archive to the VOC archive's path")
        with path.open("rb") as stream, Progress("fetch: check md5", path.stat().st_size, "B") as progress:
            md5 = hashlib.md5(usedforsecurity=False)
            while chunk := stream.read(HASHED):
                md5.update(chunk)
                progress.advance(len(chunk))
            found = md5.hexdigest()
    except OSError as error:
        raise PipelineError(f"{path}: {error.strerror}; set fetch.archive to the VOC archive's path") from None
    if found != expected:
        raise PipelineError(
            f"{path}: md5 is {found}, expected {expected}: the file is damaged or another release; take another copy, "
            "or set fetch.md5 if this is the archive that you mean"
        )


def extract_voc(archive: Path, root: Path, limit: int | None) -> dict[str, list[Listed]]:
    """Unpack the lists, the photos and masks that they name, and `classes.txt` if there is one, into VOC layout.

    Listed pairs that the archive lacks, or whose id is unsafe, stay in the lists for a later stage to report.

    Args:
        archive: a tar, plain or compressed, with `JPEGImages/`, `SegmentationClass/` and `ImageSets/Segmentation/` in
            one folder (`VOCdevkit/VOC2012/` in the official one).
        root: the folder to write.
        limit: at most so many pairs of each split, the first of the list; None = all.

    Returns:
        What the lists' lines mean, by split.

    Raises:
        PipelineError: no tar, a truncated one, one without lists, or one with a link, a device or a path that leads out
            of the destination. Of the last kind nothing is unpacked.
    """
    try:
        with tarfile.open(archive) as tar:
            members = []
            with Progress("fetch: list the archive", unit="file") as progress:  # of a compressed one, all is unpacked
                for member in tar:
                    members.append(member)
                    progress.advance()
            _refuse_unsafe(archive, members)
            return _extract(archive, tar, {str(PurePosixPath(m.name)): m for m in members if m.isfile()}, root, limit)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 report damaged data without one
            raise PipelineError(f"{error.filename or root}: {error.strerror}, while unpacking {archive}") from None
        raise PipelineError(f"{archive}: no readable tar: {error}; download or copy it again") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_final(error: requests.RequestException) -> bool:
    """Whether another attempt is pointless: a malformed URL (also a ValueError) or a plain refusal of the server."""
    status = error.response.status_code if error.response is not None else 0
    return isinstance(error, ValueError) or (400 <= status < 500 and status not in (408, 429))


def _receive(url: str, part: Path) -> None:
    """Ask once for the bytes that `part` lacks; take all of them from a server that knows no ranges."""
    offset = _size(part)
    headers = {"Accept-Encoding": "identity"}  # else ranges and lengths count compressed bytes
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with Progress(f"fetch: wait for {urlsplit(url).netloc}"):
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    with response:
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 416 and content_range == f"bytes */{offset}":
            return  # an earlier run was ended between the last byte and the renaming
        fitting = content_range.startswith(f"bytes {offset}-")
        if offset and (response.status_code == 416 or (response.status_code == 206 and not fitting)):
            part.unlink()
            raise requests.RequestException(f"cannot continue at byte {offset:,}; starting again")
        response.raise_for_status()
        resumed = response.status_code == 206
        length = response.headers.get("Content-Length")
        total = int(length) + offset * resumed if length else None
        progress = Progress(f"fetch: download {part.stem}", total, "B", before=offset * resumed)
        with part.open("ab" if resumed else "wb") as stream, progress:
            # Small chunks: what is buffered of a chunk is lost when the connection breaks.
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                progress.advance(len(chunk))


def _refuse_unsafe(archive: Path, members: list[tarfile.TarInfo]) -> None:
    faults = [f"  {member.name!r} {why}" for member in members if (why := _fault(member))]
    if faults:
        listing = "\n".join(faults[:50] + [f"  and {len(faults) - 50} more"] * (len(faults) > 50))
        raise PipelineError(f"{archive}: refused, nothing was unpacked; take another copy. Unsafe members:\n{listing}")


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused; by hand, because `tarfile.data_filter` came with Python 3.11.4."""
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}"
    if not (member.isfile() or member.isdir()):
        return "is a device or another special file"
    if PurePosixPath(member.name).is_absolute():
        return "is an absolute path"
    if PurePosixPath(posixpath.normpath(member.name)).parts[:1] == ("..",):
        return "leads out of the destination"
    return None


def _extract(
    archive: Path, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], root: Path, limit: int | None
) -> dict[str, list[Listed]]:
    prefix = _voc_prefix(archive, members)
    folder = VocFolder(root)
    photos, masks = f"{prefix}JPEGImages/", f"{prefix}SegmentationClass/"
    finder = PairFinder(_names_in(photos, members), _names_in(masks, members))
    splits = {
        split: [finder.find(line) for line in _read_list(archive, tar, members[f"{prefix}{LISTS}/{split}.txt"])[:limit]]
        for split in SPLITS
    }
    write_lists(folder, splits)

    targets = {f"{prefix}classes.txt": folder.classes_file}
    for listed in (entry for entries in splits.values() for entry in entries):
        targets |= {f"{photos}{listed.photo}": folder.photo(listed.id)} if listed.photo else {}
        targets |= {f"{masks}{listed.mask}": folder.mask(listed.id)} if listed.mask else {}
    found = [(members[name], target) for name, target in targets.items() if name in members]
    found.sort(key=lambda pair: pair[0].offset)  # a compressed archive is read forwards
    with Progress("fetch: unpack", len(found), "file") as progress:
        for member, target in found:
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = tar.extractfile(member)
            assert stream is not None  # only regular files are in `members`
            with stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out)
            progress.advance()
    return splits


def _names_in(folder: str, members: Iterable[str]) -> list[str]:
    return [rest for name in members if name.startswith(folder) and "/" not in (rest := name.removeprefix(folder))]


def _voc_prefix(archive: Path, members: dict[str, tarfile.TarInfo]) -> str:
    """The path, with its final slash, of the archive's outermost folder that holds both lists."""
    train, val = (f"{LISTS}/{split}.txt" for split in SPLITS)
    prefixes = [name.removesuffix(train) for name in members if f"/{name}".endswith(f"/{train}")]
    prefixes = [prefix for prefix in prefixes if prefix + val in members]
    if not prefixes:
        raise PipelineError(
            f"{archive}: holds no folder with {train} and val.txt; "
            "fetch.archive or fetch.url must give the VOC 2012 trainval archive"
        )
    return min(prefixes, key=len)


def _read_list(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> list[str]:
    stream = tar.extractfile(member)
    assert stream is not None
    try:
        return parse_lines(stream.read())
    except UnicodeDecodeError:
        raise PipelineError(f"{archive}: {member.name} is no UTF-8 text; take another copy") from None
