"""Class names of other tools, and masks painted in colors, as `fetch` meets them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmentation.data.fetch import fetch
from segmentation.data.images import mask_image, read_mask
from segmentation.data.palettes import find_reference
from segmentation.data.voc import CLASSES, VOID, VocFolder
from segmentation.errors import PipelineError
from segmentation.settings import FetchSettings

LABELS = np.array([[0, 1, 2, 2], [0, 1, 1, VOID]], np.uint8)
CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:51,221,255::\n"
COLORS = {0: (0, 0, 0), 1: (250, 50, 83), 2: (51, 221, 255), VOID: (224, 224, 192)}


@pytest.fixture
def own(tmp_path, monkeypatch) -> VocFolder:
    """A folder of the user's with one pair a split and no class names; the checkout is another folder."""
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    folder = VocFolder(tmp_path / "own")
    for path in (folder.photo("x"), folder.mask("x"), folder.split_file("x")):
        path.parent.mkdir(parents=True)
    for split, identifier in (("train", "a"), ("val", "b")):
        folder.split_file(split).write_text(f"{identifier}\n")
        Image.new("RGB", (4, 2)).save(folder.photo(identifier))
        mask_image(LABELS).save(folder.mask(identifier))
    return folder


def fetched(own: VocFolder) -> VocFolder:
    values = {"source": "directory", "archive": None, "url": "http://127.0.0.1:9/voc.tar", "md5": "0" * 32}
    fetch(FetchSettings.model_validate(values | {"directory": str(own.root), "limit": None}))
    return VocFolder(Path("data/raw"))


def paint(path: Path, labels: np.ndarray = LABELS, colors: dict = COLORS) -> None:
    Image.fromarray(np.array([[colors[label] for label in row] for row in labels.tolist()], np.uint8)).save(path)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"class_names.txt": "_background_\ncat\ndog"}, ["_background_", "cat", "dog"]),
        ({"labelmap.txt": CVAT}, ["background", "cat", "dog"]),
        ({"labelmap.txt": "background\ncat\n"}, ["background", "cat"]),
        ({"labelmap.txt": CVAT, "class_names.txt": "_background_\nhen\n"}, ["_background_", "hen"]),
        ({"labelmap.txt": CVAT, "class_names.txt": "x\ny\n", "classes.txt": "sky\nroad\n"}, ["sky", "road"]),
        ({"classes.txt": "Background\nhen\n"}, ["Background", "hen"]),
    ],
)
def test_names_of_other_tools_are_read_and_said(own, files, names, capsys):
    for name, text in files.items():
        (own.root / name).write_text(text)
    assert fetched(own).classes() == names
    output = capsys.readouterr().out
    assert "assumed" not in output
    if "classes.txt" not in files:
        assert f"class names from {own.root / min(files)}" in output


def test_where_vocs_names_are_assumed_it_is_said_with_what_was_not_read(own, capsys):
    (own.root / "labels.txt").write_text("__ignore__\n_background_\ncat\n")
    assert fetched(own).classes() == list(CLASSES)
    output = capsys.readouterr().out
    assert output.startswith(
        f"warning: {own.root}: no classes.txt, class_names.txt or labelmap.txt (not read: labels.txt)"
    )
    assert "VOC's 21 class names are assumed. If class 1 of your masks is not aeroplane" in output
    assert output.endswith("with VOC's class names\n")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("classes.txt", "__ignore__\n_background_\ncat\n", "__ignore__ is no class"),
        ("class_names.txt", "__ignore__\n_background_\ncat\n", "__ignore__ is no class"),
        ("classes.txt", "cat\nbackground\n", "background is class 1, and background must be class 0"),
        ("class_names.txt", "cat\ndog\n_background_\n", "_background_ is class 2"),
        ("labelmap.txt", "DNA:250,50,83::\nBackground:0,0,0::\n", "Background is class 1"),
        ("labelmap.txt", "background:0,0,0::\ncat:1,1,1::\ncat:2,2,2::\n", "named more than once: cat"),
        ("labelmap.txt", "background:0,0,0::\n:1,1,1::\n", "has no name"),
        ("labelmap.txt", "# nothing\n", "0 classes"),
        ("labelmap.txt", "background:0,0,0::\nignored:224,224,192::\ncat:250,50,83::\n", "ignored stands before cat"),
    ],
)
def test_names_that_shift_the_ids_are_refused_under_the_users_path_and_nothing_is_copied(own, file, text, words):
    (own.root / file).write_text(text)
    with pytest.raises(PipelineError) as refused:
        fetched(own)
    assert str(refused.value).startswith(f"{own.root / file}: ")
    assert words in str(refused.value)
    assert not Path("data/raw").exists()


