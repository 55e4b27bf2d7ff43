import numpy as np
import torch
from torch.utils.data import DataLoader

from segmentation.data.images import read_mask, read_photo
from segmentation.data.pairs import EpochSampler, PairDataset, augmentation, class_pixels, split_ids
from segmentation.data.preprocess import preprocess

SIZE = 56


def pairs(tmp_path, make_raw, *changes, workers: int = 0, epoch: int = 0):
    """One epoch of augmented pairs, by id."""
    if not (tmp_path / "processed").exists():
        preprocess(make_raw(5, 2).root, tmp_path / "processed", SIZE)
    ids = split_ids(tmp_path / "processed/manifest.parquet", "train")
    dataset = PairDataset(tmp_path / "processed", ids, augmentation(SIZE, *changes))
    sampler = EpochSampler(dataset, seed=3)
    sampler.set_epoch(epoch)
    loaded = DataLoader(dataset, sampler=sampler, batch_size=2, num_workers=workers)
    return {name: (i, m) for images, masks, names in loaded for i, m, name in zip(images, masks, names, strict=True)}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def original(tmp_path, name):
    photo, _ = read_photo(tmp_path / f"processed/images/{name}.png")
    mask = read_mask(tmp_path / f"processed/masks/{name}.png")
    return torch.tensor(np.asarray(photo)).permute(2, 0, 1), torch.tensor(mask)


def test_nothing_asked_for_changes_nothing(tmp_path, make_raw):
    assert augmentation(SIZE, 0.0, None, 0.0) is None
    for name, (image, mask) in pairs(tmp_path, make_raw, 0.0, None, 0.0).items():
        assert equal({0: (image, mask)}, {0: original(tmp_path, name)})


def test_a_mirrored_photo_has_its_mask_mirrored(tmp_path, make_raw):
    for name, (image, mask) in pairs(tmp_path, make_raw, 1.0, None, 0.0).items():
        whole = original(tmp_path, name)
        assert torch.equal(image, whole[0].flip(-1))
        assert torch.equal(mask, whole[1].flip(-1))


def test_scaled_and_cropped_masks_keep_their_labels_and_padding_is_void(tmp_path, make_raw):
    small = pairs(tmp_path, make_raw, 0.0, (0.5, 0.5), 0.0)
    large = pairs(tmp_path, make_raw, 0.0, (2.0, 2.0), 0.0)
    for name, (image, mask) in small.items():
        labels = set(original(tmp_path, name)[1].unique().tolist())
        assert (image.shape, image.dtype) == ((3, SIZE, SIZE), torch.uint8)
        assert (mask.shape, mask.dtype) == ((SIZE, SIZE), torch.uint8)
        assert set(mask.unique().tolist()) <= labels | {255}
        assert (mask == 255).float().mean() >= 0.74  # three quarters are padding
        assert set(large[name][1].unique().tolist()) <= labels
        assert (image[:, mask == 255] == 0).float().mean() > 0.9


def test_an_object_and_its_mask_stay_on_each_other(tmp_path, make_raw):
    """In these photos class 1 is redder than everything else, wherever it goes."""
    for image, mask in pairs(tmp_path, make_raw, 0.5, (0.8, 1.5), 0.0).values():
        if (mask == 1).sum() > 30:
            red = image[0].float()
            assert red[mask == 1].mean() > red[mask == 0].mean() + 60


def test_colour_jitter_leaves_the_mask(tmp_path, make_raw):
    for name, (image, mask) in pairs(tmp_path, make_raw, 0.0, None, 0.4).items():
        whole = original(tmp_path, name)
        assert not torch.equal(image, whole[0])
        assert torch.equal(mask, whole[1])


def test_what_happens_depends_on_seed_and_epoch_alone(tmp_path, make_raw):
    changes = (0.5, (0.5, 2.0), 0.4)
    first = pairs(tmp_path, make_raw, *changes)
    torch.manual_seed(99)
    assert equal(first, pairs(tmp_path, make_raw, *changes, workers=2))
    assert not equal(first, pairs(tmp_path, make_raw, *changes, epoch=1))


def test_class_pixels_are_those_of_the_split(tmp_path, make_raw):
    whole = pairs(tmp_path, make_raw, 0.0, None, 0.0)
    counts = class_pixels(tmp_path / "processed/manifest.parquet", "train")
    ids = split_ids(tmp_path / "processed/manifest.parquet", "train")
    assert counts.tolist() == [[int((whole[name][1] == label).sum()) for label in range(3)] for name in ids]
