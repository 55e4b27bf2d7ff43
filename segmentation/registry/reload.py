"""Masks of a registered model by its own stored code: `python -IB reload.py MODEL_URI FOLDER`.

A script of its own: isolated (`-I`), so that nothing of the checkout is imported in place of what the version carries,
and writing nothing beside what is stored (`-B`). For each `<name>.photo` of the folder it writes `<name>.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlflow
import pandas as pd


def main(uri: str, folder: Path) -> None:
    model = mlflow.pyfunc.load_model(uri)
    photos = sorted(folder.glob("*.photo"))
    masks = model.predict(pd.DataFrame({"image": [photo.read_bytes() for photo in photos]}))["mask"]
    for photo, mask in zip(photos, masks, strict=True):
        photo.with_suffix(".png").write_bytes(mask)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
