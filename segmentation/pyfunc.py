"""The registered model: an MLflow pyfunc kept as this code and two plain files, no pickle.

MLflow runs this file to load the model (models from code), so what it imports is what a bare environment needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from segmentation.images import read_photo
from segmentation.predictor import Augmentation, Predictor, mask_png


class SegmentationModel(PythonModel):
    """A frame with a binary column `image` (JPEG or PNG bytes) to one with a binary column `mask`.

    A mask is a palette PNG of class ids at the photo's own size (upright, EXIF orientation applied). It is predicted as
    the version was evaluated; `load_model(…, model_config={"flip": False, …})` chooses otherwise.
    """

    def load_context(self, context: PythonModelContext) -> None:
        augmentation = Augmentation.from_config(context.model_config or {})
        self.predictor = Predictor.load(Path(context.artifacts["model"]), augmentation)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        return pd.DataFrame({"mask": [self._mask_png(image) for image in model_input["image"]]})

    def _mask_png(self, image: bytes) -> bytes:
        photo, _ = read_photo(image)
        return mask_png(self.predictor.mask(photo))


set_model(SegmentationModel())
