"""Masks of a folder or a list of photos: as deployment `predict/folder`, or by hand with `python -m flows.predict`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and computes its folders
    from flows import command_line

    ARGUMENTS = command_line.read(command_line.predict)

import os
import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from flows.local import by_hand
from segmentation.errors import PipelineError
from segmentation.paths import project_root
from segmentation.progress import lines_to

EVERY_SECONDS = 2.0


@flow(name="predict")
def predict(source: str, out: str | None = None, version: str = "champion", overlays: bool = False) -> dict[str, Any]:
    """Predict the masks of all photos of a folder or a list; started again, it goes on where it was ended.

    Args:
        source: the folder with JPEG and PNG photos, at any depth, or a text file with the path of one photo a line; on
            the worker's machine, relative paths from the checkout.
        out: the folder that masks and table are written to; when empty, runs/predictions/ and the name of the source.
        version: the model that predicts, by alias (champion, challenger, previous) or by version number.
        overlays: also write each photo with its mask over it, half transparent.
    """
    if not source.strip():
        raise PipelineError("source: is empty; give a folder of photos, or a text file with one path a line")
    photos = _expanded(source)
    default = project_root() / "runs" / "predictions" / Path(os.path.realpath(photos)).name
    return predict_folder(photos, _expanded(out) if out else default, version, overlays)


def _expanded(text: str) -> Path:
    """With `~` expanded, which no shell does in a deployment's parameters."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # there is no such account
        raise PipelineError(f"{text}: {error}; write the whole path") from None


@task(cache_policy=NO_CACHE)
def predict_folder(source: Path, out: Path, which: str, overlays: bool) -> dict[str, Any]:
    """All photos, one after the other, with a progress artifact."""
    from segmentation.prediction.batch import LEFT_OUT, describe, predict_photos
    from segmentation.registry.client import MODEL_NAME, connect
    from segmentation.registry.versions import find_version, load_predictor

    version = find_version(connect(), which)
    log = get_run_logger()
    log.info("models:/%s/%s predicts %s into %s", MODEL_NAME, version.version, source, out)
    artifact: Any = create_progress_artifact(0.0, key="predict-progress", description=f"Photos of {source}")
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > EVERY_SECONDS:
            update_progress_artifact(artifact, 100 * done / total, f"{done} of {total} photos of {source}")
            shown = time.monotonic()

    with lines_to(log.info):
        outcome = predict_photos(load_predictor(version), version, source, out, overlays, progress)
    if outcome.left_out:
        log.warning("%s; all names: %s", describe(outcome.left_out), out / LEFT_OUT)
    if outcome.failed:
        log.warning("%d photos failed; column `error` of %s says why", outcome.failed, outcome.table)
    return {
        "version": str(version.version),
        "photos": outcome.photos,
        "failed": outcome.failed,
        "done_before": outcome.done_before,
        "left_out": len(outcome.left_out),
        "table": str(outcome.table),
    }


def main(source: str, out: str | None, version: str, overlays: bool) -> None:
    """Run the flow by hand, and say what came of it."""
    with by_hand():
        result = predict(source, out, version, overlays)
    print(
        f"\n  photos   {result['photos']}: {result['failed']} failed, {result['done_before']} were done before\n"
        f"  left out {result['left_out']} other files\n"
        f"  table    {result['table']}\n"
    )


if __name__ == "__main__":
    main(**vars(ARGUMENTS))
