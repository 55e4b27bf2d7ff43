import gc
import json
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from segmentation.data.images import mask_image, read_mask, read_photo, resize_mask
from segmentation.data.preprocess import preprocess
from segmentation.data.voc import VocFolder
from segmentation.errors import PipelineError
from segmentation.evaluation import evaluate as evaluation
from segmentation.evaluation.evaluate import evaluate
from segmentation.files import write_json
from segmentation.metrics.boundary import boundary_counts, boundary_iou
from segmentation.metrics.confusion import report_miou
from segmentation.metrics.intervals import iou_intervals
from segmentation.model import segmenter as model_files
from segmentation.model.segmenter import ModelCard, build
from segmentation.prediction.predictor import Augmentation, Predictor
from segmentation.settings import EvaluateSettings

SETTINGS = EvaluateSettings(panels=2, flip=False, scales=[1.0], sliding_window=False)
WRITTEN = [
    "best.png", "confusion.png", "metrics.json", "panels.png", "per_class.csv", "per_class.png", "per_image.csv",
    "per_image_confusion.npz", "reliability.csv", "reliability.png", "worst.png",
]  # fmt: skip


@dataclass
class Run:
    """A random model, photos, and where it was evaluated."""

    folder: VocFolder
    path: Path

    @property
    def classes(self) -> int:
        return len(self.folder.classes())

    def evaluate(self, reports: str = "reports", **settings) -> Path:
        values = SETTINGS.model_copy(update=settings)
        manifest = self.path / "processed/manifest.parquet"
        evaluate(self.path / "models", self.folder.root, self.path / "features", manifest, self.path / reports, values)
        return self.path / reports

    def predictor(self, *augmentation) -> Predictor:
        return Predictor.load(self.path / "models", Augmentation(*augmentation))

    def val(self):
        """Photo and truth of each val photo."""
        for name in self.folder.ids("val"):
            yield read_photo(self.folder.photo(name))[0], read_mask(self.folder.mask(name))


