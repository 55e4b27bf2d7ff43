import math

import numpy as np
import pytest
import torch

from segmentation.data.images import read_mask
from segmentation.data.voc import VocFolder
from segmentation.metrics.boundary import boundary_counts, boundary_iou


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """The official one (bowenc0221/boundary-iou-api) without OpenCV: 3×3 erosions, zeros around the image."""
    height, width = mask.shape
    eroded = np.pad(mask.astype(bool), 1)
    for _ in range(max(1, round(dilation_ratio * math.sqrt(height**2 + width**2)))):
        shifted = np.pad(eroded, 1)
        eroded = np.logical_and.reduce(
            [shifted[y : y + eroded.shape[0], x : x + eroded.shape[1]] for y in range(3) for x in range(3)]
        )
    return mask & ~eroded[1:-1, 1:-1]


def reference(prediction: np.ndarray, truth: np.ndarray, classes: int) -> list[list[int]]:
    """Class by class from the two binary masks, what is void in the truth taken out of both."""
    counts = []
    for label in range(classes):
        wanted = mask_to_boundary(truth == label)
        found = mask_to_boundary((prediction == label) & (truth != 255))
        counts.append([int((wanted & found).sum()), int((wanted | found).sum())])
    return np.transpose(counts).tolist()


@pytest.mark.parametrize("shape", [(50, 70), (128, 96), (3, 400), (1, 1), (7, 5)])
def test_counts_equal_the_official_boundaries_of_each_class(shape):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 4, (2, 40, 60)).astype(np.uint8)
    truth, prediction = np.kron(coarse, np.ones((1, 9, 9), np.uint8))[:, : shape[0], : shape[1]]
    truth, prediction = truth.copy(), np.where(generator.random(shape) < 0.97, truth, prediction)
    truth[generator.random(shape) < 0.01] = 255
    truth[: shape[0] // 4, : shape[1] // 3] = 255
    assert boundary_counts(prediction, truth, 5).tolist() == reference(prediction, truth, 5)


def test_counts_equal_the_official_boundaries_on_real_masks(voc_subset):
    folder = VocFolder(voc_subset)
    for name in folder.ids("val")[:8]:
        truth = read_mask(folder.mask(name))
        assert (truth == 255).any()
        # Shifted by a few pixels, and void filled with the person class: what a prediction may look like.
        prediction = np.roll(np.where(truth == 255, 15, truth).astype(np.uint8), (4, -3), (0, 1))
        ours = boundary_counts(prediction, truth, 21)
        assert ours.tolist() == reference(prediction, truth, 21)
        assert 0 < boundary_iou(ours).nanmean() < 1


def test_a_perfect_prediction_scores_1_whatever_it_says_of_void(voc_subset):
    folder = VocFolder(voc_subset)
    total = torch.zeros(2, 21)
    for name in folder.ids("val")[:8]:
        truth = read_mask(folder.mask(name))
        total += boundary_counts(np.where(truth == 255, 7, truth).astype(np.uint8), truth, 21)
    iou = boundary_iou(total)
    assert iou.nan_to_num(1.0).eq(1).all()
    assert iou.isnan().any()


def test_hand_worked():
    # 5×5, so the border is 1 pixel wide; with the last column void, that is all but the inner 3×2 of 5×4 pixels: 14.
    truth = np.zeros((5, 5), np.uint8)
    truth[:, 4] = 255
    prediction = np.zeros((5, 5), np.uint8)
    assert boundary_counts(prediction, truth, 2).tolist() == [[14, 0], [14, 0]]
    # One inner pixel of class 1 makes border of its 8 neighbours, of which 5 were inner ones.
    prediction[2, 1] = 1
    assert boundary_counts(prediction, truth, 2).tolist() == [[14, 0], [14 + 5, 1]]


def test_all_void_scores_nothing():
    counts = boundary_counts(np.zeros((6, 6), np.uint8), np.full((6, 6), 255, np.uint8), 3)
    assert counts.tolist() == [[0] * 3] * 2
    assert boundary_iou(counts).isnan().all()


def test_background_everywhere_shares_only_the_edge_of_the_image():
    truth = np.zeros((60, 60), np.uint8)  # the border is 2 wide
    truth[20:40, 20:40] = 1
    iou = boundary_iou(boundary_counts(np.zeros_like(truth), truth, 2))
    edge, around, inside = 60**2 - 56**2, 24**2 - 20**2, 20**2 - 16**2
    assert iou.tolist() == pytest.approx([edge / (edge + around), 0 / inside])
