import hashlib
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from segmentation.checks.table import read_manifest
from segmentation.data import preprocess as module
from segmentation.data.images import read_mask, resize_mask, resize_photo
from segmentation.data.photo_ids import PairFinder, write_lists
from segmentation.data.preprocess import preprocess
from segmentation.data.voc import palette
from tests.conftest import png_declaring

SIZE = 56


def run(folder, tmp_path) -> pd.DataFrame:
    preprocess(folder.root, tmp_path / "processed", SIZE)
    return pd.read_parquet(tmp_path / "processed" / "manifest.parquet")


def test_every_pair_is_resized_whole_and_described(make_raw, tmp_path):
    folder = make_raw()
    table = run(folder, tmp_path).set_index("id")
    assert table["split"].tolist() == ["train"] * 4 + ["val"] * 3
    assert table[["photo_problem", "mask_problem"]].isna().all(axis=None)
    for name, row in table.iterrows():
        written = Image.open(tmp_path / "processed" / "masks" / f"{name}.png")
        mask = np.asarray(written)
        assert (written.mode, written.size) == ("P", (SIZE, SIZE))
        assert np.array_equal(mask, resize_mask(read_mask(folder.mask(name)), SIZE))
        assert row["labels"].tolist() == np.unique(mask).tolist()
        assert 255 in row["original_labels"]
        assert row["pixels"].tolist() == [(mask == label).sum() for label in range(3)]
        assert row["void_share"] == (mask == 255).mean()
        assert row["mask_sha256"] == hashlib.sha256(mask.tobytes()).hexdigest()
        image = Image.open(tmp_path / "processed" / "images" / f"{name}.png")
        assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
        assert row["image_sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
        assert (row["photo_width"], row["photo_height"]) == Image.open(folder.photo(name)).size


def test_the_manifest_tells_the_colors_of_the_masks_as_they_were_and_doubts_about_photos(make_raw, tmp_path):
    folder = make_raw()
    ids = np.asarray(Image.open(folder.mask("train0")))
    Image.fromarray(ids).save(folder.mask("train1"))
    short = Image.fromarray(np.where(ids == 255, 31, ids)).convert("P")
    short.putpalette([0, 0, 0, 255, 0, 0] + [0, 0, 9] * 15)
    short.save(folder.mask("train2"))
    dark = np.asarray(Image.open(folder.photo("val1")).convert("L")).astype(np.uint16) * 16
    Image.fromarray(dark).save(folder.photo("val1"), "PNG")
    table = run(folder, tmp_path).set_index("id")
    assert table.loc["train0", "original_colors"].tolist() == ["#000000", "#800000", "#e0e0c0"]  # VOC's 0, 1 and 255
    assert table.loc["train0", "original_palette"] == hashlib.sha256(bytes(palette())).hexdigest()
    assert table.loc["train1", ["original_colors", "original_palette"]].isna().all()
    assert table.loc["train2", "original_labels"].tolist() == [0, 1, 31]
    assert table.loc["train2", "original_colors"].tolist() == ["#000000", "#ff0000", ""]
    assert "12 of its 16 bits" in table.loc["val1", "photo_doubt"]
    assert table["photo_doubt"].notna().sum() == 1


def test_the_manifest_has_the_lists_order_with_what_they_repeat(make_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    folder = make_raw(5, 3)
    folder.split_file("val").write_text("val2\ntrain1\nval0\nval2\n")
    table = run(folder, tmp_path)
    assert table["id"].tolist() == [*(f"train{k}" for k in range(5)), "val2", "train1", "val0", "val2"]
    assert table["split"].tolist() == ["train"] * 5 + ["val"] * 4
    for identifier in ("train1", "val2"):
        first, again = (row for _, row in table[table["id"] == identifier].drop(columns="split").iterrows())
        assert first["image_sha256"] == again["image_sha256"]
        assert first["pixels"].tolist() == again["pixels"].tolist()


def test_empty_lists_give_an_empty_manifest(make_raw, tmp_path):
    folder = make_raw()
    for split in ("train", "val"):
        folder.split_file(split).write_text("")
    assert run(folder, tmp_path).empty
    assert read_manifest(tmp_path / "processed/manifest.parquet") == []


def test_the_same_input_gives_the_same_bytes(make_raw, tmp_path):
    folder = make_raw()
    for name in ("a", "b"):
        preprocess(folder.root, tmp_path / name, SIZE)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 15
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def missing_photo(folder):
    folder.photo("val1").unlink()


def truncated_photo(folder):
    folder.photo("val1").write_bytes(folder.photo("val1").read_bytes()[:700])


def bomb(folder):
    folder.photo("val1").write_bytes(png_declaring(60_000, 60_000))


def folder_for_a_photo(folder):
    folder.photo("val1").unlink()
    folder.photo("val1").mkdir()


def missing_mask(folder):
    folder.mask("val1").unlink()


def rgb_mask(folder):
    Image.new("RGB", (85, 64)).save(folder.mask("val1"))


def empty_mask(folder):
    folder.mask("val1").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "column", "words"),
    [
        (missing_photo, "photo_problem", "JPEGImages/val1.jpg is missing"),
        (truncated_photo, "photo_problem", "JPEGImages/val1.jpg: no readable JPEG or PNG"),
        (bomb, "photo_problem", "JPEGImages/val1.jpg: declares"),
        (folder_for_a_photo, "photo_problem", "JPEGImages/val1.jpg"),
        (missing_mask, "mask_problem", "SegmentationClass/val1.png is missing"),
        (rgb_mask, "mask_problem", "SegmentationClass/val1.png: mode RGB"),
        (empty_mask, "mask_problem", "SegmentationClass/val1.png: no readable"),
    ],
)
def test_a_fault_is_written_down_and_stops_nothing(make_raw, tmp_path, spoil, column, words):
    folder = make_raw()
    spoil(folder)
    table = run(folder, tmp_path).set_index("id")
    assert words in table.loc["val1", column]
    others = table.drop(index="val1")
    assert others[["photo_problem", "mask_problem"]].isna().all(axis=None)
    assert (tmp_path / "processed" / "masks" / "val2.png").exists()


