"""Registering beside other processes, in a real store."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from segmentation.files import write_json
from segmentation.model import segmenter as model
from segmentation.model.segmenter import ModelCard
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.register import register, start_run
from tests.conftest import environment

CARD = ModelCard(
    encoder="test_vit", trainable_blocks="all", decoder="linear", decoder_channels=[8, 8, 8, 8], decoder_norm="batch",
    skip_connections=[], image_size=64, classes=["background", "patch"], encoder_weights="random", epoch=1,
)  # fmt: skip
TAGS = {"experiment": "a run", "dvc_lock_sha256": "lock"}

# the registration waits, right before it moves `champion`, for the promotion to come in between, but not for ever
START = """
import time
from pathlib import Path
from mlflow import MlflowClient
from segmentation.registry import aliases
from segmentation.registry.register import register

def wait(file, seconds):
    deadline = time.monotonic() + seconds
    while not Path(file).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
"""
PROMOTE = """
wait("about to move", 120)
print(aliases.move("1", None, "why")["champion"])
Path("promoted").touch()
"""
REGISTER = """
write = MlflowClient.set_registered_model_alias

def paused(client, name, alias, version):
    if alias == "champion":
        Path("about to move").touch()
        wait("promoted", 5)
    write(client, name, alias, version)

MlflowClient.set_registered_model_alias = paused
print(register(Path("run"), {"experiment": "a run", "dvc_lock_sha256": "lock"}).version)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A store with one version and no champion, and a finished run to register in the folder `run`."""
    folder = tmp_path_factory.mktemp("prepared")
    run = folder / "run"
    (run / "reports/training").mkdir(parents=True)
    (run / "reports/training/history.csv").write_text("epoch,val_miou\n1,0.5\n")
    write_json(run / "reports/evaluation/metrics.json", {"miou": 0.5})
    (run / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    (run / "dvc.lock").write_text("")
    model.save(model.build(CARD).eval(), CARD, run / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns/mlflow.db")
        client = connect()
        client.create_registered_model(MODEL_NAME)
        client.create_model_version(MODEL_NAME, "file:///nowhere", run_id=start_run("one"))
    return folder


@pytest.fixture
def store(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A copy of it, as the current folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    return connect()


@pytest.mark.slow
def test_a_champion_promoted_while_another_process_registers_is_not_overwritten(store, root):
    """Between the registration's look at the aliases and its move of `champion`, the promotion must not come in."""
    env = environment() | {"PYTHONPATH": str(root), "MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd()}/mlruns/mlflow.db"}
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = {
        me: subprocess.Popen([sys.executable, "-c", START + code], env=env, **pipes)
        for me, code in (("promote", PROMOTE), ("register", REGISTER))
    }
    said = {me: process.communicate(timeout=180) for me, process in processes.items()}
    assert processes["register"].returncode == 0, said["register"][1]
    assert said["register"][0].split() == ["2"]
    model = store.get_registered_model(MODEL_NAME)
    assert (processes["promote"].returncode, str(model.aliases["champion"])) == (1, "2")
    assert "version 2 by now, no longer no version as when this was decided" in said["promote"][1]
    assert "last_move" not in model.tags
    assert str(model.aliases["challenger"]) == "2"


def test_a_result_is_registered_once_and_a_champion_stays(store):
    store.set_registered_model_alias(MODEL_NAME, "champion", "1")
    first = register(Path("run"), TAGS)
    assert (first.version, first.aliases) == ("2", ("challenger",))
    assert register(Path("run"), TAGS) == first
    assert len(store.search_model_versions(f"name = '{MODEL_NAME}'")) == 2


def test_a_model_that_was_renamed_or_deleted_is_made_anew(store):
    store.rename_registered_model(MODEL_NAME, "another")
    assert register(Path("run"), TAGS).aliases == ("challenger", "champion")
    store.delete_registered_model(MODEL_NAME)
    again = register(Path("run"), TAGS)
    assert (again.version, again.aliases) == ("1", ("challenger", "champion"))
