"""The report of a run: one HTML file that needs nothing else, made from the files that the stages wrote.

The same files give the same bytes, so it holds no date, no path of the machine and no name of it.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.images import Pixels, mask_image, read_mask, read_photo, resize_mask, resize_photo
from segmentation.data.voc import VOID, VocFolder, palette
from segmentation.errors import PipelineError
from segmentation.evaluation.evaluate import WORST, rank
from segmentation.evaluation.verdict import caveat
from segmentation.files import atomic_path
from segmentation.metrics.intervals import CLASS_PHOTOS, PHOTOS
from segmentation.reporting.figures import draw_curves
from segmentation.settings import Settings

# What the published experiment printed, by epoch.
REPORT_EPOCHS = pd.DataFrame(
    {
        "epoch": range(1, 9),
        "train_loss": [0.6927, 0.5166, 0.4497, 0.3999, 0.3499, 0.3193, 0.2882, 0.2659],
        "val_accuracy": [0.7481, 0.8150, 0.8839, 0.8839, 0.9125, 0.9350, 0.9426, 0.9368],
        "val_report_miou": [0.0868, 0.1073, 0.1196, 0.1202, 0.1290, 0.1361, 0.1376, 0.1373],
    }
)
REPORT_MIOU, REPORT_CEILING = 0.1373, 0.1806  # its last epoch, and what a perfect model has on the official VOC val
CONFUSED_PAIRS = 5
SHOWN_CLASSES = 6
NBSP = "\N{NO-BREAK SPACE}"
PACKAGES = ("torch", "torchvision", "timm")


@dataclass(frozen=True)
class Picture:
    """What an `<img>` needs."""

    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Confused:
    """Pixels of one class that are predicted as another, and their share of the class."""

    truth: str
    prediction: str
    pixels: int
    share: float


def write_report(
    path: Path, training: Path, evaluation: Path, data_checks: Path, models: Path, raw: Path, settings: Settings
) -> None:
    """Write the report, and the training curves beside the other pictures of the evaluation (`curves.png`).

    Args:
        path: the HTML file.
        training: `history.csv`, and `panels/epoch_01/<number in val>.png` of the epochs that were kept.
        evaluation: what `evaluate` wrote.
        data_checks: `data_checks.json`.
        models: `segmenter.json`.
        raw: photos and masks in VOC layout; those that `training` has panels of are read.
        settings: all sections are shown.

    Raises:
        PipelineError: one of these files is missing.
    """
    metrics, card, checks = (
        json.loads(_found(file).read_text(encoding="utf-8"))
        for file in (evaluation / "metrics.json", models / "segmenter.json", data_checks)
    )
    history = pd.read_csv(_found(training / "history.csv"))
    per_class = _table(evaluation / "per_class.csv", "class")
    per_image = _table(evaluation / "per_image.csv", "id")
    reliability = pd.read_csv(_found(evaluation / "reliability.csv"))
    with np.load(_found(evaluation / "per_image_confusion.npz")) as arrays:
        confusion = arrays["confusion"].sum(0, dtype=np.int64)
    draw_curves(evaluation / "curves.png", history, REPORT_EPOCHS)
    names = ("curves", "per_class", "confusion", "reliability", "panels", "best", "worst")
    pixels = max(1, reliability["pixels"].sum())
    panels, epochs, shown = _training_panels(training / "panels", VocFolder(raw), per_image["id"])

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "setting": _setting}
    page = environment.get_template("report.html").render(
        metrics=metrics,
        caveat=caveat(metrics),
        card=card,
        checks=checks,
        epochs=_records(history.merge(REPORT_EPOCHS, "outer", "epoch", suffixes=("", "_theirs")).sort_values("epoch")),
        report_miou=REPORT_MIOU,
        report_ceiling=REPORT_CEILING,
        per_class=_records(per_class),
        confused=_most_confused(confusion, card["classes"]),
        confidence=(reliability["confidence"] * reliability["pixels"]).sum() / pixels,
        accuracy=(reliability["accuracy"] * reliability["pixels"]).sum() / pixels,
        worst=_records(rank(per_image).head(WORST)),
        pictures={name: _picture(_found(evaluation / f"{name}.png").read_bytes()) for name in names},
        panel_rows=panels,
        panel_epochs=epochs,
        panel_legend=_legend(shown, card["classes"]),
        settings=settings.model_dump(by_alias=True),
        shown_classes=SHOWN_CLASSES,
        interval_photos=PHOTOS,
        interval_class_photos=CLASS_PHOTOS,
        packages={name: version(name) for name in PACKAGES},
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _found(path: Path) -> Path:
    if not path.is_file():
        raise PipelineError(f"{path}: not found, and the report is made from it; `dvc repro` writes it")
    return path


def _table(path: Path, names: str) -> pd.DataFrame:
    """A CSV whose column `names` is the user's text: "001" is no number, and "NA" is not missing."""
    columns = pd.read_csv(_found(path), nrows=0).columns
    missing = {str(column): [""] for column in columns if column != names}
    return pd.read_csv(path, dtype={names: str}, keep_default_na=False, na_values=missing)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _most_confused(confusion: NDArray[np.int64], classes: list[str]) -> list[Confused]:
    """The pairs with the largest share of the true class, largest first; fewer where there are not as many."""
    pixels = confusion.sum(1)
    shares = confusion / np.maximum(pixels, 1)[:, None]
    np.fill_diagonal(shares, 0)
    largest = np.argsort(-shares, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = [divmod(int(index), len(classes)) for index in largest]
    return [
        Confused(
            classes[truth], classes[prediction], int(confusion[truth, prediction]), float(shares[truth, prediction])
        )
        for truth, prediction in pairs
        if shares[truth, prediction] > 0
    ]


def _training_panels(
    panels: Path, folder: VocFolder, ids: Iterable[str]
) -> tuple[list[tuple[str, Picture, Picture, list[Picture | None]]], list[int], set[int]]:
    """What was predicted after chosen epochs.

    Returns:
        Rows of id, photo, truth, and one prediction an epoch (None where there is none); the epochs; the labels that
        appear.
    """
    masks = {
        (int(path.parent.name.removeprefix("epoch_")), int(path.stem)): path for path in panels.glob("epoch_*/*.png")
    }
    epochs, drawn = sorted({epoch for epoch, _ in masks}), {number for _, number in masks}
    rows, labels = [], set[int]()
    for number, identifier in enumerate(ids, 1):
        if number not in drawn:
            continue
        predictions = [read_mask(masks[epoch, number]) if (epoch, number) in masks else None for epoch in epochs]
        size = next(len(mask) for mask in predictions if mask is not None)
        truth = resize_mask(read_mask(_found(folder.mask(identifier))), size)
        photo, encoded = resize_photo(read_photo(_found(folder.photo(identifier)))[0], size, size), io.BytesIO()
        photo.save(encoded, "JPEG", quality=85)
        for mask in (truth, *predictions):
            labels |= set() if mask is None else set(np.unique(mask).tolist())
        pictures = [None if mask is None else _mask_picture(mask) for mask in predictions]
        rows.append((identifier, _picture(encoded.getvalue(), "jpeg"), _mask_picture(truth), pictures))
    return rows, epochs, labels


def _mask_picture(mask: Pixels) -> Picture:
    encoded = io.BytesIO()
    mask_image(mask).save(encoded, "PNG", optimize=True)
    return _picture(encoded.getvalue())


def _legend(labels: set[int], classes: list[str]) -> list[tuple[str, str]]:
    """Name and CSS colour of each label."""
    colours = palette()
    return [
        ("void" if label == VOID else classes[label], "#{:02x}{:02x}{:02x}".format(*colours[3 * label : 3 * label + 3]))
        for label in sorted(labels)
    ]


def _picture(encoded: bytes, kind: str = "png") -> Picture:
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
    return Picture(f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}", width, height)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def _percent(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"< 0.1{NBSP}%" if 0 < value < 0.001 else f"{100 * value:.1f}{NBSP}%"


def _setting(value: Any) -> str:
    """As in `params.yaml`; of an absolute path only the last part, for the rest is of this machine."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return f"…/{kind(value).name}"
    return value