def test_an_id_that_leads_out_of_the_folder_is_never_used_as_a_path(make_raw, tmp_path):
    folder = make_raw()
    folder.split_file("val").write_text("val0\n../../outside\n")
    row = run(folder, tmp_path).set_index("id").loc["../../outside"]
    assert row["photo_problem"] == "id '../../outside' holds a slash: a path, and no file name"
    assert not list(tmp_path.glob("**/outside*"))


def test_what_fetch_knew_of_a_pair_is_written_down(make_raw, tmp_path):
    folder = make_raw()
    found = PairFinder(["val0.jpg", "val1.webp"], ["val0.png"])
    write_lists(folder, {"val": [found.find(line) for line in ("val0", "val0;1", "val0.jpg val0.png a/b")]})
    table = run(folder, tmp_path).set_index("id")
    assert pd.isna(table.loc["val0", "photo_problem"])
    why = "the line seems to hold more than an id: write val0 alone"
    assert table.loc["val0;1", "photo_problem"] == f"JPEGImages/val0;1.jpg is missing; {why}"
    assert table.loc["val0;1", "mask_problem"] == "SegmentationClass/val0;1.png is missing"
    unsafe = table.loc["val0.jpg val0.png a/b"]
    assert unsafe["photo_problem"].endswith("a/b': the line seems to hold a path: write val0 alone")


def test_ids_of_all_scripts_and_with_all_signs_are_file_names(make_raw, tmp_path):
    folder = make_raw(val=4)
    ids = ["बिल्ली क्षि", "a+b, c & d @ #1 100%?", "x=y;z'q\"[*]<b>$a$|:", "ü" * 100]
    for k, identifier in enumerate(ids):
        folder.photo(f"val{k}").rename(folder.photo(identifier))
        folder.mask(f"val{k}").rename(folder.mask(identifier))
    folder.split_file("val").write_text("\n".join(ids), encoding="utf-8")
    table = run(folder, tmp_path).set_index("id").loc[ids]
    assert table[["photo_problem", "mask_problem"]].isna().all(axis=None)
    for identifier in ids:
        assert Image.open(tmp_path / f"processed/images/{identifier}.png").size == (SIZE, SIZE)
        assert Image.open(tmp_path / f"processed/masks/{identifier}.png").size == (SIZE, SIZE)


def test_a_png_named_jpg_is_accepted_and_said(make_raw, tmp_path):
    folder = make_raw()
    Image.open(folder.photo("val1")).save(folder.photo("val1"), "PNG")
    row = run(folder, tmp_path).set_index("id").loc["val1"]
    assert row["photo_format"] == "PNG"
    assert row["photo_problem"] is None or pd.isna(row["photo_problem"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_fails(make_raw, tmp_path):
    folder = make_raw()
    (tmp_path / "processed").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        run(folder, tmp_path)


def test_photo_resizing_equals_torchvision_antialiased():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (137, 211, 3), dtype=np.uint8))
    reference = tv.resize(tv.pil_to_tensor(photo), [70, 70], antialias=True)
    ours = tv.pil_to_tensor(resize_photo(photo, 70, 70))
    assert (ours.int() - reference.int()).abs().max() <= 1