def test_void_in_a_labelmap_is_255_and_no_class(own):
    (own.root / "labelmap.txt").write_text(CVAT + "ignored:224,224,192::\n")
    paint(own.mask("a"))
    raw = fetched(own)
    assert raw.classes() == ["background", "cat", "dog"]
    assert np.array_equal(read_mask(raw.mask("a")), LABELS)
    reference = find_reference(raw, raw.classes())
    assert reference is not None
    assert reference.colors[VOID] == (224, 224, 192)


def test_color_masks_become_class_ids_by_cvats_colors(own, capsys):
    (own.root / "labelmap.txt").write_text(CVAT)
    labels = np.where(LABELS == VOID, 0, LABELS).astype(np.uint8)
    paint(own.mask("a"), labels)
    Image.open(own.mask("a")).convert("RGBA").save(own.mask("b"))
    raw = fetched(own)
    assert np.array_equal(read_mask(raw.mask("a")), labels)
    assert np.array_equal(read_mask(raw.mask("b")), labels)
    assert Image.open(own.mask("a")).mode == "RGB"  # the user's own file is as it was
    assert "by the colors of labelmap.txt: 2" in capsys.readouterr().out


def test_color_masks_become_class_ids_by_a_palette_file_with_void(own):
    (own.root / "classes.txt").write_text("background\ncat\ndog\n")
    (own.root / "palette.txt").write_text("".join(f"{r} {g} {b}\n" for r, g, b in COLORS.values()))
    paint(own.mask("a"))
    assert np.array_equal(read_mask(fetched(own).mask("a")), LABELS)


def test_real_masks_painted_in_vocs_colors_become_their_class_ids(own, voc_subset):
    real = VocFolder(voc_subset)
    (name,) = real.ids("val")[:1]
    Image.open(real.mask(name)).convert("RGB").save(own.mask("a"))
    truth = read_mask(real.mask(name))
    assert VOID in truth
    assert np.array_equal(read_mask(fetched(own).mask("a")), truth)


def other_color(path: Path) -> None:
    paint(path, np.minimum(LABELS, 2), COLORS | {2: (1, 2, 3)})


def transparent(path: Path) -> None:
    Image.new("RGBA", (4, 2)).save(path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:45])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_color, "color 1 2 3 at (2, 0) is not in labelmap.txt; 37.50% of the pixels have such colors"),
        (transparent, "mode RGBA; a color mask has three 8-bit channels, and no transparency"),
        (truncated, "no readable PNG"),
    ],
)
def test_a_color_mask_that_cannot_be_read_is_named_and_left_for_validate(own, spoil, words, capsys):
    (own.root / "labelmap.txt").write_text(CVAT)
    labels = np.minimum(LABELS, 2)
    paint(own.mask("a"), labels)
    paint(own.mask("b"), labels)
    spoil(own.mask("b"))
    raw = fetched(own)
    assert raw.mask("b").read_bytes() == own.mask("b").read_bytes()
    assert np.array_equal(read_mask(raw.mask("a")), labels)
    assert f"warning: SegmentationClass/b.png: {words}" in capsys.readouterr().out


def test_color_masks_without_colors_by_name_stay_as_they_are(own, capsys):
    (own.root / "classes.txt").write_text("background\ncat\ndog\n")
    paint(own.mask("a"))
    assert fetched(own).mask("a").read_bytes() == own.mask("a").read_bytes()
    assert "color masks" not in capsys.readouterr().out