def prepare(folder: VocFolder, path: Path) -> Run:
    card = ModelCard(
        encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="unet", decoder_channels=[16, 16, 8, 8],
        decoder_norm="batch", skip_connections=[], image_size=56, classes=folder.classes(), encoder_weights="random",
        epoch=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model_files.save(build(card), card, path / "models")
    preprocess(folder.root, path / "processed", 56)
    write_json(path / "features/features.json", {"not_cached": "a test"})  # with kept ones: tests of features
    return Run(folder, path)


@pytest.fixture
def run(make_raw, tmp_path) -> Run:
    return prepare(make_raw(2, 5), tmp_path)


@pytest.fixture
def real(voc_subset, tmp_path) -> Run:
    """Four real val photos."""
    source, folder = VocFolder(voc_subset), VocFolder(tmp_path / "raw")
    for split, count in (("train", 1), ("val", 4)):
        ids = source.ids(split)[:count]
        for of in (VocFolder.photo, VocFolder.mask):
            of(folder, "x").parent.mkdir(parents=True, exist_ok=True)
            for name in ids:
                shutil.copy(of(source, name), of(folder, name))
        folder.split_file(split).parent.mkdir(parents=True, exist_ok=True)
        folder.split_file(split).write_text("".join(f"{name}\n" for name in ids))
    return prepare(folder, tmp_path)


@pytest.fixture(params=["run", "real"])
def either(request) -> Run:
    return request.getfixturevalue(request.param)


def test_the_scores_at_the_photos_own_size_are_torchmetrics_on_the_predicted_masks(either):
    reports, predictor, classes = either.evaluate(), either.predictor(), either.classes
    predicted, truths, confusions, borders = [], [], [], []
    for photo, truth in either.val():
        mask, prediction = torch.tensor(truth).long(), torch.from_numpy(predictor.mask(photo)).long()
        assert (mask == 255).any()
        assert prediction.shape == mask.shape
        predicted.append(prediction.flatten())
        truths.append(mask.flatten())
        confusions.append(multiclass_confusion_matrix(prediction, mask, classes, ignore_index=255))
        borders.append(boundary_counts(prediction.numpy().astype(np.uint8), truth, classes))
    confusions = torch.stack(confusions)
    everything = torch.cat(predicted), torch.cat(truths)
    iou = multiclass_jaccard_index(*everything, classes, average="none", ignore_index=255)
    total = confusions.sum(0)
    present = (total.sum(0) + total.sum(1)) > 0

    metrics = json.loads((reports / "metrics.json").read_text())
    mean, per_class = iou_intervals(confusions)
    assert metrics["miou"] == pytest.approx(iou[present].mean().item(), abs=1e-6)
    assert mean.isnan().all()  # four or five photos
    assert not {"miou_low", "miou_high"} & set(metrics)
    assert metrics["interval"] == f"{len(confusions)} photos are too few for a 95 % interval, it takes 20"
    assert metrics["pixel_accuracy"] == pytest.approx((total.diagonal().sum() / total.sum()).item())
    assert metrics["mean_class_accuracy"] == pytest.approx((total.diagonal() / total.sum(1)).nanmean().item())
    assert metrics["boundary_iou"] == pytest.approx(boundary_iou(sum(borders)).nanmean().item())
    assert metrics["photos"] == len(confusions)
    assert metrics["classes_shown"] == (total.sum(1) > 0).sum()
    everywhere = torch.zeros_like(everything[0])
    baseline = multiclass_jaccard_index(everywhere, everything[1], classes, average="none", ignore_index=255)
    shown = total.sum(1) > 0
    shown[0] = True
    assert metrics["background_everywhere"]["miou"] == pytest.approx(baseline[shown].mean().item(), abs=1e-6)
    assert metrics["background_everywhere"]["pixel_accuracy"] == pytest.approx((total[0].sum() / total.sum()).item())

    table = pd.read_csv(reports / "per_class.csv")
    assert table.columns.tolist() == [
        "id", "class", "iou", "iou_low", "iou_high", "boundary_iou", "pixels", "frequency", "photos",
    ]  # fmt: skip
    assert table["id"].tolist() == list(range(classes))
    assert table["class"].tolist() == either.folder.classes()
    assert table["iou"].isna().tolist() == (~present).tolist()
    assert table["iou"].dropna().tolist() == pytest.approx(iou[present].tolist(), abs=1e-6)
    np.testing.assert_allclose(table["iou_low"], per_class[0], atol=1e-6)
    np.testing.assert_allclose(table["iou_high"], per_class[1], atol=1e-6)
    assert table["pixels"].tolist() == [sum((mask == k).sum() for mask in truths) for k in range(classes)]
    assert table["photos"].tolist() == [sum((mask == k).any() for mask in truths) for k in range(classes)]
    np.testing.assert_allclose(table["frequency"], table["pixels"] / table["pixels"].sum(), atol=1e-6)

    photos = pd.read_csv(reports / "per_image.csv", dtype={"id": str})
    assert photos["id"].tolist() == either.folder.ids("val")
    assert list(zip(photos["width"], photos["height"], strict=True)) == [photo.size for photo, _ in either.val()]
    for k, (mean_iou, accuracy) in enumerate(zip(photos["miou"], photos["pixel_accuracy"], strict=True)):
        one = confusions[k].double()
        shown = one.sum(1) > 0
        scores = multiclass_jaccard_index(predicted[k], truths[k], classes, average="none", ignore_index=255)
        assert mean_iou == pytest.approx(scores[shown].mean().item(), abs=1e-5)
        assert accuracy == pytest.approx((one.diagonal().sum() / one.sum()).item(), abs=1e-6)

    saved = np.load(reports / "per_image_confusion.npz")
    assert saved["ids"].tolist() == either.folder.ids("val")
    assert np.array_equal(saved["confusion"], confusions.numpy())


@pytest.mark.parametrize(("source", "augmented"), [("run", True), ("real", False)])
def test_the_scores_at_training_size_are_torchmetrics_on_the_logits(request, source, augmented):
    either = request.getfixturevalue(source)
    settings = {"flip": True, "scales": [0.75, 1.0], "sliding_window": True} if augmented else {}
    reports, classes = either.evaluate(**settings), either.classes
    predictor = either.predictor(*((True, (0.75, 1.0), True) if augmented else ()))
    calibration = MulticlassCalibrationError(classes, n_bins=15, norm="l1", ignore_index=255)
    confusions, perfect = [], []
    for photo, truth in either.val():
        logits = predictor.logits(photo)[None]
        logits = torch.nn.functional.interpolate(logits, (56, 56), mode="bilinear", align_corners=False)
        mask = torch.tensor(resize_mask(truth, 56)).long()[None]
        assert (mask == 255).any()
        calibration.update(logits.softmax(1), mask)
        confusions.append(multiclass_confusion_matrix(logits.argmax(1), mask, classes, ignore_index=255))
        perfect.append(multiclass_confusion_matrix(mask.where(mask != 255, 0), mask, classes, ignore_index=255))
    confusions, perfect = torch.stack(confusions), torch.stack(perfect)
    metrics = json.loads((reports / "metrics.json").read_text())
    assert metrics["calibration_error"] == pytest.approx(calibration.compute().item(), abs=1e-5)
    small = metrics["training_size"]
    assert np.array_equal(np.load(reports / "per_image_confusion.npz")["confusion_training_size"], confusions)
    assert small["report_miou"] == report_miou(confusions)
    assert small["report_miou_ceiling"] == report_miou(perfect)
    assert small["pixel_accuracy"] == pytest.approx((confusions.sum(0).diagonal().sum() / confusions.sum()).item())
    bins = pd.read_csv(reports / "reliability.csv")
    assert len(bins) == 15
    assert bins["pixels"].sum() == confusions.sum()


@pytest.mark.slow
def test_evaluating_twice_gives_the_same_bytes(run, capsys):
    first, again = run.evaluate(), run.evaluate("again")
    assert sorted(file.name for file in first.iterdir()) == WRITTEN
    for name in WRITTEN:
        assert (first / name).read_bytes() == (again / name).read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    metrics = json.loads((first / "metrics.json").read_text())
    assert f"5 photos, mIoU {metrics['miou']:.4f} (5 photos are too few for a 95 % interval, it takes 20)" in lines[0]
    assert lines[0].endswith(" s a photo")


def test_the_pictures_are_of_the_first_the_worst_and_the_best_photos(run, monkeypatch):
    drawn = {}
    original = evaluation.draw_panels

    def draw(path, rows, classes):
        drawn[path.name] = rows
        original(path, rows, classes)

    monkeypatch.setattr(evaluation, "draw_panels", draw)
    reports = run.evaluate()
    table = pd.read_csv(reports / "per_image.csv")
    ascending = table.sort_values("pixel_accuracy", kind="stable")
    titles = {name: [row.title for row in rows] for name, rows in drawn.items()}
    assert [title.split("  ")[0] for title in titles["panels.png"]] == ["val0", "val1"]
    assert titles["worst.png"] == [f"{r.id}  {1 - r.pixel_accuracy:.1%} wrong" for r in ascending.itertuples()]
    assert [title.split("  ")[0] for title in titles["best.png"]] == ascending["id"].tolist()[:-4:-1]
    predictor = run.predictor()
    for row, (photo, truth) in zip(drawn["panels.png"], run.val(), strict=False):
        assert np.array_equal(row.truth, truth)
        assert np.array_equal(row.prediction, predictor.mask(photo))
    # The palette's colour of class 1, in the truth and in the legend.
    picture = np.asarray(Image.open(reports / "panels.png").convert("RGB"))
    assert (picture == (128, 0, 0)).all(axis=2).any()


def test_the_worst_photo_has_the_most_wrong_pixels_and_not_a_stray_class():
    """0.8 % of the first photo is a class that is not there: a third of a mean IoU over that one, too."""
    confusions = torch.zeros(4, 4, 4, dtype=torch.int64)
    confusions[0, 0, 0], confusions[0, 1, 1], confusions[0, 0, 2] = 692, 300, 8
    confusions[1, 0, 0], confusions[1, 1, 1], confusions[1, 1, 0] = 700, 250, 50
    confusions[2, 0, 0], confusions[2, 1, 1], confusions[2, 1, 0] = 700, 295, 5
    table = evaluation._per_image(confusions, ["stray", "half", "best", "void"], [(1, 1)] * 4)  # the last is all void
    assert evaluation.rank(table)["id"].tolist() == ["half", "stray", "best"]
    assert table["miou"][0] == pytest.approx((692 / 700 + 1) / 2, abs=1e-4)
    assert table.loc[3, ["miou", "pixel_accuracy"]].isna().all()


def test_enough_photos_have_an_interval_that_holds_the_score(make_raw, tmp_path, capsys):
    run = prepare(make_raw(2, 20), tmp_path)
    reports = run.evaluate()
    metrics, table = json.loads((reports / "metrics.json").read_text()), pd.read_csv(reports / "per_class.csv")
    assert metrics["miou_low"] < metrics["miou"] < metrics["miou_high"]
    words = f"95 % interval {metrics['miou_low']:.4f} to {metrics['miou_high']:.4f}"
    assert metrics["interval"] == words
    assert f"({words})" in capsys.readouterr().out
    assert (table["iou_low"] <= table["iou"]).all() and (table["iou"] <= table["iou_high"]).all()


def test_logits_that_are_not_finite_are_no_background(run):
    """The best class of NaN would be class 0."""
    model, card = model_files.load(run.path / "models")
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1e38)  # finite, and what is computed from them is not
    model_files.save(model, card, run.path / "models")
    with pytest.raises(PipelineError, match="logits of this photo are not finite"):
        run.evaluate()
    assert not (run.path / "reports").exists()


