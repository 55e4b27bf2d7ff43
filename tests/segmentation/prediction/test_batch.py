import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from benchmarks.serving import register_random
from segmentation.data.images import mask_image, read_mask, read_photo
from segmentation.errors import PipelineError
from segmentation.model.segmenter import ModelCard, build, save
from segmentation.prediction.batch import describe, find_photos, predict_photos
from segmentation.prediction.predictor import Predictor
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.versions import find_version, load_predictor
from tests.conftest import environment

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="unet", decoder_channels=[16, 16, 8, 8],
    decoder_norm="batch", skip_connections=[], image_size=28, classes=["background", "cat", "dog"],
    encoder_weights="random", epoch=1,
)  # fmt: skip


def version(number: str = "1") -> ModelVersion:
    return ModelVersion("voc-segmentation", number, 0)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(build(CARD).eval(), CARD, torch.device("cpu"))
    with torch.no_grad():  # random weights see one class everywhere: raise the others, so that masks differ
        predictor.model.decoder.head.bias -= predictor.logits(picture()).mean((1, 2))
    return predictor


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for seed, name in enumerate(("a/x.jpg", "b/x.jpg", "b/x.png", "B.JPEG")):
        write(folder / name, seed)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def write(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def table(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "predictions.parquet")


def names(source: Path) -> list[str]:
    return [photo.name for photo in find_photos(source).photos]


def test_a_photo_in_16_bit_grey_has_the_mask_and_the_overlay_of_its_8_bits(predictor, tmp_path):
    grey, out = picture().convert("L"), tmp_path / "out"
    (tmp_path / "photos").mkdir()
    grey.save(tmp_path / "photos/8.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "photos/16.png")
    assert predict_photos(predictor, version(), tmp_path / "photos", out, True, lambda *_: None).failed == 0
    for name in ("masks/{}.png.png", "overlays/{}.png.jpg"):
        assert (out / name.format(16)).read_bytes() == (out / name.format(8)).read_bytes()
    assert len(np.unique(read_mask(out / "masks/16.png.png"))) > 1


def test_each_photo_has_its_mask_its_overlay_and_its_row(predictor, photos, tmp_path):
    out, seen = tmp_path / "out", []
    outcome = predict_photos(predictor, version("7"), photos, out, True, lambda done, total: seen.append((done, total)))
    assert (outcome.photos, outcome.failed, outcome.done_before) == (4, 0, 0)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    rows = table(out)
    names = ["B.JPEG", "a/x.jpg", "b/x.jpg", "b/x.png"]
    assert list(rows["mask"]) == [f"masks/{name}.png" for name in names]
    for name, row in zip(names, rows.to_dict("records"), strict=True):
        photo, _ = read_photo(Path(row["path"]))
        mask = read_mask(out / row["mask"])
        assert np.array_equal(mask, predictor.mask(photo))
        assert Image.open(out / row["mask"]).mode == "P"
        assert (row["width"], row["height"]) == photo.size
        assert dict(zip(row["classes"], row["shares"], strict=True)) == {
            CARD.classes[label]: (mask == label).mean() for label in np.unique(mask)
        }
        assert list(row["shares"]) == sorted(row["shares"], reverse=True)
        assert row["model_version"] == "7"
        assert pd.isna(row["error"])
        assert 0 < row["seconds"] < 60
        overlay = np.asarray(Image.open(out / f"overlays/{name}.jpg"), int)
        colours = np.asarray(mask_image(mask).convert("RGB"), int)
        expected = np.where(mask[..., None] == 0, np.asarray(photo), (np.asarray(photo) + colours) / 2)
        assert np.abs(overlay - expected).mean() < 8  # JPEG blurs
    assert rows["classes"].map(set).map(len).max() > 1  # or the shares would say little


def test_only_what_changed_is_done_again(predictor, photos, tmp_path):
    out = tmp_path / "out"

    def again(which: ModelVersion, overlays: bool = False) -> int:
        return predict_photos(predictor, which, photos, out, overlays).done_before

    assert again(version()) == 0
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert again(version()) == 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == first
    write(photos / "a/x.jpg", 9, (50, 20))  # a changed photo
    assert again(version()) == 3
    assert read_mask(out / "masks/a/x.jpg.png").shape == (20, 50)
    (out / "masks/B.JPEG.png").unlink()  # a mask that is gone
    assert again(version()) == 3
    assert again(version(), overlays=True) == 0
    assert len(list(out.rglob("overlays/**/*.jpg"))) == 4
    assert again(version("2")) == 0  # a moved champion
    assert not list(out.rglob("overlays/**/*.jpg"))  # those were of the other version's masks
    assert set(table(out)["model_version"]) == {"2"}
    (photos / "b/x.jpg").unlink()
    assert again(version("2")) == 3
    assert len(table(out)) == 3


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Registers a model of random weights as version 1 of a new store, and returns what is loaded from there."""

    def make(name: str, seed: int) -> tuple[Predictor, ModelVersion]:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        register_random(folder / "run", CARD, seed)
        return load()

    def load() -> tuple[Predictor, ModelVersion]:
        found = find_version(connect(), "1")
        return load_predictor(found), found

    make.load = load
    return make


def test_version_1_of_another_store_or_with_other_files_is_another_model(store, photos, tmp_path):
    out = tmp_path / "out"

    def run(predictor: Predictor, found: ModelVersion) -> int:
        assert str(found.version) == "1"
        outcome = predict_photos(predictor, found, photos, out)
        for row in table(out).to_dict("records"):
            expected = predictor.mask(read_photo(Path(row["path"]))[0])
            assert np.array_equal(read_mask(out / row["mask"]), expected)
        return outcome.done_before

    assert run(*store("one", 1)) == 0
    assert run(*store.load()) == 4
    assert run(*store("two", 2)) == 0  # another store
    client = connect()
    client.delete_registered_model(MODEL_NAME)
    register_random(tmp_path / "two/again", CARD, 3)
    assert run(*store.load()) == 0  # deleted, and made anew
    stored = Path(client.get_model_version_download_uri(MODEL_NAME, "1").removeprefix("file://"), "artifacts/models")
    shutil.copytree(tmp_path / "one/run/models", stored, dirs_exist_ok=True)
    assert run(*store.load()) == 0  # overwritten


@pytest.mark.parametrize("overlays", [False, True])
def test_ended_between_a_mask_and_its_row_no_other_versions_mask_is_taken_for_done(
    predictor, photos, tmp_path, monkeypatch, overlays
):
    other, out = Predictor(build(CARD).eval(), CARD, torch.device("cpu")), tmp_path / "out"
    predict_photos(predictor, version("1"), photos, out, overlays)

    def end(mask):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("segmentation.prediction.batch.class_shares", end)  # the mask is written, its row is not
        predict_photos(other, version("2"), photos, out, overlays)
    first = photos / "B.JPEG"
    assert np.array_equal(read_mask(out / "masks/B.JPEG.png"), other.mask(read_photo(first)[0]))
    assert predict_photos(predictor, version("1"), photos, out, overlays).done_before == 3
    assert np.array_equal(read_mask(out / "masks/B.JPEG.png"), predictor.mask(read_photo(first)[0]))


def test_a_photo_that_fails_is_a_row_and_is_tried_again(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predict_photos(predictor, version(), photos, out, overlays=True)
    whole = (photos / "a/x.jpg").read_bytes()
    (photos / "a/x.jpg").write_bytes(whole[:-200])
    os.mkfifo(photos / "pipe.png")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "text.png").write_text("no picture")
    write(photos / f"{'n' * 240}.png")
    write(photos / "b/x.jpg.png/y.jpg")  # its mask's folder would be called as the mask of b/x.jpg is
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(photos / "deep.png")
    Image.new("CMYK", (40, 30), (9, 80, 90, 10)).save(photos / "print.jpg")
    write(photos / os.fsdecode(b"\xff\n.jpg"))
    outcome = predict_photos(predictor, version(), photos, out, overlays=True)
    rows = table(out).set_index("path")
    rows.index = rows.index.str.removeprefix(f"{photos}/")
    assert rows["error"].dropna().to_dict() == {
        "a/x.jpg": rows["error"]["a/x.jpg"],
        "b/x.jpg.png/y.jpg": rows["error"]["b/x.jpg.png/y.jpg"],
        "gone.jpg": f"FileNotFoundError: [Errno 2] No such file or directory: '{photos}/gone.jpg'",
        "n" * 240 + ".png": rows["error"]["n" * 240 + ".png"],
        "pipe.png": f"{photos}/pipe.png: not a file",
        "text.png": rows["error"]["text.png"],
    }
    assert outcome.failed == 6
    assert "a/x.jpg: no readable JPEG or PNG: image file is truncated" in rows["error"]["a/x.jpg"]
    assert "no readable JPEG or PNG" in rows["error"]["text.png"]
    assert "File exists" in rows["error"]["b/x.jpg.png/y.jpg"]
    assert "File name too long" in rows["error"]["n" * 240 + ".png"]
    assert pd.isna(rows["mask"]["a/x.jpg"])
    assert not (out / "masks/a/x.jpg.png").exists()
    assert not (out / "overlays/a/x.jpg.jpg").exists()
    for name in ("deep.png", "print.jpg"):
        expected = predictor.mask(read_photo(photos / name)[0])
        assert np.array_equal(read_mask(out / "masks" / f"{name}.png"), expected)
    assert rows["mask"]["\\xff\n.jpg"] == "masks/\\xff\n.jpg.png"
    assert (out / "masks" / os.fsdecode(b"\xff\n.jpg.png")).exists()
    (photos / "a/x.jpg").write_bytes(whole)
    assert predict_photos(predictor, version(), photos, out, overlays=True).failed == 5
    assert (out / "masks/a/x.jpg.png").exists()


def test_cells_of_the_table_are_no_formulas_and_one_line(predictor, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = ["=cmd/x.jpg", "@a/x.jpg", "-b/x.jpg", "c\nd/x.jpg", "\u202ee/x.jpg"]
    for name in names:
        (photos / name).parent.mkdir(parents=True)
        (photos / name).write_bytes(b"\xff\xd8\xff")
    predict_photos(predictor, version(), photos, out)
    rows = table(out).set_index("path")["error"]
    assert set(rows.index) == {str(photos / name) for name in names}  # a path is the file's, to the letter
    begins = ["'=cmd/x.jpg: ", "'@a/x.jpg: ", "'-b/x.jpg: ", "c\\nd/x.jpg: ", "\\u202ee/x.jpg: "]
    for name, begin in zip(names, begins, strict=True):
        assert rows[str(photos / name)].startswith(begin)
    assert all(error.isprintable() for error in rows)


def test_photos_of_all_suffixes_are_found_and_the_other_files_are_named(predictor, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for seed, name in enumerate(("a.jpg", "a.JPG", "a.png", "b.jpe", "c.jfif", "d.Jpeg")):
        photos.mkdir(exist_ok=True)
        picture(seed).save(photos / name, "PNG" if name.endswith("png") else "JPEG")
    for name in ("e.webp", "f.WEBP", "sub/g.webp", "sub/h.webp", "i.heic", "notes\n.txt", "IMG_1"):
        write(photos / f"{name}.png")
        (photos / f"{name}.png").rename(photos / name)
    outcome = predict_photos(predictor, version(), photos, out)
    assert (outcome.photos, outcome.failed) == (6, 0)
    assert len({path.read_bytes() for path in (out / "masks").iterdir()}) == 6  # no mask in another's place
    assert outcome.left_out == ["IMG_1", "e.webp", "f.WEBP", "i.heic", "notes\n.txt", "sub/g.webp", "sub/h.webp"]
    assert (out / "left_out.txt").read_text().splitlines() == [
        "IMG_1", "e.webp", "f.WEBP", "i.heic", "notes\\n.txt", "sub/g.webp", "sub/h.webp",
    ]  # fmt: skip
    assert describe(outcome.left_out) == (
        "7 left out, not named as JPEG or PNG: 4 .webp (e.webp, f.WEBP, sub/g.webp, …), "
        "1 without suffix (IMG_1), 1 .heic (i.heic), 1 .txt (notes\\n.txt)"
    )
    for name in outcome.left_out:
        (photos / name).unlink()
    assert predict_photos(predictor, version(), photos, out).left_out == []
    assert not (out / "left_out.txt").exists()


def test_a_folder_without_photos_says_what_is_in_it(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"RIFF")
    with pytest.raises(PipelineError, match=r"no photo in it .*; 1 left out, not named .*: 1 .webp \(a.webp\)"):
        find_photos(tmp_path)


def test_a_folder_is_searched_through_links_and_without_what_is_hidden(photos, tmp_path):
    (photos / "a/loop").symlink_to(photos)
    write(tmp_path / "elsewhere/z.jpg")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    write(photos / ".trash/x.jpg")
    write(photos / "a/._x.jpg.png")
    (photos / "notes.txt").write_text("")
    assert names(photos) == ["B.JPEG", "a/x.jpg", "b/x.jpg", "b/x.png", "linked/z.jpg"]


def test_masks_are_never_taken_for_photos(predictor, photos):
    for out in ("one", "two", "one"):
        assert predict_photos(predictor, version(), photos, photos / out, overlays=True).photos == 4
    with pytest.raises(PipelineError, match="would be mixed with its masks"):
        predict_photos(predictor, version(), photos, photos)
    with pytest.raises(PipelineError, match="would be mixed with its masks"):
        predict_photos(predictor, version(), photos / "one/masks", photos / "one")


def test_a_list_names_its_photos_each_once(predictor, photos, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbfphotos/b/x.png\r\n\n" + f"{photos}/a/../b/x.png\nphotos/gone.jpg\n".encode())
    outcome = predict_photos(predictor, version(), listed, tmp_path / "out")
    assert (outcome.photos, outcome.failed) == (2, 1)
    assert list(table(tmp_path / "out")["mask"].fillna("-")) == [f"masks{photos}/b/x.png.png", "-"]


def test_two_dots_after_a_link_lead_out_of_what_it_leads_to(photos, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/link").symlink_to(photos / "b")
    (tmp_path / "lists/list.txt").write_text("link/../a/x.jpg\n")
    (photo,) = find_photos(tmp_path / "lists/list.txt").photos
    assert photo.path == (photos / "a/x.jpg").resolve()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no folder and no list of photos: No such file"),
        (lambda path: path.mkdir(), "no photo in it"),
        (lambda path: path.write_text("\n \n"), "no photo in it"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff"), "no UTF-8 text"),
    ],
)
def test_a_source_without_photos_is_refused(make, says, predictor, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(PipelineError, match=says):
        predict_photos(predictor, version(), tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_is_of_one_source_and_one_run(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predict_photos(predictor, version(), photos, out)
    before = (out / "predictions.parquet").read_bytes()
    write(tmp_path / "others/photos/y.jpg")  # a folder of the same name, with another photo
    (tmp_path / "list.txt").write_text(f"{photos}/a/x.jpg\n")
    for other in (tmp_path / "others/photos", photos / "a", tmp_path / "list.txt"):
        with pytest.raises(
            PipelineError, match=rf"out: has the masks of {photos}; choose another .* of {other} \(--out\)"
        ):
            predict_photos(predictor, version(), other, out)
    with FileLock(out / ".lock"), pytest.raises(PipelineError, match="another run is writing into it"):
        predict_photos(predictor, version(), photos, out)
    assert (out / "predictions.parquet").read_bytes() == before
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["B.JPEG.png", "a", "b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"):
        predict_photos(predictor, version(), photos, tmp_path / "file")


def test_one_source_by_other_ways_is_the_same(predictor, photos, tmp_path, monkeypatch):
    out, listed = tmp_path / "out", tmp_path / "list.txt"
    assert predict_photos(predictor, version(), photos, out).done_before == 0
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for way in (tmp_path / "link", Path("photos"), Path("link/a/.."), photos / "a/.."):
        assert predict_photos(predictor, version(), way, out).done_before == 4
    assert list(table(out)["path"]) == [str(photos / name) for name in ("B.JPEG", "a/x.jpg", "b/x.jpg", "b/x.png")]
    listed.write_text("photos/a/x.jpg\nphotos/B.JPEG\n")
    assert predict_photos(predictor, version(), listed, tmp_path / "of list").done_before == 0
    listed.write_text("photos/b/x.jpg\nphotos/B.JPEG\n")  # an edited list is the same list
    (tmp_path / "home").symlink_to(tmp_path)
    assert predict_photos(predictor, version(), tmp_path / "home/list.txt", tmp_path / "of list").done_before == 1
    assert len(table(tmp_path / "of list")) == 2


def test_a_folder_with_files_of_its_own_is_no_output_folder(predictor, photos, tmp_path):
    own = tmp_path / "own"
    write(own / "masks/B.JPEG.png")
    before = (own / "masks/B.JPEG.png").read_bytes()
    with pytest.raises(
        PipelineError, match="own: has masks already, of no run that could go on; choose another folder"
    ):
        predict_photos(predictor, version(), photos, own)
    assert (own / "masks/B.JPEG.png").read_bytes() == before
    with pytest.raises(PipelineError, match=r"photos/a: .*photos/a/x.jpg lies in it, and would be mixed with masks"):
        predict_photos(predictor, version(), photos, photos / "a")
    assert names(photos) == ["B.JPEG", "a/x.jpg", "b/x.jpg", "b/x.png"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.notes.tmp.txt").write_text("mine")
    predict_photos(predictor, version(), photos, tmp_path / "out")
    assert (tmp_path / "out/.notes.tmp.txt").read_text() == "mine"


def test_a_record_without_its_source_is_refused(predictor, photos, tmp_path):
    predict_photos(predictor, version(), photos, tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "out/predictions.sqlite")) as record:
        record.execute("DROP TABLE source")  # as it was before sources were noted
    with pytest.raises(PipelineError, match="written before sources were noted there; delete it, or choose another"):
        predict_photos(predictor, version(), photos, tmp_path / "out")


def test_masks_that_a_file_system_would_hold_in_one_file_are_refused(predictor, photos, tmp_path):
    write(photos / "b/X.JPG", 7)
    out = tmp_path / "out"
    assert predict_photos(predictor, version(), photos, out).photos == 5
    (out / ".LOCK").symlink_to(".lock")  # as where case does not matter: one file under both names
    with pytest.raises(PipelineError, match=r"out: its file system keeps one mask of .*b/X.JPG and .*b/x.jpg; choose"):
        predict_photos(predictor, version(), photos, out)


RUN = """
import sys, time
from pathlib import Path
from tests.segmentation.prediction.test_batch import Predictor, predict_photos, version
def progress(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[4]))
model, photos, out = (Path(argument) for argument in sys.argv[1:4])
predict_photos(Predictor.load(model), version(), photos, out, True, progress)
"""


@pytest.fixture
def command(predictor, tmp_path, root):
    """Starts a run in a process of its own."""
    save(predictor.model, CARD, tmp_path / "model")

    def start(photos: Path, out: Path, pause: float = 0.0, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(photos), str(out), str(pause)]
        env = environment() | {"PYTHONPATH": str(root)}
        return subprocess.Popen(
            [*before, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.slow
def test_killed_the_next_run_does_only_the_rest(predictor, command, tmp_path):
    photos, out = tmp_path / "many", tmp_path / "out"
    for seed in range(12):
        write(photos / f"{seed:02}.jpg", seed, (300, 200))
    process = command(photos, out, pause=0.5)
    for line in process.stdout:
        if line == "5\n":
            break
    with pytest.raises(PipelineError, match="another run is writing into it"):
        predict_photos(predictor, version(), photos, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "predictions.parquet").exists()
    for path in [*out.glob("masks/*.png"), *out.glob("overlays/*.jpg")]:
        Image.open(path).load()
    predictor = Predictor.load(tmp_path / "model")  # the same one
    half = out / "masks/.11.jpg.1.tmp.png"
    half.write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("masks/*.png") if path != half}
    outcome = predict_photos(predictor, version(), photos, out, overlays=True)
    assert 5 <= outcome.done_before <= len(kept) < 12
    unchanged = [path for path, when in kept.items() if path.stat().st_mtime_ns == when]
    assert len(unchanged) == outcome.done_before
    assert not half.exists()
    assert len(table(out)) == len(list(out.glob("masks/*"))) == 12


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(command, predictor, tmp_path):
    photos, out = tmp_path / "noise", tmp_path / "out"
    for seed in range(8):
        write(photos / f"{seed}.jpg", seed, (600, 400))
    out.mkdir()
    keep = tmp_path / "kept"
    # in a mount namespace of its own: what is mounted there is gone with the process
    script = 'mount -t tmpfs -o size=120k tmpfs "$1" && shift 2 && "$@"; code=$?; cp -r "$OUT" "$KEEP"; exit $code'
    probe = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", str(out)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be made here: unshare --mount --map-root-user is not allowed")
    before = ("unshare", "--mount", "--map-root-user", "env", f"OUT={out}", f"KEEP={keep}", "sh", "-c", script, "sh")
    process = command(photos, out, before=(*before, str(out), "--"))
    assert process.wait(60) == 1
    error = process.stderr.read()
    assert "cannot be written" in error
    assert "No space left" in error or "disk is full" in error
    written = list(keep.glob("masks/*"))
    assert 0 < len(written) < 8
    for path in written:
        assert np.array_equal(read_mask(path), predictor.mask(read_photo(photos / path.stem)[0]))
    assert not list(keep.rglob("*.tmp.*"))
    assert not (keep / "predictions.parquet").exists()
