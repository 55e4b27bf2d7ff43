import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import unicodedata
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from segmentation.data.fetch import fetch, fingerprint
from segmentation.data.photo_ids import read_problems
from segmentation.data.voc import CLASSES, SPLITS, VocFolder
from segmentation.errors import PipelineError
from segmentation.settings import FetchSettings

NFD = unicodedata.normalize("NFD", "Ünï")
FILES = {
    "ImageSets/Segmentation/train.txt": "a\nb\n",
    "ImageSets/Segmentation/val.txt": "c\n",
    **{f"JPEGImages/{name}.jpg": f"photo {name}" for name in "abc"},
    **{f"SegmentationClass/{name}.png": f"mask {name}" for name in "abc"},
}


def settings(source: str, **changes: object) -> FetchSettings:
    values: dict[str, object] = {
        "source": source,
        "archive": None,
        "url": "http://127.0.0.1:9/voc.tar",
        "md5": "0" * 32,
        "directory": "data/own",
        "limit": None,
    }
    return FetchSettings.model_validate(values | changes)


def write_folder(root: Path, files: dict[str, str] = FILES) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def write_tar(path: Path, files: dict[str, str] = FILES) -> str:
    """Write an archive of them; returns its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"VOCdevkit/VOC2012/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return hashlib.md5(path.read_bytes()).hexdigest()


def read(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout is a temporary folder; its data/raw."""
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr("segmentation.data.archive.PAUSE", 0.0)
    return Path("data/raw")