def test_a_mask_that_is_all_void_has_no_scores_and_changes_no_others(run):
    name = run.folder.ids("val")[2]
    run.folder.split_file("val").write_text("".join(f"{other}\n" for other in run.folder.ids("val") if other != name))
    preprocess(run.folder.root, run.path / "processed", 56)
    without = run.evaluate("without")
    run.folder.split_file("val").write_text("".join(f"val{k}\n" for k in range(5)))
    mask = run.folder.mask(name)
    mask_image(np.full_like(read_mask(mask), 255)).save(mask)
    preprocess(run.folder.root, run.path / "processed", 56)
    reports = run.evaluate()
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (reports, without))
    for key in ("miou", "pixel_accuracy", "mean_class_accuracy", "boundary_iou", "calibration_error"):
        assert metrics[key] == pytest.approx(expected[key])
    table = pd.read_csv(reports / "per_image.csv")
    assert table.loc[2, ["miou", "pixel_accuracy"]].isna().all()
    assert table.drop(index=2).notna().all(axis=None)


def only_background(run: Run) -> None:
    """Val masks of background and void alone, and a model that answers background."""
    for name in run.folder.ids("val"):
        mask = read_mask(run.folder.mask(name))
        mask_image(np.where(mask == 255, 255, 0).astype(np.uint8)).save(run.folder.mask(name))
    preprocess(run.folder.root, run.path / "processed", 56)
    model, card = model_files.load(run.path / "models")
    model.decoder.head.bias.data[0] = 1e6
    model_files.save(model, card, run.path / "models")


