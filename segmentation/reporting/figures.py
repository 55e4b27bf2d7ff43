"""Pictures of predictions and scores. The same numbers give the same bytes, for DVC hashes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.images import Pixels
from segmentation.data.voc import VOID, palette
from segmentation.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
# Okabe and Ito's colours, told apart by the colour-blind; right and wrong differ in lightness as well.
BLUE, SKY, ORANGE, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#8a8a8a"
RIGHT, WRONG, EMPTY = (222, 222, 222), (200, 16, 32), (255, 255, 255)
MOST_WRITTEN_CLASSES = 40  # a larger confusion matrix has no room for numbers


@dataclass(frozen=True)
class Drawn:
    """One row of `draw_panels`: a photo, and truth and prediction `[H, W]` uint8 of its size."""

    title: str
    photo: Image.Image
    truth: Pixels
    prediction: Pixels


def draw_panels(path: Path, drawn: list[Drawn], classes: list[str]) -> None:
    """Draw rows of photo, truth, prediction and errors, with a legend of the classes that appear.

    Args:
        path: a PNG.
        drawn: at least one row.
        classes: class names by id.
    """
    from matplotlib.patches import Patch

    colours = np.array(palette(), np.uint8).reshape(-1, 3)
    labels = np.unique(np.concatenate([np.unique(mask) for row in drawn for mask in (row.truth, row.prediction)]))
    names = [(label, "void" if label == VOID else _shorten(classes[label], 24)) for label in labels.tolist()]
    handles = [Patch(facecolor=tuple(colours[label] / 255), edgecolor=GREY, label=name) for label, name in names]
    handles += [
        Patch(facecolor=tuple(np.divide(colour, 255)), edgecolor=GREY, label=name)
        for colour, name in ((RIGHT, "right"), (WRONG, "wrong"))
    ]
    if VOID in labels:
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", label="not scored"))
    columns = max(1, int(11 / (0.09 * max(len(name) for _, name in names) + 0.7)))
    # A portrait is drawn smaller rather than its row taller.
    ratios = [min(0.8, max(0.25, len(row.truth) / row.truth.shape[1])) for row in drawn]
    legend = 0.25 * -(-len(handles) // columns) + 0.2
    with _figure(path, 11, sum(2.7 * ratio + 0.3 for ratio in ratios) + legend) as figure:
        grid = figure.subplots(len(drawn), 4, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axes, row in zip(grid, drawn, strict=True):
            pictures = (np.asarray(row.photo), colours[row.truth], colours[row.prediction], _errors(row))
            titles = (_shorten(row.title, 36), "truth", "prediction", "errors")
            for axis, picture, title in zip(axes, pictures, titles, strict=True):
                axis.imshow(picture, interpolation="antialiased" if picture is pictures[0] else "nearest")
                axis.set_title(title, loc="left", fontsize=9)
                axis.axis("off")
                axis.set_anchor("W")
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_confusion(path: Path, confusion: NDArray[np.integer[Any]], classes: list[str]) -> None:
    """Draw a confusion matrix as a heat map: each row adds up to 100 %, that of a class absent from the truth is empty.

    Args:
        path: a PNG.
        confusion: `[C, C]` pixel counts, rows are the truth.
        classes: C names.
    """
    pixels = confusion.sum(1)
    shares = np.full(confusion.shape, np.nan)
    np.divide(confusion, pixels[:, None], out=shares, where=pixels[:, None] > 0)
    count = len(classes)
    side = min(20.0, 0.38 * count)
    size = min(9.0, 72 * side / count * 0.45)  # points, so that neighbouring names keep apart
    names = [_shorten(name, 20) for name in classes]
    with _figure(path, max(5.0, side + 3.2), max(3.2, side + 1.4)) as figure:
        axis = figure.subplots()
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(count), names, rotation=90, fontsize=size)
        axis.set_yticks(
            range(count),
            [name if pixel else f"{name} (absent)" for name, pixel in zip(names, pixels, strict=True)],
            fontsize=size,
        )
        axis.set_xticks(np.arange(count - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(count - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="#e6e6e6", linewidth=0.5)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        if count <= MOST_WRITTEN_CLASSES:
            for row, column in np.argwhere(shares >= 0.005):
                share = shares[row, column]
                colour = "white" if share > 0.5 else "black"
                axis.text(column, row, f"{share:.0%}"[:-1], ha="center", va="center", color=colour, fontsize=size * 0.9)
        figure.colorbar(
            image, shrink=0.6, aspect=30, format=lambda share, _: f"{share:.0%}", label="share of the true class"
        )


def draw_per_class(path: Path, table: pd.DataFrame) -> None:
    """Draw each class's IoU as a bar with its interval, the best on top; a class that is NaN has none.

    Args:
        path: a PNG.
        table: `class`, `iou`, `iou_low`, `iou_high`, `boundary_iou` and `frequency` (share of labelled pixels).
    """
    table = table.sort_values("iou", ascending=True, na_position="first", kind="stable")
    at = np.arange(len(table))
    names = [
        f"{_shorten(name, 24)}  {'< 0.1%' if 0 < frequency < 0.001 else format(frequency, '.1%')}"
        for name, frequency in zip(table["class"], table["frequency"], strict=True)
    ]
    with _figure(path, 8, 0.27 * len(table) + 1.3) as figure:
        axis = figure.subplots()
        axis.barh(at, table["iou"].fillna(0), color=SKY, height=0.7, label="IoU")
        axis.hlines(at, table["iou_low"], table["iou_high"], color="black", linewidth=1.4, label="95 % interval")
        axis.plot(
            table["boundary_iou"], at, "D", color=ORANGE, markersize=4, mec="white", mew=0.6, label="boundary IoU"
        )
        for row in np.flatnonzero(table["iou"].isna()):
            axis.text(0.01, float(row), "absent from truth and prediction", va="center", fontsize=8, color="#555555")
        if table["iou"].notna().any():
            mean = table["iou"].mean()
            axis.axvline(mean, color="black", linestyle=":", linewidth=1, label=f"mean {mean:.3f}")
        axis.set_yticks(at, names, fontsize=9)
        axis.set_ylim(-0.6, len(table) - 0.4)
        axis.set_xlim(0, 1)
        axis.set_xlabel("IoU; beside the name: share of the labelled pixels")
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        _plain(axis)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def draw_reliability(path: Path, table: pd.DataFrame, error: float) -> None:
    """Draw how often the model is right at each confidence, over the share of pixels that have it.

    Args:
        path: a PNG.
        table: one row a bin: `low`, `high`, `pixels`, and their mean `confidence` and `accuracy` (NaN in an empty bin).
        error: the expected calibration error.
    """
    width, middle = table["high"] - table["low"], (table["low"] + table["high"]) / 2
    with _figure(path, 5.5, 5.8) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        upper.bar(middle, table["accuracy"].fillna(0), width * 0.94, color=BLUE, label="accuracy of the bin")
        upper.plot(table["confidence"], table["accuracy"], "o", color=ORANGE, markersize=4, label="its mean confidence")
        upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
        upper.set_title(f"expected calibration error {error:.4f}", fontsize=10)
        upper.set_ylim(0, 1.02)
        upper.set_ylabel("share of pixels that are right")
        upper.legend(loc="upper left", fontsize=8, frameon=False)
        lower.bar(middle, table["pixels"] / max(1, table["pixels"].sum()), width * 0.94, color=GREY)
        lower.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        lower.set_ylabel("share of pixels")
        lower.set_xlabel("confidence: probability of the best class")
        lower.set_xlim(0, 1)
        for axis in (upper, lower):
            _plain(axis)


def draw_curves(path: Path, history: pd.DataFrame, report: pd.DataFrame | None) -> None:
    """Draw loss, val scores and, where it is known, the learning rate by epoch.

    Args:
        path: a PNG.
        history: `history.csv`: `epoch`, `train_loss`, `val_accuracy`, `val_miou`, `val_report_miou`, perhaps `lr`.
        report: the report's own numbers, dashed beside ours: `epoch`, `train_loss`, `val_accuracy`, `val_report_miou`.
    """
    panels = [
        ("train loss", [("train_loss", "train loss", BLUE)]),
        (
            "val scores",
            [
                ("val_accuracy", "pixel accuracy", GREEN),
                ("val_miou", "mIoU", BLUE),
                ("val_report_miou", 'the report\'s "mIoU"', ORANGE),
            ],
        ),
    ]
    if "lr" in history:
        panels.append(("learning rate", [("lr", "learning rate", GREY)]))
    marker = "o" if len(history) <= 50 else ""
    with _figure(path, 4 * len(panels), 3.8) as figure:
        for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for column, label, colour in lines:
                axis.plot(history["epoch"], history[column], marker=marker, markersize=3, color=colour, label=label)
                if report is not None and column in report:
                    axis.plot(
                        report["epoch"], report[column], "x--", markersize=5, linewidth=1, color=colour,
                        label=f"{label}: the report",
                    )  # fmt: skip
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(bottom=0)
            axis.grid(color="#dddddd", linewidth=0.6)
            _plain(axis)
            if len(axis.lines) > 1:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8, frameon=False)


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of that size in inches, saved as a PNG when the block ends well."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style must not change what DVC hashes
        matplotlib.rcParams["text.parse_math"] = False  # names are the user's, and may hold a $
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata={"Software": None})


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)


def _errors(row: Drawn) -> Pixels:
    """Right pixels grey, wrong ones red, void ones white with grey stripes, `[H, W, 3]`."""
    void = row.truth == VOID
    right, wrong, empty = np.array((RIGHT, WRONG, EMPTY), np.uint8)
    picture = np.where((row.truth == row.prediction)[..., None], right, wrong)
    down, across = np.indices(void.shape, np.int32)
    period = max(4, max(void.shape) // 40)
    striped = (down + across) % period < period // 4
    picture[void] = np.where(striped[void][:, None], right, empty)
    return picture


def _shorten(text: str, most: int) -> str:
    """At most so many characters; of a longer text the middle is left out."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
