"""A finished run's files into the MLflow model registry, once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

from segmentation.errors import PipelineError
from segmentation.paths import EVALUATION, MODEL, TRAINING, project_root, scratch

MODEL_NAME = "voc-segmentation"
EXPERIMENT = "voc-segmentation"
REQUIREMENTS = (
    "mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "timm", "torch", "torchvision",
)  # fmt: skip


@dataclass(frozen=True)
class Registered:
    """A model version, and the aliases that this registration left on it."""

    version: str
    aliases: tuple[str, ...]


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else the checkout's own store, `mlruns/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root()}/mlruns/mlflow.db"


def connect() -> MlflowClient:
    """A client for `tracking_uri()`; makes the experiment on first use.

    Raises:
        PipelineError: the tracking server does not answer.
    """
    uri = tracking_uri()
    # MLflow's default is to retry for minutes; whoever calls can simply call again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient(uri, uri)
    with answering():
        if client.get_experiment_by_name(EXPERIMENT) is None:
            local = f"file://{project_root()}/mlruns/artifacts" if uri.startswith("sqlite:") else None
            client.create_experiment(EXPERIMENT, artifact_location=local)
    return client


def start_run(name: str) -> str:
    """Open a run that live curves go to, or go on with the open one of this name; returns its id.

    Raises:
        PipelineError: the tracking server does not answer.
    """
    client = connect()
    with answering():
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        # left open by a flow that was killed before it registered
        open_ones = client.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{name}' and attributes.status = 'RUNNING'"
        )
        if open_ones:
            return open_ones[0].info.run_id
        return client.create_run(experiment.experiment_id, run_name=name).info.run_id


def end_run(run_id: str, status: str) -> None:
    """Close a run as `FINISHED`, `FAILED` or `KILLED`.

    Raises:
        PipelineError: the tracking server does not answer.
    """
    client = connect()
    with answering():
        client.set_terminated(run_id, status)


@contextmanager
def answering() -> Iterator[None]:
    """Within, a tracking server that is away or that refuses is a `PipelineError`."""
    try:
        yield
    except (MlflowException, OSError) as error:
        raise PipelineError(
            f"MLFLOW_TRACKING_URI: {tracking_uri()} does not answer: {str(error).splitlines()[0]}"
        ) from None


def register(files: Path, tags: Mapping[str, str], run_id: str | None = None) -> Registered:
    """Log a run's files, register its model and move the aliases; a result registered before is found, not repeated.

    `challenger` goes to the new version; `champion` too when no version has it. Registrations from one checkout wait
    for each other.

    Args:
        files: a folder with `params.yaml`, `dvc.lock`, `models/` and `reports/`.
        tags: lineage, all of it put on the version; `dvc_lock_sha256` says which result this is.
        run_id: the run that was opened for it; `None` opens one.

    Raises:
        PipelineError: the tracking server does not answer, or gives up in between; calling again completes the work.
    """
    client = connect()
    lock = scratch() / "register.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):
            number = _find(client, tags["dvc_lock_sha256"])
            if number is None or run_id is not None:  # a run opened for it gets its files in any case
                run_id = run_id or start_run(tags["experiment"])
                scores = _log_run(client, files, tags, run_id)
                number = number or _create_version(client, files, {**tags, **scores}, run_id)
            return Registered(number, _move_aliases(client, number))
    except (MlflowException, OSError) as error:
        raise PipelineError(f"{tracking_uri()}: registering failed, try again: {error}") from error


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
            code_paths=[str(Path(__file__).parent)],
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.binary, "image")]), outputs=Schema([ColSpec(DataType.binary, "mask")])
            ),
        )
    if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
        client.create_registered_model(MODEL_NAME, description="Semantic segmentation; see the repository's README")
    # Tags go on with the creation, in one request: a version without them never exists.
    created = client.create_model_version(
        MODEL_NAME, model.model_uri, run_id=run_id, tags=dict(tags), model_id=model.model_id
    )
    return str(created.version)


def _move_aliases(client: MlflowClient, number: str) -> tuple[str, ...]:
    """`challenger` to the newest version, `champion` to this one only when there is none; the aliases it now has."""
    aliases = dict(client.get_registered_model(MODEL_NAME).aliases)
    newest = "challenger" not in aliases or int(number) > int(aliases["challenger"])
    for alias, wanted in (("challenger", newest), ("champion", "champion" not in aliases)):
        if wanted:
            client.set_registered_model_alias(MODEL_NAME, alias, number)
            aliases[alias] = number
    return tuple(sorted(alias for alias, holder in aliases.items() if str(holder) == number))


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
