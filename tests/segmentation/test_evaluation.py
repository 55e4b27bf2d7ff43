import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from segmentation import model as model_files
from segmentation.evaluation import evaluate
from segmentation.images import read_mask, read_photo
from segmentation.model import ModelCard, build
from segmentation.predictor import Predictor, mask_at
from segmentation.preprocess import preprocess

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2",
    trainable_blocks=1,
    decoder_channels=[16, 16, 8, 8],
    image_size=56,
    classes=["background", "cat", "dog"],
    encoder_weights="random",
    epoch=1,
)


@pytest.fixture
def evaluated(make_raw, tmp_path):
    folder = make_raw(2, 5)
    torch.manual_seed(0)
    model_files.save(build(CARD), CARD, tmp_path / "models")
    preprocess(folder.root, tmp_path / "processed", 56)
    evaluate(tmp_path / "models", folder.root, tmp_path / "processed/manifest.parquet", tmp_path / "reports", 2)
    return folder, tmp_path


@pytest.mark.parametrize(("height", "width"), [(37, 91), (56, 56), (10, 12)])
def test_a_mask_at_any_size_is_the_argmax_of_the_resized_logits(height, width):
    logits = torch.randn(5, 56, 56, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)
    assert np.array_equal(mask_at(logits, height, width), resized.argmax(1)[0].numpy())


def test_of_equal_classes_the_first_is_taken():
    assert mask_at(torch.zeros(3, 4, 4), 6, 6).max() == 0


def test_the_scores_are_torchmetrics_on_the_predicted_masks_at_the_photos_own_size(evaluated):
    folder, path = evaluated
    predictor = Predictor.load(path / "models")
    predicted, truth, confusions = [], [], []
    for name in folder.ids("val"):
        mask = torch.tensor(read_mask(folder.mask(name))).long()
        prediction = torch.from_numpy(predictor.mask(read_photo(folder.photo(name))[0])).long()
        assert (mask == 255).any()
        assert prediction.shape == mask.shape
        predicted.append(prediction.flatten())
        truth.append(mask.flatten())
        confusions.append(multiclass_confusion_matrix(prediction, mask, 3, ignore_index=255))
    reference = multiclass_jaccard_index(torch.cat(predicted), torch.cat(truth), 3, average="none", ignore_index=255)
    metrics = json.loads((path / "reports/metrics.json").read_text())
    assert metrics["miou"] == pytest.approx(reference.mean().item(), abs=1e-6)
    table = pd.read_csv(path / "reports/per_class.csv")
    assert table["class"].tolist() == CARD.classes
    assert table["iou"].tolist() == pytest.approx(reference.tolist(), abs=1e-6)
    saved = np.load(path / "reports/per_image_confusion.npz")
    assert saved["ids"].tolist() == folder.ids("val")
    assert np.array_equal(saved["confusion"], torch.stack(confusions).numpy())
    assert saved["confusion_training_size"].shape == (5, 3, 3)
    labelled = saved["confusion"].sum(axis=(1, 2))
    assert labelled.tolist() == [(read_mask(folder.mask(name)) != 255).sum() for name in folder.ids("val")]


def test_evaluating_twice_gives_the_same_bytes(evaluated):
    folder, path = evaluated
    evaluate(path / "models", folder.root, path / "processed/manifest.parquet", path / "again", 2)
    names = sorted(file.name for file in (path / "reports").iterdir())
    assert names == ["metrics.json", "panels.png", "per_class.csv", "per_image_confusion.npz"]
    for name in names:
        assert (path / "reports" / name).read_bytes() == (path / "again" / name).read_bytes()


def test_the_panels_are_a_picture_of_the_first_photos(evaluated):
    _, path = evaluated
    picture = np.asarray(Image.open(path / "reports/panels.png").convert("RGB"))
    # The palette's colour of class 1, in the truth and in the legend.
    assert (picture == (128, 0, 0)).all(axis=2).any()
