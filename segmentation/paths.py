"""Where things live. Paths are relative to the folder that a stage runs in, but for what must outlive that folder."""

from __future__ import annotations

from pathlib import Path

from segmentation.errors import PipelineError

SOURCE = Path("data/source.json")
RAW = Path("data/raw")
PROCESSED = Path("data/processed")
MANIFEST = PROCESSED / "manifest.parquet"
FEATURES = Path("data/features")
DATA_CHECKS = Path("reports/data_checks.json")
MODEL = Path("models")
TRAINING = Path("reports/training")
EVALUATION = Path("reports/evaluation")
REPORT = Path("reports/index.html")


def project_root() -> Path:
    """The user's checkout; inside an isolated DVC experiment (`<checkout>/.dvc/tmp/exps/…`) the one it came from.

    Downloads and checkpoints are kept there (`scratch/`), so that a killed experiment leaves them to the next one, and
    relative paths in `params.yaml` are relative to it.
    """
    here = Path.cwd()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def check_checkout() -> None:
    """Whether DVC, Prefect and MLflow work in the checkout: they put its path unescaped into addresses and SQL.

    Raises:
        PipelineError: it has signs with a meaning there; the tools would work in another folder, or crash.
    """
    root = project_root()
    signs = [sign for sign in "#?%" if sign in str(root)]
    if {"'", '"'} <= set(str(root)):  # MLflow's first row of a new database; one kind of quotes is fine
        signs += ["'", '"']
    if signs:
        raise PipelineError(
            f"{root}: has {' and '.join(signs)} in its path, which DVC, Prefect or MLflow misread; rename the folder"
        )


def scratch() -> Path:
    """Untracked folder for what may be thrown away at any time: downloads, checkpoints, Data Docs."""
    return project_root() / "scratch"
