import math

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from segmentation.data.images import read_mask, resize_mask
from segmentation.data.voc import VocFolder
from segmentation.metrics.calibration import BINS, calibration_error, reliability_counts, reliability_table


def photos(count: int = 3, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(count):
        logits = 2 * torch.randn(classes, 30, 40, generator=generator)
        mask = logits.argmax(0).to(torch.uint8)
        mask = torch.where(torch.rand(mask.shape, generator=generator) < 0.5, mask, mask.flip(0))
        mask[torch.rand(mask.shape, generator=generator) < 0.1] = 255
        pairs.append((logits, mask))
    return pairs


def torchmetrics_error(pairs: list[tuple[torch.Tensor, torch.Tensor]], classes: int) -> float:
    metric = MulticlassCalibrationError(classes, n_bins=BINS, norm="l1", ignore_index=255)
    for logits, mask in pairs:
        metric.update(logits[None].softmax(1), mask[None].long())
    return metric.compute().item()


def test_the_error_of_counts_summed_photo_by_photo_equals_torchmetrics():
    pairs = photos()
    counts = sum(reliability_counts(*pair) for pair in pairs)
    assert calibration_error(counts) == pytest.approx(torchmetrics_error(pairs, 4), abs=1e-6)
    assert calibration_error(counts) > 0.05


def test_it_equals_torchmetrics_on_real_masks(voc_subset):
    folder, generator, pairs = VocFolder(voc_subset), torch.Generator().manual_seed(0), []
    for name in folder.ids("val")[:5]:
        mask = torch.tensor(resize_mask(read_mask(folder.mask(name)), 112))
        assert (mask == 255).any()
        likely = torch.nn.functional.one_hot(torch.where(mask == 255, 0, mask).long(), 21).permute(2, 0, 1)
        pairs.append((4 * likely + torch.randn(likely.shape, generator=generator), mask))
    counts = sum(reliability_counts(*pair) for pair in pairs)
    assert calibration_error(counts) == pytest.approx(torchmetrics_error(pairs, 21), abs=1e-6)


def test_hand_worked():
    # Best probabilities 0.8, 0.8, 0.6 and, void, 0.9; the second is wrong.
    probabilities = torch.tensor([[0.8, 0.8, 0.4, 0.9], [0.2, 0.2, 0.6, 0.1]])[:, None]
    counts = reliability_counts(probabilities.log(), torch.tensor([[0, 1, 1, 255]]))
    assert counts.shape == (3, 15)
    assert counts[0].nonzero().flatten().tolist() == [9, 12]  # 0.6 and 0.8 lie in [9/15, 10/15) and [12/15, 13/15)
    assert counts[:, 12].tolist() == pytest.approx([2, 1.6, 1])
    assert calibration_error(counts) == pytest.approx(2 / 3 * abs(0.5 - 0.8) + 1 / 3 * abs(1 - 0.6))


def test_certainty_lies_in_the_last_bin():
    counts = reliability_counts(torch.tensor([1000.0, 0.0]).view(2, 1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    assert counts[:, 14].tolist() == [1, 1, 1]
    assert calibration_error(counts) == 0


def test_all_void_counts_nothing():
    counts = reliability_counts(torch.randn(3, 4, 4), torch.full((4, 4), 255))
    assert counts.sum() == 0
    assert math.isnan(calibration_error(counts))


def test_the_table_has_a_row_a_bin():
    counts = sum(reliability_counts(*pair) for pair in photos())
    table = reliability_table(counts)
    assert table.columns.tolist() == ["low", "high", "pixels", "confidence", "accuracy"]
    assert len(table) == 15
    assert table["low"].iloc[0] == 0
    assert table["high"].iloc[-1] == 1
    assert table["pixels"].sum() == sum(int((mask != 255).sum()) for _, mask in photos())
    filled = table[table["pixels"] > 0]
    assert (filled["confidence"] >= filled["low"] - 1e-6).all()
    assert (filled["confidence"] <= filled["high"] + 1e-6).all()
    assert table.loc[table["pixels"] == 0, ["confidence", "accuracy"]].isna().all(axis=None)
    weights = table["pixels"] / table["pixels"].sum()
    assert (weights * (table["accuracy"] - table["confidence"]).abs()).sum() == pytest.approx(calibration_error(counts))