def test_a_miou_of_one_class_alone_says_so(run, capsys):
    only_background(run)
    metrics = json.loads((run.evaluate() / "metrics.json").read_text())
    assert (metrics["miou"], metrics["classes_shown"]) == (1, 1)
    assert metrics["background_everywhere"] == {"miou": 1, "pixel_accuracy": 1, "mean_class_accuracy": 1}
    assert "evaluate: This mIoU is of one class alone" in capsys.readouterr().out


def test_a_stray_class_of_the_prediction_does_not_hide_that_the_truth_has_one_alone(run, capsys):
    only_background(run)
    model, card = model_files.load(run.path / "models")
    model.decoder.head.bias.data[:] = 0
    model_files.save(model, card, run.path / "models")
    metrics = json.loads((run.evaluate() / "metrics.json").read_text())
    assert metrics["miou"] < 1
    assert metrics["classes_shown"] == 1
    assert "evaluate: This mIoU is of one class alone" in capsys.readouterr().out


def test_without_a_background_class_no_answer_is_background_everywhere(run):
    run.folder.classes_file.write_text("sky\nroad\ncar\n")
    model, card = model_files.load(run.path / "models")
    model_files.save(model, card.model_copy(update={"classes": run.folder.classes()}), run.path / "models")
    metrics = json.loads((run.evaluate() / "metrics.json").read_text())
    assert "background_everywhere" not in metrics
    assert metrics["classes_shown"] > 1


def test_nothing_to_score_is_an_error(run):
    for name in run.folder.ids("val"):
        mask_image(np.full_like(read_mask(run.folder.mask(name)), 255)).save(run.folder.mask(name))
    with pytest.raises(PipelineError, match="nothing to score"):
        run.evaluate()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_photos(run, monkeypatch):
    alive, most = [], []
    original = evaluation._score

    def score(logits, truth, side):
        alive.extend(weakref.ref(thing) for thing in (logits, truth))
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        return original(logits, truth, side)

    def logits(predictor, photo):
        result = true_logits(predictor, photo)
        held.append(weakref.ref(result))
        assert sum(reference() is not None for reference in held) <= 2
        return result

    held, true_logits = [], Predictor.logits
    monkeypatch.setattr(evaluation, "_score", score)
    monkeypatch.setattr(Predictor, "logits", logits)
    run.evaluate()
    assert len(most) == 5
    assert len(held) > 5
    assert max(most) <= 3
