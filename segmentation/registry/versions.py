"""Model versions of the registry, found by number or alias and loaded to predict."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from segmentation.errors import PipelineError
from segmentation.prediction.predictor import Augmentation, Predictor
from segmentation.progress import Progress
from segmentation.registry.client import MODEL_NAME, answering
from segmentation.registry.store import shown, tracking_uri


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
        PipelineError: its files cannot be downloaded, are missing or damaged, or are of a model that this code cannot
            build; the message names the version, and the file by its place in the artifact store.
    """
    name = f"models:/{MODEL_NAME}/{version.version}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            stored = MlflowClient().get_model_version_download_uri(MODEL_NAME, str(version.version))
            with Progress(f"download {name}"):
                folder = Path(mlflow.artifacts.download_artifacts(name, dst_path=scratch))
        except (MlflowException, OSError) as error:
            raise PipelineError(f"{name}: its files cannot be downloaded: {error}") from None
        try:
            return Predictor.load(*_stored(folder))
        except PipelineError as error:
            said = str(error).replace(str(folder), stored.rstrip("/"))
            raise PipelineError(f"{name}: {said}; put its files back, or use another version") from None


def _stored(folder: Path) -> tuple[Path, Augmentation]:
    """Where a version's model lies in its folder, and how it was evaluated."""
    file = folder / "MLmodel"
    try:
        flavor = YAML(typ="safe").load(file.read_text(encoding="utf-8"))["flavors"]["python_function"]
        return folder / flavor["artifacts"]["model"]["path"], Augmentation.from_config(flavor["config"])
    except FileNotFoundError:
        raise PipelineError(f"{file}: not found") from None
    except (YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise PipelineError(f"{file}: not of a model that this project registered") from None