@pytest.fixture
def served(tmp_path: Path):  # type: ignore[no-untyped-def]
    """URL of an archive of `FILES` on a local server, and its md5."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    md5 = write_tar(tmp_path / "www" / "voc.tar")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/voc.tar", md5
    server.shutdown()
    server.server_close()


def test_sample_is_drawn_and_counted(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(settings("sample", limit=2))
    assert [len(VocFolder(raw).ids(split)) for split in SPLITS] == [2, 2]
    assert "2 train, 2 val pairs of 21 classes" in capsys.readouterr().out
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


def test_a_local_archive_is_used_relative_to_the_checkout(raw: Path) -> None:
    md5 = write_tar(Path("voc.tar"))
    fetch(settings("voc2012", archive="voc.tar", md5=md5))
    assert read(raw) == FILES | {"classes.txt": "".join(f"{name}\n" for name in CLASSES)}


def test_a_local_archive_with_a_wrong_md5_is_kept(raw: Path) -> None:
    write_tar(Path("voc.tar"))
    with pytest.raises(PipelineError, match="md5"):
        fetch(settings("voc2012", archive="voc.tar"))
    assert Path("voc.tar").exists()
    assert not raw.exists()


def test_a_download_is_kept_for_the_next_run(served: tuple[str, str], raw: Path) -> None:
    url, md5 = served
    fetch(settings("voc2012", url=url, md5=md5))
    assert Path("scratch/downloads/voc.tar").exists()
    fetch(settings("voc2012", url="http://127.0.0.1:9/voc.tar", md5=md5, limit=1))
    assert VocFolder(raw).ids("train") == ["a"]


def test_a_download_that_does_not_fit_the_md5_is_kept_as_the_typo_may_be_in_the_md5(
    served: tuple[str, str], raw: Path
) -> None:
    with pytest.raises(PipelineError, match=r"(?s)scratch/downloads/voc\.tar: md5 is.*delete it first"):
        fetch(settings("voc2012", url=served[0]))
    assert not raw.exists()
    fetch(settings("voc2012", url="http://127.0.0.1:9/voc.tar", md5=served[1]))
    assert VocFolder(raw).ids("train") == ["a", "b"]


def test_a_second_download_at_the_same_time_says_so(served: tuple[str, str]) -> None:
    Path("scratch/downloads").mkdir(parents=True)
    with FileLock("scratch/downloads/voc.tar.lock"), pytest.raises(PipelineError, match="another run is downloading"):
        fetch(settings("voc2012", url=served[0], md5=served[1]))


def test_an_unreachable_host_leaves_the_data_as_they_were(raw: Path) -> None:
    fetch(settings("sample", limit=1))
    before = sorted(raw.rglob("*"))
    with pytest.raises(PipelineError, match=r"fetch\.archive"):
        fetch(settings("voc2012"))
    assert sorted(raw.rglob("*")) == before
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_a_folder_is_copied_from_where_its_layout_is_found(below: str, raw: Path) -> None:
    write_folder(Path("photos") / below, FILES | {"classes.txt": "ground\nthing\n", "JPEGImages/unlisted.jpg": "no"})
    fetch(settings("directory", directory="photos"))
    assert read(raw) == FILES | {"classes.txt": "ground\nthing\n"}


def test_limit_cuts_the_lists_of_a_folder(raw: Path) -> None:
    write_folder(Path("photos"))
    fetch(settings("directory", directory="photos", limit=1))
    assert VocFolder(raw).ids("train") == ["a"]
    assert not VocFolder(raw).photo("b").exists()


def test_linked_photos_are_copied_by_content(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = VocFolder(write_folder(Path("photos")))
    folder.photo("a").rename(tmp_path / "elsewhere.jpg")
    (tmp_path / "elsewhere.jpg").write_bytes(b"\xff\xd8\xff photo a")
    folder.photo("a").symlink_to(tmp_path / "elsewhere.jpg")
    folder.photo("b").rename(folder.root / "inside.jpg")
    folder.photo("b").symlink_to("../inside.jpg")
    fetch(settings("directory", directory="photos"))
    assert VocFolder(raw).photo("a").read_bytes() == b"\xff\xd8\xff photo a"
    assert VocFolder(raw).photo("b").read_text() == "photo b"
    assert not VocFolder(raw).photo("a").is_symlink()
    # what comes from elsewhere goes into the cache and to a remote, so it is said
    said = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert said == [
        f"fetch: note: links out of {folder.root.absolute()}, whose content is copied: "
        f"JPEGImages/a.jpg is {tmp_path}/elsewhere.jpg"
    ]


def test_photos_behind_a_linked_folder_are_copied_and_said(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(Path("photos"))
    for name in "abc":
        Path(f"photos/JPEGImages/{name}.jpg").write_bytes(b"\xff\xd8\xff" + name.encode())
    Path("photos/JPEGImages").rename(tmp_path / "elsewhere")
    Path("photos/JPEGImages").symlink_to(tmp_path / "elsewhere")
    fetch(settings("directory", directory="photos"))
    assert VocFolder(raw).photo("c").read_bytes() == b"\xff\xd8\xffc"
    assert f"JPEGImages/a.jpg is {tmp_path}/elsewhere/a.jpg, " in capsys.readouterr().out


def test_what_is_no_file_or_a_link_to_something_private_is_not_copied_and_the_reason_is_kept(
    tmp_path: Path, raw: Path
) -> None:
    folder = VocFolder(write_folder(Path("photos"), FILES | {"ImageSets/Segmentation/train.txt": "a\nb\nd\ne\nf\ng\n"}))
    (tmp_path / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    folder.photo("a").unlink()
    folder.photo("a").symlink_to(tmp_path / "id_rsa")
    folder.mask("b").unlink()
    os.mkfifo(folder.mask("b"))
    folder.photo("d").mkdir()
    folder.photo("e").symlink_to("gone.jpg")
    folder.photo("f").symlink_to("f.jpg")
    with socket.socket(socket.AF_UNIX) as server, chdir(folder.photo("g").parent):
        server.bind("g.jpg")
    folder.mask("d").symlink_to("/dev/zero")
    fetch(settings("directory", directory="photos"))
    photos, masks = read_problems(VocFolder(raw))
    assert photos == {
        "a": f"JPEGImages/a.jpg: a.jpg is a link out of the folder, to {tmp_path}/id_rsa, which is no picture",
        "d": "JPEGImages/d.jpg: d.jpg is a folder, not a file",
        "e": "JPEGImages/e.jpg: e.jpg is a link to gone.jpg, which does not exist",
        "f": "JPEGImages/f.jpg: f.jpg is a link that leads back to itself",
        "g": "JPEGImages/g.jpg: g.jpg is a socket, not a file",
    }
    assert masks["b"] == "SegmentationClass/b.png: b.png is a pipe, not a file"
    assert masks["d"] == "SegmentationClass/d.png: d.png is a device, not a file"
    assert sorted(path.name for path in raw.rglob("*.jpg")) == ["b.jpg", "c.jpg"]
    assert not any("PRIVATE" in text for text in read(raw).values())


def test_photos_and_masks_are_named_by_their_ids_whatever_list_and_files_call_them(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "ImageSets/Segmentation/train.txt": "IMG_1\nÜnï\np3.jpg\n",
        "ImageSets/Segmentation/val.txt": "c,1\n",
        "JPEGImages/img_1.JPG": "photo 1", "SegmentationClass/img_1.PNG": "mask 1",
        f"JPEGImages/{NFD}.jpeg": "photo 2", f"SegmentationClass/{NFD}.png": "mask 2",
        "JPEGImages/p3.jpg": "photo 3", "SegmentationClass/p3.png": "mask 3",
        "JPEGImages/c.jpg": "photo c", "SegmentationClass/c.png": "mask c",
    }  # fmt: skip
    write_folder(Path("photos"), files)
    fetch(settings("directory", directory="photos"))
    folder = VocFolder(raw)
    assert folder.ids("train") == ["img_1", "Ünï", "p3"]
    assert [folder.photo(name).read_text() for name in folder.ids("train")] == ["photo 1", "photo 2", "photo 3"]
    assert [folder.mask(name).read_text() for name in folder.ids("train")] == ["mask 1", "mask 2", "mask 3"]
    assert "the line seems to hold more than an id: write c alone" in read_problems(folder)[0]["c,1"]
    said = capsys.readouterr().out
    assert "'IMG_1' is img_1.JPG, " in said
    assert "'p3.jpg' is p3.jpg" in said
    assert "1 of them without photo or mask" in said


@pytest.mark.parametrize("url", ["voc.tar", "pipe"])
def test_an_archive_names_its_photos_as_a_folder_does(url: str, tmp_path: Path, raw: Path) -> None:
    if url == "pipe":
        os.mkfifo("pipe")
        with pytest.raises(PipelineError, match=r"pipe: a pipe, not a file; set fetch\.archive"):
            fetch(settings("voc2012", archive="pipe"))
        return
    md5 = write_tar(Path("voc.tar"), {name.replace("a.jpg", "A.JPEG"): text for name, text in FILES.items()})
    fetch(settings("voc2012", archive="voc.tar", md5=md5))
    assert VocFolder(raw).ids("train") == ["A", "b"]
    assert VocFolder(raw).photo("A").read_text() == "photo a"
    assert VocFolder(raw).mask("A").read_text() == "mask a"


def test_whatever_fetch_would_read_changes_the_fingerprint() -> None:
    folder = VocFolder(write_folder(Path("photos"), FILES | {"JPEGImages/unlisted.jpg": "no"}))
    own = settings("directory", directory="photos")
    found = [fingerprint(own)]
    for change in (
        lambda: folder.photo("a").write_text("another photo a"),
        lambda: os.utime(folder.mask("a"), (1, 1)),
        lambda: folder.mask("b").unlink(),
        lambda: folder.split_file("val").write_text("b\n"),
        lambda: folder.classes_file.write_text("ground\nthing\n"),
        lambda: (folder.root / "labelmap.txt").write_text("other tools have other files"),
    ):
        change()
        found.append(fingerprint(own))
        assert fingerprint(own) == found[-1]
    assert len(set(found)) == len(found)
    (folder.root / "JPEGImages/unlisted.jpg").write_text("changed")
    assert fingerprint(own) == found[-1]
    assert fingerprint(settings("sample", directory=None)) == fingerprint(settings("sample", directory="/nowhere"))


def test_a_home_folder_is_found_and_an_unknown_account_named(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(Path("home/photos"))
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    fetch(settings("directory", directory="~/photos"))
    assert VocFolder(raw).ids("train") == ["a", "b"]
    with pytest.raises(PipelineError, match=r"~nobody\.at\.all/x: no such account"):
        fetch(settings("directory", directory="~nobody.at.all/x"))
    with pytest.raises(PipelineError, match=r"a\.jpg: is a file, not a folder \(fetch\.directory\)"):
        fetch(settings("directory", directory="home/photos/JPEGImages/a.jpg"))


def test_missing_and_unsafe_pairs_stay_listed_and_are_counted(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(Path("photos"), FILES | {"ImageSets/Segmentation/train.txt": "a\nb\nabsent\n../../../secret\n"})
    (tmp_path / "secret.jpg").write_text("secret")
    VocFolder(Path("photos")).mask("b").unlink()
    os.mkfifo(VocFolder(Path("photos")).mask("absent"))  # reading it would hang
    fetch(settings("directory", directory="photos"))
    assert VocFolder(raw).ids("train") == ["a", "b", "absent", "../../../secret"]
    assert "secret" not in read(raw).values()
    assert "3 of them without photo or mask" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["JPEGImages", "SegmentationClass", "val.txt", ""])
def test_a_folder_without_the_layout_is_answered_with_it(lacking: str, raw: Path) -> None:
    if lacking:
        write_folder(Path("photos"), {name: text for name, text in FILES.items() if lacking not in name})
    with pytest.raises(PipelineError, match=r"(?s)photos.*fetch\.directory.*ImageSets/Segmentation"):
        fetch(settings("directory", directory="photos"))
    assert not raw.exists()


def test_the_stages_own_output_is_refused_as_its_source(raw: Path) -> None:
    write_folder(raw)
    with pytest.raises(PipelineError, match="own output"):
        fetch(settings("directory", directory="data/raw"))
    assert read(raw) == FILES


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_not(raw: Path) -> None:
    dead, alive = raw.with_name(".raw.999999999.tmp"), raw.with_name(f".raw.{os.getppid()}.tmp")
    for path in (dead, alive):
        path.mkdir(parents=True)
    fetch(settings("sample", limit=1))
    assert not dead.exists()
    assert alive.exists()
