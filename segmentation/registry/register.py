"""A finished run's files into the MLflow model registry, once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from ruamel.yaml import YAML

from segmentation.files import PACKAGE
from segmentation.paths import EVALUATION, MODEL, TRAINING, scratch
from segmentation.registry import aliases
from segmentation.registry.client import MODEL_NAME, answering, connect, experiment_id

REQUIREMENTS = (
    "mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "timm", "torch", "torchvision",
)  # fmt: skip


@dataclass(frozen=True)
class Registered:
    """A model version, and the aliases that this registration left on it."""

    version: str
    aliases: tuple[str, ...]


def start_run(name: str) -> str:
    """Open a run that live curves go to, or go on with the open one of this name; returns its id.

    Raises:
        ServerAwayError: the store does not answer.
        PipelineError: the store refuses, or the experiment is deleted.
    """
    client = connect()
    experiment = experiment_id(client)
    with answering():
        # left open by a flow that was killed before it registered
        open_ones = client.search_runs(
            [experiment], f"attributes.run_name = '{name}' and attributes.status = 'RUNNING'"
        )
        if open_ones:
            return open_ones[0].info.run_id
        return client.create_run(experiment, run_name=name).info.run_id


def end_run(run_id: str, status: str) -> None:
    """Close a run as `FINISHED`, `FAILED` or `KILLED`.

    Raises:
        ServerAwayError: the store does not answer.
        PipelineError: the store refuses.
    """
    client = connect()
    with answering():
        client.set_terminated(run_id, status)


def register(files: Path, tags: Mapping[str, str], run_id: str | None = None) -> Registered:
    """Log a run's files, register its model and move the aliases; a result registered before is found, not repeated.

    `aliases.after_registration` says which aliases move. Registrations from one checkout wait for each other.

    Args:
        files: a folder with `params.yaml`, `dvc.lock`, `models/` and `reports/`.
        tags: lineage, all of it put on the version; `dvc_lock_sha256` says which result this is.
        run_id: the run that was opened for it; `None` opens one.

    Raises:
        ServerAwayError: the store does not answer, or no longer; calling again completes the work.
        PipelineError: the store refuses; calling again, once that is repaired, completes the work.
    """
    client = connect()
    with answering():
        lock = scratch() / "register.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            number = _find(client, tags["dvc_lock_sha256"])
            if number is None or run_id is not None:  # a run opened for it gets its files in any case
                run_id = run_id or start_run(tags["experiment"])
                scores = _log_run(client, files, tags, run_id)
                number = number or _create_version(client, files, {**tags, **scores}, run_id)
            return Registered(number, aliases.after_registration(number))


def _find(client: MlflowClient, dvc_lock_sha256: str) -> str | None:
    """The newest version of this very result; tags come with the version, so what has them is whole."""
    versions = client.search_model_versions(f"name = '{MODEL_NAME}' and tags.dvc_lock_sha256 = '{dvc_lock_sha256}'")
    return str(max(int(found.version) for found in versions)) if versions else None


def _create_version(client: MlflowClient, files: Path, tags: Mapping[str, str], run_id: str) -> str:
    warnings.filterwarnings("ignore", "(?s).*An input example was not provided")  # the signature is stated below
    evaluated = YAML(typ="safe").load((files / "params.yaml").read_text(encoding="utf-8"))["evaluate"]
    with mlflow.start_run(run_id=run_id):
        model = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(files / MODEL)},
            model_config={key: evaluated[key] for key in ("flip", "scales", "sliding_window")},
            code_paths=[str(PACKAGE)],
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.binary, "image")]), outputs=Schema([ColSpec(DataType.binary, "mask")])
            ),
        )
    try:
        client.create_registered_model(MODEL_NAME, description="Semantic segmentation; see the repository's README")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Tags go on with the creation, in one request: a version without them never exists.
    created = client.create_model_version(
        MODEL_NAME, model.model_uri, run_id=run_id, tags=dict(tags), model_id=model.model_id
    )
    return str(created.version)


def _log_run(client: MlflowClient, files: Path, tags: Mapping[str, str], run_id: str) -> dict[str, str]:
    """The final truth from the files: parameters, epochs that the live curves missed, scores, reports.

    Returns:
        The scores, as tags for a version.
    """
    scores = flatten(json.loads((files / EVALUATION / "metrics.json").read_text(encoding="utf-8")))
    metrics = {key: value for key, value in scores.items() if not isinstance(value, str)}  # MLflow's are numbers
    params = flatten(YAML(typ="safe").load((files / "params.yaml").read_text(encoding="utf-8")))
    client.log_batch(
        run_id,
        [Metric(f"eval/{key}", value, 0, 0) for key, value in metrics.items()],
        [Param(key, str(value)) for key, value in params.items()],
        [RunTag(key, value) for key, value in tags.items()],
    )
    history = pd.read_csv(files / TRAINING / "history.csv")
    for key in history.columns.drop("epoch"):
        live = {point.step for point in client.get_metric_history(run_id, key)}
        rows = history[~history["epoch"].isin(live)]
        points = [Metric(key, value, 0, epoch) for epoch, value in zip(rows["epoch"], rows[key], strict=True)]
        client.log_batch(run_id, points)
    for name in ("params.yaml", "dvc.lock"):
        client.log_artifact(run_id, str(files / name))
    client.log_artifacts(run_id, str(files / "reports"), "reports")
    client.set_terminated(run_id, "FINISHED")
    return {key: str(round(value, 6)) for key, value in metrics.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
