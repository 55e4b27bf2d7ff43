"""A version whose files are not as they were: the message names the version and the file, wherever it is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.serving import register_random
from segmentation.errors import PipelineError
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.versions import find_version, load_predictor
from tests.segmentation.registry.test_pyfunc import CARD

FOREIGN = "not of a model that this project registered"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """The folder of version 1 in the artifact store."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        register_random(folder / "run", CARD, 1)
        yield Path(connect().get_model_version_download_uri(MODEL_NAME, "1").removeprefix("file://"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("path", "spoil", "says"),
    [
        ("artifacts/models/segmenter.safetensors", Path.unlink, "not found"),
        ("artifacts/models/segmenter.json", Path.unlink, "not found"),
        ("MLmodel", Path.unlink, "not found"),
        ("artifacts/models/segmenter.safetensors", cut, "not the weights that segmenter.json describes"),
        (
            "MLmodel",
            lambda file: file.write_text("flavors: {sklearn: {}}"),
            "not of a model that this project registered",
        ),
        ("MLmodel", lambda file: file.write_text(""), FOREIGN),
        ("MLmodel", lambda file: file.write_text("a: ["), FOREIGN),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    artifacts: Path, tmp_path: Path, path: str, spoil: Callable[[Path], object], says: str
) -> None:
    shutil.copytree(artifacts, tmp_path / "whole")
    try:
        spoil(artifacts / path)
        with pytest.raises(PipelineError) as error:
            load_predictor(find_version(connect(), "1"))
    finally:
        shutil.rmtree(artifacts)
        shutil.copytree(tmp_path / "whole", artifacts)
    assert str(error.value) == (
        f"models:/{MODEL_NAME}/1: file://{artifacts}/{path}: {says}; put its files back, or use another version"
    )


def test_a_version_without_any_file_is_named(artifacts: Path) -> None:
    away = artifacts.rename(artifacts.with_name("away"))
    try:
        with pytest.raises(PipelineError, match=rf"models:/{MODEL_NAME}/1: .*/MLmodel: not found; put its files"):
            load_predictor(find_version(connect(), "1"))
    finally:
        away.rename(artifacts)
