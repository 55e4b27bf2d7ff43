"""Training curves streamed to MLflow while the run goes on.

The files that the stage writes are the truth; this is a view of them. A tracking server that is away costs a warning.
"""

from __future__ import annotations

import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class LiveCurves(Callback):
    """Logs each epoch's row to the run `MLFLOW_RUN_ID` of `MLFLOW_TRACKING_URI`; does nothing where either is unset."""

    def __init__(self) -> None:
        self.run_id = os.environ.get("MLFLOW_RUN_ID")
        self.uri = os.environ.get("MLFLOW_TRACKING_URI")

    def on_save_checkpoint(self, trainer: L.Trainer, task: Any, _: dict[str, Any]) -> None:
        if not (self.run_id and self.uri):
            return
        # A short wait: the curves are not worth holding up a training step for the minutes MLflow retries by default.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        row, now = task.history[-1], int(time.time() * 1000)
        metrics = [Metric(key, value, now, row["epoch"]) for key, value in row.items() if key != "epoch"]
        try:
            MlflowClient(self.uri).log_batch(self.run_id, metrics)
        except Exception as error:  # MLflow's own, a database's, an address that nobody checked: none ends a training
            print(f"warning: no live curves from here on, {self.uri} does not take them: {error}", flush=True)
            self.run_id = None
