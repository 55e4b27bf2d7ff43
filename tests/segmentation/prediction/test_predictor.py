import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from segmentation.data.images import read_mask, read_photo, resize_photo
from segmentation.data.voc import VocFolder
from segmentation.model.segmenter import ModelCard, build
from segmentation.prediction.predictor import Augmentation, Predictor, mask_at, window_starts

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="unet", decoder_channels=[16, 16, 8, 8],
    decoder_norm="batch", skip_connections=[], image_size=56, classes=["background", "cat", "dog"],
    encoder_weights="random", epoch=1,
)  # fmt: skip
EVERY = [
    Augmentation(flip, scales, window)
    for flip, scales, window in itertools.product([False, True], [(1.0,), (0.75, 1.0, 1.25), (0.5,)], [False, True])
]


@pytest.fixture(scope="module")
def plain() -> Predictor:
    torch.manual_seed(0)
    return Predictor(build(CARD).eval(), CARD, torch.device("cpu"))


class Pointwise(torch.nn.Module):
    """Logits that are R, G and B: any view of a photo has the same ones. Notes the shapes that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.patch = 14
        self.seen: list[torch.Size] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.shape)
        return images.float()


@pytest.fixture
def pointwise() -> Predictor:
    return Predictor(Pointwise(), CARD, torch.device("cpu"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(37, 91), (56, 56), (10, 12), (56, 84)])
@pytest.mark.parametrize("shape", [(5, 56, 56), (5, 56, 84), (5, 70, 56)])
def test_a_mask_at_any_size_is_the_argmax_of_the_resized_logits(shape, height, width):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)
    assert np.array_equal(mask_at(logits, height, width), resized.argmax(1)[0].numpy())


def test_of_equal_classes_the_first_is_taken():
    assert mask_at(torch.zeros(3, 4, 4), 6, 6).max() == 0


def test_without_augmentation_the_logits_are_the_models_of_the_squeezed_photo_bit_for_bit(plain):
    photo = picture(91, 64)
    pixels = torch.from_numpy(np.array(resize_photo(photo, 56, 56))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        assert torch.equal(plain.logits(photo), plain.model(pixels)[0].float())


@pytest.mark.parametrize("augmentation", EVERY, ids=str)
def test_every_combination_gives_a_mask_of_the_photos_own_size(pointwise, augmentation):
    photo = picture(91, 64)
    predictor = replace(pointwise, augmentation=augmentation)
    logits, mask = predictor.logits(photo), predictor.mask(photo)
    assert logits.shape == ((3, 56, 80) if augmentation.sliding_window else (3, 56, 56))
    assert (mask.shape, mask.dtype) == ((64, 91), np.uint8)
    assert np.array_equal(mask, mask_at(logits, 64, 91))


@pytest.mark.parametrize("augmentation", EVERY, ids=str)
@pytest.mark.parametrize("size", [(91, 64), (64, 91), (56, 56), (30, 200)])
def test_one_colour_has_the_same_logits_in_every_view(pointwise, augmentation, size):
    photo = Image.new("RGB", size, (10, 200, 30))
    logits = replace(pointwise, augmentation=augmentation).logits(photo)
    assert torch.allclose(logits, torch.tensor([10.0, 200.0, 30.0]).view(3, 1, 1).expand_as(logits))


@pytest.mark.parametrize("augmentation", EVERY, ids=str)
def test_views_are_put_back_where_they_belong(pointwise, augmentation):
    # Smooth, so that resizing changes little; neither symmetric nor alike in its two directions.
    y, x = np.mgrid[0:120, 0:170]
    photo = Image.fromarray(np.stack([x, 2 * y, 250 - x], 2).astype(np.uint8))
    logits = replace(pointwise, augmentation=augmentation).logits(photo)
    height, width = logits.shape[1:]
    expected = torch.tensor(np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (logits - expected).abs().max() < 5
    assert (logits - expected).abs().mean() < 1


def test_flip_is_the_mean_with_the_mirrored_photos_logits_mirrored_back(plain):
    photo = picture(56, 56)
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = (plain.logits(photo) + plain.logits(mirrored).flip(-1)) / 2
    flipped = replace(plain, augmentation=Augmentation(flip=True))
    torch.testing.assert_close(flipped.logits(photo), expected)
    assert not torch.allclose(flipped.logits(photo), plain.logits(photo))


@pytest.mark.parametrize("window", [False, True])
def test_flip_of_a_symmetric_photo_is_symmetric(plain, window):
    half = np.asarray(picture(45, 64))
    photo = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    predictor = replace(plain, augmentation=Augmentation(flip=True, sliding_window=window))
    logits = predictor.logits(photo)
    torch.testing.assert_close(logits, logits.flip(-1))
    # … which it is not by itself
    assert not torch.allclose(plain.logits(photo), plain.logits(photo).flip(-1), atol=1e-4)


def test_scales_are_the_mean_of_the_sizes_in_whole_patches(plain):
    photo, sizes = picture(91, 64), (42, 56, 70)
    parts = []
    with torch.inference_mode():
        for side in sizes:
            pixels = torch.from_numpy(np.array(resize_photo(photo, side, side))).permute(2, 0, 1)[None]
            parts.append(F.interpolate(plain.model(pixels), (56, 56), mode="bilinear", align_corners=False)[0])
    scaled = replace(plain, augmentation=Augmentation(scales=(0.7, 1.0, 1.3)))  # 39 and 73 pixels are no whole patches
    torch.testing.assert_close(scaled.logits(photo), torch.stack(parts).mean(0))


@pytest.mark.parametrize("scale", [0.001, 0.12])
def test_a_scale_is_one_patch_at_least(pointwise, scale):
    replace(pointwise, augmentation=Augmentation(scales=(scale,))).logits(picture(91, 64))
    assert pointwise.model.seen == [(1, 3, 14, 14)]


def test_the_window_on_a_square_photo_is_the_plain_path(plain):
    photo = picture(80, 80)
    windowed = replace(plain, augmentation=Augmentation(sliding_window=True))
    assert torch.equal(windowed.logits(photo), plain.logits(photo))


def test_windows_are_averaged_where_they_overlap(plain):
    photo = picture(84, 56)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        left, right = (plain.model(pixels[..., start : start + 56])[0] for start in (0, 28))
    logits = replace(plain, augmentation=Augmentation(sliding_window=True)).logits(photo)
    torch.testing.assert_close(logits[..., :28], left[..., :28])
    torch.testing.assert_close(logits[..., 28:56], (left[..., 28:] + right[..., :28]) / 2)
    torch.testing.assert_close(logits[..., 56:], right[..., 28:])


@pytest.mark.parametrize("window", [2, 3, 14, 56, 518])
def test_windows_cover_every_pixel_and_overlap_by_a_third(window):
    for length in range(window, 6 * window, max(1, window // 25)):
        starts = window_starts(length, window)
        assert (starts[0], starts[-1]) == (0, length - window)
        overlaps = [first + window - second for first, second in itertools.pairwise(starts)]
        assert all(window > overlap >= window / 3 for overlap in overlaps)
        assert len(starts) == 1 + np.ceil((length - window) / (window * 2 // 3))


def test_what_the_model_sees_is_never_more_than_one_window(pointwise):
    replace(pointwise, augmentation=Augmentation(True, (0.5, 1.0, 1.5), True)).logits(picture(200, 50))
    assert set(pointwise.model.seen) == {(1, 3, 28, 28), (1, 3, 56, 56)}


def test_all_of_it_on_a_real_photo_gives_class_ids_and_never_void(plain, voc_subset):
    folder = VocFolder(voc_subset)
    name = folder.ids("val")[0]
    truth = read_mask(folder.mask(name))
    assert (truth == 255).any()
    predictor = replace(plain, augmentation=Augmentation(flip=True, scales=(0.75, 1.0), sliding_window=True))
    mask = predictor.mask(read_photo(folder.photo(name))[0])
    assert mask.shape == truth.shape
    assert mask.max() < 3
