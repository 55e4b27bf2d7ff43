"""Register a finished run's model in MLflow: `python -m flows.register EXPERIMENT`. Registers a result only once."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and computes its folders
    from flows import command_line

    ARGUMENTS = command_line.read(command_line.register)

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.experiment import Revision, copy_out, find_revision, lineage
from flows.local import by_hand
from segmentation.registry.client import MODEL_NAME, ServerAwayError
from segmentation.registry.register import Registered


@flow(name="register")
def register(revision: str) -> str:
    """Register the model of an experiment (or of a git revision with a complete `dvc.lock`); returns its version.

    Args:
        revision: the experiment's name, as in `dvc exp list`, or a git revision.
    """
    found = find_revision(revision)
    return register_model(found, copy_out(found), None).version


def server_away(task: Any, run: Any, state: Any) -> bool:
    """Whether a task failed because the tracking server does not answer: the one failure that is tried again."""
    return isinstance(state.result(raise_on_failure=False), ServerAwayError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=server_away)
def register_model(revision: Revision, folder: Path, run_id: str | None) -> Registered:
    """Log the files of `folder` to MLflow and register its model; a tracking server that is away is tried again."""
    from segmentation.registry import register as registry

    return registry.register(folder, lineage(revision, folder), run_id)


def main(revision: str) -> None:
    """Run the flow by hand, and say what came of it."""
    with by_hand():
        version = register(revision)
    print(f"registered: models:/{MODEL_NAME}/{version}")


if __name__ == "__main__":
    main(ARGUMENTS)
