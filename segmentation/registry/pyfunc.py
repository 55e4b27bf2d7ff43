"""The registered model: an MLflow pyfunc kept as this code and two plain files, no pickle.

MLflow runs this file to load the model (models from code), so what it imports is what a bare environment needs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from segmentation.data.images import read_photo
from segmentation.errors import PipelineError
from segmentation.prediction.predictor import Augmentation, Predictor, mask_png


class SegmentationModel(PythonModel):
    """A frame with a column `image` to one with a column `mask`, on the same index: masks stay with their rows.

    An image is the bytes of a JPEG or PNG file (`bytes`, `bytearray`, `memoryview`) or their base64 text. A mask is a
    palette PNG of class ids at the photo's own size (upright, EXIF orientation applied). It is predicted as the version
    was evaluated; `load_model(…, model_config={"flip": False, …})` chooses otherwise.
    """

    def load_context(self, context: PythonModelContext) -> None:
        augmentation = Augmentation.from_config(context.model_config or {})
        self.predictor = Predictor.load(Path(context.artifacts["model"]), augmentation)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Raises `PipelineError`, which names the row, where an image is no photo; no mask is returned then."""
        images = model_input["image"]
        # all of them before the first mask, which takes longer than this
        photos = [self._at(images, row, photo_bytes, image) for row, image in enumerate(images)]
        masks = [self._at(images, row, self._mask_png, photo) for row, photo in enumerate(photos)]
        return pd.DataFrame({"mask": pd.Series(masks, index=images.index, dtype=object)})

    def _mask_png(self, image: bytes) -> bytes:
        photo, _ = read_photo(image)
        return mask_png(self.predictor.mask(photo))

    @staticmethod
    def _at(images: pd.Series, row: int, step: Callable[[Any], bytes], value: Any) -> bytes:
        try:
            return step(value)
        except PipelineError as error:
            label = images.index.tolist()[row]
            raise PipelineError(
                f"column image, row {row + 1} of {len(images)} (index {label!r}): {error}; give the bytes of a JPEG or "
                "PNG file, or their base64 text"
            ) from None


def photo_bytes(image: Any) -> bytes:
    """A photo's bytes, from what a cell of a frame holds.

    Raises:
        PipelineError: it is neither bytes nor base64 text.
    """
    if not isinstance(image, str | bytes | bytearray | memoryview):
        raise PipelineError(f"{type(image).__name__} is no photo")
    data = image.encode(errors="replace") if isinstance(image, str) else bytes(image)
    # the first byte of a JPEG, and of a PNG, is no ASCII; MLflow's server passes some of its formats on as base64 bytes
    if not (isinstance(image, str) or data.isascii()):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError:
        raise PipelineError(f"{data.decode()[:40]!r} is no base64 text; if it is a path, read the file") from None


set_model(SegmentationModel())
