"""Model versions of the registry, found by number or alias and loaded to predict."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML

from segmentation.client import MODEL_NAME, answering
from segmentation.errors import PipelineError
from segmentation.predictor import Augmentation, Predictor
from segmentation.progress import Progress
from segmentation.store import shown, tracking_uri


def find_version(client: MlflowClient, which: str) -> ModelVersion:
    """The version of a number or an alias.

    Raises:
        PipelineError: there is none, or the tracking server does not answer.
    """
    with answering():
        try:
            if which.isdecimal():
                return client.get_model_version(MODEL_NAME, which)
            return client.get_model_version_by_alias(MODEL_NAME, which)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise PipelineError(
                f"models:/{MODEL_NAME}: {shown(tracking_uri())} has no version or alias {which!r}; "
                "`python -m flows.train` registers one"
            ) from None


def load_predictor(version: ModelVersion) -> Predictor:
    """The model of a version, predicting with the test-time augmentation that it was evaluated with.

    The version's weights run in this checkout's code; the code that is stored with them is for bare environments.

    Raises:
        PipelineError: its files cannot be had, are damaged, or are of a model that this code cannot build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with Progress(f"download models:/{MODEL_NAME}/{version.version}"):
                folder = Path(
                    mlflow.artifacts.download_artifacts(f"models:/{MODEL_NAME}/{version.version}", dst_path=scratch)
                )
        except (MlflowException, OSError) as error:
            raise PipelineError(f"models:/{MODEL_NAME}/{version.version}: cannot be had: {error}") from None
        flavour = YAML(typ="safe").load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
        augmentation = Augmentation.from_config(flavour["config"])
        return Predictor.load(folder / flavour["artifacts"]["model"]["path"], augmentation)
