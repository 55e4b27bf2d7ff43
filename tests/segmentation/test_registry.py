"""Registering beside other processes, in a real store."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from segmentation import model
from segmentation.client import MODEL_NAME, connect
from segmentation.files import write_json
from segmentation.model import ModelCard
from segmentation.registry import register, start_run
from tests.conftest import environment

CARD = ModelCard(
    encoder="test_vit", trainable_blocks="all", decoder="linear", decoder_channels=[8, 8, 8, 8], decoder_norm="batch",
    skip_connections=[], image_size=64, classes=["background", "patch"], encoder_weights="random", epoch=1,
)  # fmt: skip
TAGS = {"experiment": "a run", "dvc_lock_sha256": "lock"}

PROMOTE = """
print(aliases.move("1", None, "why")["champion"])
"""
REGISTER = """
print(register(Path("run"), {"experiment": "a run", "dvc_lock_sha256": "lock"}).version)
"""
# what a process does, and what it waits for right before it moves `champion`: the other's end, but not for ever
BESIDE = """
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from segmentation import aliases
from segmentation.registry import register

me, other, first = sys.argv[1:]
write = MlflowClient.set_registered_model_alias

def wait(file, seconds):
    deadline = time.monotonic() + seconds
    while not Path(file).exists() and time.monotonic() < deadline:
        time.sleep(0.05)

def paused(client, name, alias, version):
    if alias == "champion" and me == first:
        Path(f"{me} has read").touch()
        wait(f"{other} has ended", 5)
    write(client, name, alias, version)

MlflowClient.set_registered_model_alias = paused
if me != first:
    wait(f"{other} has read", 120)
try:
    DO
finally:
    Path(f"{me} has ended").touch()
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


@pytest.mark.parametrize("first", ["register", pytest.param("promote", marks=pytest.mark.slow)])
def test_a_champion_promoted_while_another_process_registers_is_not_overwritten(store, root, first):
    """Between the look at the aliases and the move of one of them, the other process must not come in."""
    code = {"promote": PROMOTE, "register": REGISTER}
    env = environment() | {"PYTHONPATH": str(root), "MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd()}/mlruns/mlflow.db"}
    processes = {
        me: subprocess.Popen(
            [sys.executable, "-c", BESIDE.replace("DO", code[me].strip()), me, other, first],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for me, other in (("promote", "register"), ("register", "promote"))
    }
    said = {me: process.communicate(timeout=180) for me, process in processes.items()}
    assert processes["register"].returncode == 0, said["register"][1]
    assert said["register"][0].split() == ["2"]
    model = store.get_registered_model(MODEL_NAME)
    champion = str(model.aliases["champion"])
    if first == "promote":
        assert (processes["promote"].returncode, said["promote"][0].split(), champion) == (0, ["1"], "1")
        assert '"champion": "1"' in model.tags["last_move"]
    else:
        assert (processes["promote"].returncode, champion) == (1, "2")
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
