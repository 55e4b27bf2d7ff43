import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from segmentation.reporting.figures import (
    EMPTY,
    RIGHT,
    WRONG,
    Drawn,
    _errors,
    draw_confusion,
    draw_curves,
    draw_panels,
    draw_per_class,
    draw_reliability,
)

# A $ must not become a formula, nor a leading underscore hide a name.
CLASSES = ["background", "_$cat$_$", "a name that is much longer than a legend has room for"]


def drawn(height=40, width=60):
    generator = np.random.default_rng(0)
    truth = np.zeros((height, width), np.uint8)
    truth[5:20, 5:30], truth[:3] = 1, 255
    prediction = truth.copy()
    prediction[prediction == 255] = 0
    prediction[10:30, 20:40] = 2
    photo = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Drawn("x" * 200 + "  mIoU 0.50", photo, truth, prediction)


def per_class():
    return pd.DataFrame(
        {
            "id": range(3),
            "class": CLASSES,
            "iou": [0.9, np.nan, 0.4],
            "iou_low": [0.8, np.nan, 0.1],
            "iou_high": [0.95, np.nan, 0.7],
            "boundary_iou": [0.6, np.nan, 0.2],
            "pixels": [1000, 0, 1],
            "frequency": [0.9995, 0, 0.0005],
            "photos": [3, 0, 1],
        }
    )


def reliability():
    return pd.DataFrame(
        {
            "low": [0, 0.5],
            "high": [0.5, 1],
            "pixels": [0, 7],
            "confidence": [np.nan, 0.9],
            "accuracy": [np.nan, 0.8],
        }
    )


def history(epochs, **more):
    rising = np.linspace(0.1, 0.9, epochs)
    columns = {"train_loss": 1 - rising, "val_accuracy": rising, "val_report_miou": rising / 5, "val_miou": rising}
    return pd.DataFrame({"epoch": range(1, epochs + 1), **columns, **more})


PICTURES = {
    "panels": lambda path: draw_panels(path, [drawn(), drawn(90, 30)], CLASSES),
    "confusion": lambda path: draw_confusion(path, np.array([[90, 0, 10], [0, 0, 0], [3, 0, 3]]), CLASSES),
    "confusion of 60": lambda path: draw_confusion(path, np.eye(60, dtype=np.int64), [f"class {k}" for k in range(60)]),
    "per class": lambda path: draw_per_class(path, per_class()),
    "per class, none scored": lambda path: draw_per_class(path, per_class()[1:2]),
    "reliability": lambda path: draw_reliability(path, reliability(), 0.1),
    "curves": lambda path: draw_curves(path, history(3, lr=1e-4), history(8).drop(columns="val_miou")),
    "curves of one epoch": lambda path: draw_curves(path, history(1), None),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_the_same_bytes_each_time_and_no_warning(tmp_path, name):
    PICTURES[name](tmp_path / "one.png")
    PICTURES[name](tmp_path / "two.png")
    written = (tmp_path / "one.png").read_bytes()
    assert written == (tmp_path / "two.png").read_bytes()
    assert not re.search(rb"Software|tIME|Creation", written)
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}


def test_a_users_own_matplotlib_style_changes_nothing(tmp_path):
    import matplotlib

    draw_per_class(tmp_path / "one.png", per_class())
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20}):
        draw_per_class(tmp_path / "two.png", per_class())
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_errors_are_right_wrong_or_striped_where_void():
    row = drawn()
    picture = _errors(row)
    scored = row.truth != 255
    wrong = scored & (row.truth != row.prediction)
    assert (picture[wrong] == WRONG).all()
    assert (picture[scored & ~wrong] == RIGHT).all()
    assert {tuple(colour) for colour in picture[~scored].tolist()} == {EMPTY, RIGHT}


def test_panels_show_the_classes_own_colours(tmp_path):
    draw_panels(tmp_path / "panels.png", [drawn()], CLASSES)
    picture = np.asarray(Image.open(tmp_path / "panels.png").convert("RGB"))
    for colour in ((128, 0, 0), (0, 128, 0), (224, 224, 192), WRONG):
        assert (picture == colour).all(axis=2).any()


def test_ten_rows_of_the_noisiest_photos_stay_small(tmp_path):
    draw_panels(tmp_path / "panels.png", [drawn(375, 500)] * 10, CLASSES)
    assert (tmp_path / "panels.png").stat().st_size < 2_000_000


def test_a_class_without_truth_is_an_empty_row_of_the_confusion_matrix(tmp_path):
    draw_confusion(tmp_path / "some.png", np.array([[5, 5], [0, 0]]), ["a", "b"])
    draw_confusion(tmp_path / "all.png", np.array([[5, 5], [5, 5]]), ["a", "b"])
    blue = [
        int((np.ptp(np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int), axis=2) > 40).sum())
        for name in ("some.png", "all.png")
    ]
    assert blue[0] < blue[1] * 0.7
