import hashlib
import io
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segmentation import progress
from segmentation.data import archive as module
from segmentation.data.archive import check_md5, download, extract_voc
from segmentation.data.voc import SPLITS, VocFolder
from segmentation.errors import PipelineError

SUBSET = Path(__file__).parents[3] / "shared" / "voc2012-subset" / "VOCdevkit"
BODY = bytes(range(256)) * 4000
VOC = {
    "ImageSets/Segmentation/train.txt": b"a\nb\n",
    "ImageSets/Segmentation/val.txt": b"c\n",
    "JPEGImages/a.jpg": b"photo a",
    "JPEGImages/b.jpg": b"photo b",
    "JPEGImages/c.jpg": b"photo c",
    "JPEGImages/unlisted.jpg": b"photo",
    "SegmentationClass/a.png": b"mask a",
    "SegmentationClass/b.png": b"mask b",
    "SegmentationClass/c.png": b"mask c",
}


class Server(ThreadingHTTPServer):
    """Serves `BODY`; knows ranges or not, breaks off after so many bytes, pauses, and remembers what was asked."""

    daemon_threads = True

    def __init__(self, ranges: bool, break_after: int | None, shift: int, pause: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges, self.break_after, self.shift, self.pause = ranges, break_after, shift, pause
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/voc.tar"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        time.sleep(self.server.pause)
        if self.path != "/voc.tar":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = BODY[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + self.server.shift}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        rest = rest[: self.server.break_after]
        self.wfile.write(rest[: len(rest) // 2])
        time.sleep(self.server.pause)
        self.wfile.write(rest[len(rest) // 2 :])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(ranges: bool = True, break_after: int | None = None, shift: int = 0, pause: float = 0) -> Iterator[Server]:
    server = Server(ranges, break_after, shift, pause)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)


def write_tar(
    path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w", prefix: str = "VOCdevkit/VOC2012/"
) -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_download_leaves_the_file_and_no_part(tmp_path: Path) -> None:
    with serve() as server:
        download(server.url, tmp_path / "new" / "voc.tar")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["voc.tar"]
    assert (tmp_path / "new" / "voc.tar").read_bytes() == BODY


def test_a_part_is_continued(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(BODY[:1000])
    with serve() as server:
        download(server.url, tmp_path / "voc.tar")
    assert server.asked == ["bytes=1000-"]
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_slow_server_is_waited_for_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.1)
    (tmp_path / "voc.tar.part").write_bytes(BODY[:1000])
    with serve(pause=1.0) as server:
        download(server.url, tmp_path / "voc.tar")
    assert (tmp_path / "voc.tar").read_bytes() == BODY
    lines = capsys.readouterr().out.splitlines()
    waiting = [
        line for line in lines if re.fullmatch(rf"fetch: wait for 127.0.0.1:{server.server_port}: \d s so far", line)
    ]
    part = [line for line in lines if re.fullmatch(r"fetch: download voc.tar: [01] of 1 MB \(\d+%\), .*", line)]
    assert waiting
    assert part
    assert waiting + part == lines
    assert re.search(r"\([45]\d%\), \d\.\d MB a second, \d s left$", part[-1])  # half of it, but for a last piece


def test_a_part_is_started_again_when_the_server_ignores_ranges(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(b"something else")
    with serve(ranges=False) as server:
        download(server.url, tmp_path / "voc.tar")
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_part_is_started_again_when_the_server_sends_another_range(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(BODY[:1000])
    with serve(shift=1) as server:
        download(server.url, tmp_path / "voc.tar")
    assert server.asked == ["bytes=1000-", None]
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_complete_part_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(BODY)
    with serve() as server:
        download(server.url, tmp_path / "voc.tar")
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_part_longer_than_the_file_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").write_bytes(BODY + b"more")
    with serve() as server:
        download(server.url, tmp_path / "voc.tar")
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    with serve(break_after=150_000) as server:  # breaks more often than there are attempts, yet each brings something
        download(server.url, tmp_path / "voc.tar")
    assert len(server.asked) > module.ATTEMPTS
    assert (tmp_path / "voc.tar").read_bytes() == BODY


def test_a_connection_that_breaks_and_knows_no_ranges_is_given_up(tmp_path: Path) -> None:
    with serve(ranges=False, break_after=150_000) as server, pytest.raises(PipelineError, match=r"fetch\.url"):
        download(server.url, tmp_path / "voc.tar")
    assert not (tmp_path / "voc.tar").exists()


def test_an_unreachable_host_is_answered_with_url_and_remedies(tmp_path: Path) -> None:
    with serve() as server:
        url = server.url
    with pytest.raises(PipelineError) as error:
        download(url, tmp_path / "voc.tar")
    for word in (url, "fetch.archive", "fetch.url", "fetch.source", "`directory`"):
        assert word in str(error.value)


@pytest.mark.parametrize("url", ["not a url", "ftp://host/voc.tar", "http://"])
def test_a_malformed_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="download failed"):
        download(url, tmp_path / "voc.tar")


def test_a_refusal_of_the_server_is_not_retried(tmp_path: Path) -> None:
    with serve() as server, pytest.raises(PipelineError, match="404"):
        download(server.url + "x", tmp_path / "voc.tar")
    assert len(server.asked) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "voc.tar.part").symlink_to("/dev/full")
    with serve() as server, pytest.raises(PipelineError, match="No space left"):
        download(server.url, tmp_path / "voc.tar")


def test_a_wrong_md5_is_named_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "voc.tar"
    path.write_bytes(BODY)
    found = hashlib.md5(BODY).hexdigest()
    check_md5(path, found)
    with pytest.raises(PipelineError) as error:
        check_md5(path, "0" * 32)
    assert all(word in str(error.value) for word in (str(path), found, "0" * 32, "fetch.md5"))


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"voc\.tar: not found; set fetch\.archive"):
        check_md5(tmp_path / "voc.tar", "0" * 32)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_only_listed_files_are_unpacked(mode: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "voc.tar", VOC, mode=mode)
    extract_voc(path, tmp_path / "raw", None)
    root = tmp_path / "raw"
    found = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert found == {name: content for name, content in VOC.items() if "unlisted" not in name}


@pytest.mark.parametrize("prefix", ["", "./", "VOC2012/", "./TrainVal/VOCdevkit/VOC2012/"])
def test_the_voc_folder_is_found_at_any_depth(prefix: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "voc.tar", VOC, prefix=prefix)
    extract_voc(path, tmp_path / "raw", None)
    assert VocFolder(tmp_path / "raw").mask("c").read_bytes() == b"mask c"


def test_limit_shortens_the_lists(tmp_path: Path) -> None:
    extract_voc(write_tar(tmp_path / "voc.tar", VOC), tmp_path / "raw", 1)
    folder = VocFolder(tmp_path / "raw")
    assert [folder.ids(split) for split in SPLITS] == [["a"], ["c"]]
    assert not folder.photo("b").exists()


def test_unsafe_and_absent_ids_stay_listed_and_lead_nowhere(tmp_path: Path) -> None:
    lists = {"ImageSets/Segmentation/train.txt": b"../../escaped\nabsent\na\n", "classes.txt": b"ground\nthing\n"}
    extract_voc(write_tar(tmp_path / "voc.tar", VOC | lists), tmp_path / "raw", None)
    folder = VocFolder(tmp_path / "raw")
    assert folder.ids("train") == ["../../escaped", "absent", "a"]
    assert folder.classes() == ["ground", "thing"]
    assert {path.name for path in tmp_path.iterdir()} == {"voc.tar", "raw"}


def test_an_archive_with_unsafe_members_is_refused_whole_and_all_are_listed(tmp_path: Path) -> None:
    bad = (
        special("../outside.txt", tarfile.REGTYPE),
        special("VOCdevkit/../../up.txt", tarfile.REGTYPE),
        special("VOCdevkit/../..", tarfile.DIRTYPE),
        special("/etc/absolute", tarfile.REGTYPE),
        special("VOCdevkit/soft", tarfile.SYMTYPE, "VOC2012"),
        special("VOCdevkit/hard", tarfile.LNKTYPE, "VOCdevkit/VOC2012/JPEGImages/a.jpg"),
        special("VOCdevkit/device", tarfile.CHRTYPE),
        special("VOCdevkit/pipe", tarfile.FIFOTYPE),
    )
    with pytest.raises(PipelineError) as error:
        extract_voc(write_tar(tmp_path / "voc.tar", VOC, *bad), tmp_path / "raw", None)
    assert all(repr(member.name) in str(error.value) for member in bad)
    assert [path.name for path in tmp_path.iterdir()] == ["voc.tar"]


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="the reference came with Python 3.11.4")
@pytest.mark.parametrize(
    "name", ["a", "./a", "a/../b", "..a", "..", "a/../..", "../a", "a/../../b", "./../a", "a//b", "."]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_member_is_unsafe_where_tarfiles_own_filter_says_so(name: str, kind: bytes, tmp_path: Path) -> None:
    member = special(name, kind)
    try:
        tarfile.data_filter(member, str(tmp_path))
        safe = True
    except tarfile.FilterError:
        safe = False
    assert (module._fault(member) is None) == safe


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_truncated_archive_is_named(mode: str, tmp_path: Path) -> None:
    big = VOC | {"JPEGImages/c.jpg": hashlib.shake_256(b"noise").digest(100_000)}
    path = write_tar(tmp_path / "voc.tar", big, mode=mode)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(PipelineError, match=r"voc\.tar: no readable tar"):
        extract_voc(path, tmp_path / "raw", None)


@pytest.mark.parametrize("content", [b"", b"<html>sign in first</html>", BODY])
def test_what_is_no_tar_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "voc.tar"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"voc\.tar: no readable tar"):
        extract_voc(path, tmp_path / "raw", None)


@pytest.mark.parametrize("split", SPLITS)
def test_an_archive_without_a_list_is_named(split: str, tmp_path: Path) -> None:
    files = {name: content for name, content in VOC.items() if not name.endswith(f"{split}.txt")}
    with pytest.raises(PipelineError, match=r"voc\.tar: holds no folder with ImageSets"):
        extract_voc(write_tar(tmp_path / "voc.tar", files), tmp_path / "raw", None)


@pytest.mark.skipif(not SUBSET.exists(), reason=f"{SUBSET}: not on this machine")
def test_real_voc_pairs_come_out_as_they_went_in(tmp_path: Path) -> None:
    source = VocFolder(SUBSET / "VOC2012")

    def first(split: str) -> list[str]:
        return source.ids(split)[:3]

    keep: Callable[[tarfile.TarInfo], tarfile.TarInfo | None] = lambda member: (  # noqa: E731
        member if member.isdir() or Path(member.name).stem in {*SPLITS, *first("train"), *first("val")} else None
    )
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(SUBSET, "VOCdevkit", filter=keep)
    extract_voc(tmp_path / "voc.tar", tmp_path / "raw", 3)
    folder = VocFolder(tmp_path / "raw")
    for split in SPLITS:
        assert folder.ids(split) == first(split)
        for name in first(split):
            assert folder.photo(name).read_bytes() == source.photo(name).read_bytes()
            assert folder.mask(name).read_bytes() == source.mask(name).read_bytes()
