import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from segmentation.batch import find_photos, predict_photos
from segmentation.errors import PipelineError
from segmentation.images import mask_image, read_mask, read_photo
from segmentation.model import ModelCard, build, save
from segmentation.predictor import Predictor
from tests.conftest import environment

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="unet", decoder_channels=[16, 16, 8, 8],
    decoder_norm="batch", skip_connections=[], image_size=28, classes=["background", "cat", "dog"],
    encoder_weights="random", epoch=1,
)  # fmt: skip


def version(number: str = "1", model: str = "m-1") -> ModelVersion:
    return ModelVersion("voc-segmentation", number, 0, model_id=model)


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
    return [photo.name for photo in find_photos(source)]


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
    assert again(version("2", "m-2")) == 0  # a moved champion
    assert not list(out.rglob("overlays/**/*.jpg"))  # those were of the other version's masks
    assert again(version("2", "m-9")) == 0  # the same number in another store
    assert set(table(out)["model_version"]) == {"2"}
    (photos / "b/x.jpg").unlink()
    assert again(version("2", "m-9")) == 3
    assert len(table(out)) == 3


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
    write(tmp_path / "others/a/x.jpg")
    with pytest.raises(PipelineError, match=r"has the mask of .*photos/a/x.jpg; choose another folder"):
        predict_photos(predictor, version(), tmp_path / "others", out)
    with FileLock(out / ".lock"), pytest.raises(PipelineError, match="another run is writing into it"):
        predict_photos(predictor, version(), photos, out)
    assert len(table(out)) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"):
        predict_photos(predictor, version(), photos, tmp_path / "file")


RUN = """
import sys, time
from pathlib import Path
from tests.segmentation.test_batch import Predictor, predict_photos, version
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
