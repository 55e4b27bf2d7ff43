"""Pictures of predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from segmentation.files import atomic_path
from segmentation.images import Pixels
from segmentation.voc import VOID, palette


def draw_panels(path: Path, drawn: list[tuple[Image.Image, Pixels, Pixels]], classes: list[str]) -> None:
    """Draw rows of photo, truth and prediction, with a legend of the classes that appear.

    Args:
        path: a PNG.
        drawn: photo, truth `[H, W]` and prediction `[H, W]` of each row.
        classes: class names by id.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    colours = np.array(palette()).reshape(-1, 3) / 255
    figure, axes = plt.subplots(len(drawn), 3, figsize=(9, 2.6 * len(drawn) + 0.8), squeeze=False, layout="constrained")
    for row, (photo, truth, prediction) in zip(axes, drawn, strict=True):
        for axis, picture in zip(row, (np.asarray(photo), colours[truth], colours[prediction]), strict=True):
            axis.imshow(picture)
            axis.axis("off")
    for axis, title in zip(axes[0], ("photo", "truth", "prediction"), strict=True):
        axis.set_title(title)
    labels = np.unique(np.concatenate([mask.ravel() for _, truth, prediction in drawn for mask in (truth, prediction)]))
    names = [(label, "void" if label == VOID else classes[label]) for label in labels.tolist() if label]
    handles = [Patch(facecolor=colours[label], label=name) for label, name in names]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    plt.close(figure)
