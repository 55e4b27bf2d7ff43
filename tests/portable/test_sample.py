import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmentation.data.sample import PHOTOS, SIDES, draw_sample
from segmentation.data.voc import CLASSES, SPLITS, VOID, VocFolder, palette


def hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def labels(folder: VocFolder, identifier: str) -> np.ndarray:
    return np.asarray(Image.open(folder.mask(identifier)))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> VocFolder:
    root = tmp_path_factory.mktemp("sample")
    draw_sample(root, None)
    return VocFolder(root)


def test_two_runs_draw_the_same_bytes(sample: VocFolder, tmp_path: Path) -> None:
    draw_sample(tmp_path, None)
    assert hashes(tmp_path) == hashes(sample.root)


def test_limit_gives_the_first_of_each_split_unchanged(sample: VocFolder, tmp_path: Path) -> None:
    draw_sample(tmp_path, 3)
    few = VocFolder(tmp_path)
    assert [few.ids(split) for split in SPLITS] == [sample.ids(split)[:3] for split in SPLITS]
    pictures = {name: value for name, value in hashes(tmp_path).items() if not name.endswith(".txt")}
    assert len(pictures) == 12
    assert pictures.items() <= hashes(sample.root).items()


def test_splits_share_no_photo(sample: VocFolder) -> None:
    train, val = (sample.ids(split) for split in SPLITS)
    assert (len(set(train)), len(set(val))) == (PHOTOS["train"], PHOTOS["val"])
    assert not set(train) & set(val)


def test_every_class_is_in_both_splits_and_nothing_but_classes_and_void(sample: VocFolder) -> None:
    for split in SPLITS:
        present = {int(label) for name in sample.ids(split) for label in np.unique(labels(sample, name))}
        assert present == {*range(len(CLASSES)), VOID}


def test_a_rim_of_void_parts_each_object_from_all_else(sample: VocFolder) -> None:
    for name in sample.ids("val"):
        mask = labels(sample, name)
        for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not ((one != other) & (one != VOID) & (other != VOID)).any()


def test_photos_and_masks_have_the_same_size_and_vocs_palette(sample: VocFolder) -> None:
    for name in sample.ids("val"):
        photo, mask = Image.open(sample.photo(name)), Image.open(sample.mask(name))
        assert photo.format == "JPEG"
        assert photo.size == mask.size
        assert all(SIDES[0] <= side <= SIDES[1] for side in photo.size)
        assert mask.mode == "P"
        assert mask.getpalette() == palette()


def test_names_are_vocs(sample: VocFolder) -> None:
    assert sample.classes_file.read_text().split() == list(CLASSES)
