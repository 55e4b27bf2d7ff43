"""Train, evaluate and register in one run: as deployments `train/…`, or by hand with `python -m flows.train`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and computes its folders
    from flows import command_line

    ARGUMENTS = command_line.read(command_line.train)

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from flows import experiment
from flows.experiment import Revision
from flows.local import by_hand
from flows.register import register_model
from flows.services import GPU
from segmentation.errors import PipelineError
from segmentation.evaluation.verdict import caveat
from segmentation.paths import DATA_CHECKS, EVALUATION, REPORT, TRAINING
from segmentation.registry.client import MODEL_NAME, ServerAwayError
from segmentation.registry.register import Registered
from segmentation.registry.store import TRACKING, tracking_uri


@flow(name="train")
def train(overrides: dict[str, Any] | None = None, isolated: bool = True) -> dict[str, Any]:
    """Run the DVC pipeline as an experiment and register its model.

    Args:
        overrides: values that replace those of params.yaml for this run, by dotted key: {"train.epochs": 2}.
        isolated: run in a temporary copy, so that the checkout is not touched; else in the checkout itself.
    """
    overrides = dict(overrides or {})
    experiment.check_settings(overrides, "overrides")
    experiment.check_repository(isolated)
    name = experiment.new_name()
    run_id = _open_run(name)
    status = "KILLED"
    try:
        revision = run_pipeline(name, overrides, isolated, run_id)
        with _kept(name):
            folder = copy_out(revision)
            publish(folder)
            registered = register_model(revision, folder, run_id)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        _close_run(run_id, status)
    return _summary(name, folder, registered)


@task(cache_policy=NO_CACHE)
def run_pipeline(name: str, overrides: dict[str, Any], isolated: bool, run_id: str | None) -> Revision:
    """`dvc exp run` with live output; finished stages come from the cache."""
    log = get_run_logger()
    env = {TRACKING: tracking_uri(), "MLFLOW_RUN_ID": run_id or ""}
    with _gpu_slot():
        return experiment.run_experiment(name, overrides, isolated, env, log.info)


@task(cache_policy=NO_CACHE)
def copy_out(revision: Revision) -> Path:
    """The run's report, pictures, metrics and model to `runs/<experiment>/`."""
    return experiment.copy_out(revision)


@task(cache_policy=NO_CACHE)
def publish(folder: Path) -> None:
    """The run's results as Prefect artifacts."""
    metrics = json.loads((folder / EVALUATION / "metrics.json").read_text(encoding="utf-8"))
    checks = json.loads((folder / DATA_CHECKS).read_text(encoding="utf-8"))
    history = pd.read_csv(folder / TRAINING / "history.csv")
    small = metrics["training_size"]
    create_markdown_artifact(
        key="training-result",
        description=f"Scores of {folder.name}",
        markdown=f"# {folder.name}\n\n"
        "| | photo's own size | training size |\n|---|---|---|\n"
        + "".join(
            f"| {name} | {metrics[key]:.4f} | {small[key]:.4f} |\n"
            for name, key in (
                ("mIoU (VOC)", "miou"),
                ("pixel accuracy", "pixel_accuracy"),
                ("mean class accuracy", "mean_class_accuracy"),
            )
        )
        + f'| the report\'s "mIoU" | | {small["report_miou"]:.4f} |\n\n'
        + (f"**{note}**\n\n" if (note := caveat(metrics)) else "")
        + f"mIoU: {metrics['interval']}. Data checks: {checks['result']}. Files and pictures: `{folder}`",
    )
    create_table_artifact(
        key="training-epochs",
        description=f"Epochs of {folder.name}",
        table=[list(history.columns), *history.to_numpy().tolist()],
    )


def _gpu_slot() -> AbstractContextManager[None]:
    """One training at a time, where the server has the limit `gpu`; a temporary server has none."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            return nullcontext()
    if limit.active_slots >= limit.limit:
        get_run_logger().info("waiting for a slot of the concurrency limit `%s`: another training has it", GPU)
    # a lease, renewed while training runs: what a killed run held is free again after that time
    return concurrency(GPU, lease_duration=60)


@contextmanager
def _kept(name: str) -> Iterator[None]:
    """Within, any error also says that the training is not lost."""
    kept = f"The training is done and kept as experiment {name}. Register it later: python -m flows.register {name}"
    try:
        yield
    except PipelineError as error:
        raise PipelineError(f"{error}\n{kept}") from error
    except Exception as error:
        error.add_note(kept)
        raise


def _open_run(name: str) -> str | None:
    """A run for the live curves; training goes on without one when the tracking server is away, and only then."""
    from segmentation.registry.register import start_run

    try:
        return start_run(name)
    except ServerAwayError as error:
        get_run_logger().warning("%s. Training goes on without live curves.", error)
        return None


def _close_run(run_id: str | None, status: str) -> None:
    from segmentation.registry.register import end_run

    if run_id is None:
        return
    try:
        end_run(run_id, status)
    except PipelineError as error:
        get_run_logger().warning("%s. The MLflow run %s stays open.", error, run_id)


def _summary(name: str, folder: Path, registered: Registered) -> dict[str, Any]:
    metrics = json.loads((folder / EVALUATION / "metrics.json").read_text(encoding="utf-8"))
    return {
        "experiment": name,
        "miou": metrics["miou"],
        "interval": metrics["interval"],
        "pixel_accuracy": metrics["pixel_accuracy"],
        "caveat": caveat(metrics),
        "version": registered.version,
        "aliases": list(registered.aliases),
        "folder": str(folder),
    }


def main(overrides: dict[str, Any], isolated: bool) -> None:
    """Run the flow by hand, and say what came of it."""
    with by_hand():
        result = train(overrides, isolated)
    aliases = ", ".join(f"models:/{MODEL_NAME}@{alias}" for alias in result["aliases"])
    print(
        f"\n  mIoU            {result['miou']:.4f} on the val split ({result['interval']}; "
        f"pixel accuracy {result['pixel_accuracy']:.4f})\n"
        + (f"                  {result['caveat']}\n" if result["caveat"] else "")
        + f"  model           models:/{MODEL_NAME}/{result['version']}  {aliases}\n"
        f"  experiment      {result['experiment']}\n"
        f"  look at         {result['folder']}/{REPORT}\n"
        "  next            make services   (Prefect and MLflow in the browser)\n"
    )


if __name__ == "__main__":
    main(*ARGUMENTS)
