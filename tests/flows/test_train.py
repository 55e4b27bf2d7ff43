import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import requests
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from ruamel.yaml import YAML

from flows.experiment import Revision, _hydra, evaluation_set, kill_tree
from flows.password import CLIENT
from flows.register import register, register_model
from flows.train import _gpu_slot, train
from segmentation.data.images import mask_image, read_mask
from segmentation.data.sample import draw_sample
from segmentation.data.voc import CLASSES, VOID, VocFolder
from segmentation.errors import PipelineError
from segmentation.metrics.confusion import confusion_matrices
from segmentation.prediction.predictor import Augmentation, Predictor
from segmentation.registry.client import connect
from segmentation.registry.register import end_run, start_run
from tests.conftest import TINY, environment, git

MODEL = "voc-segmentation"


def versions() -> list:
    return connect().search_model_versions(f"name = '{MODEL}'")


def aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in connect().get_registered_model(MODEL).aliases.items()}


def processes(checkout: Path, words: str) -> list[psutil.Process]:
    """Those that run in the checkout and have `words` in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.is_running() and words in " ".join(process.cmdline()) and str(checkout) in process.cwd():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def stage_processes(checkout: Path) -> list[psutil.Process]:
    return processes(checkout, "stages.")


def temporary_servers(checkout: Path) -> list[psutil.Process]:
    return processes(checkout, "prefect.server")


def start(checkout: Path, until: str, **overrides) -> subprocess.Popen:
    """Start `python -m flows.train`, on a machine without a home, and return it once `until` is in its output."""
    options = [f"--set={key}={json.dumps(value)}" for key, value in (TINY | overrides).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.train", *options],
        cwd=checkout, env=environment() | {CLIENT: "me:secret", "HOME": "/nonexistent"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if until in line:
            return process
    raise AssertionError("".join(lines))


def test_a_run_registers_a_version_with_its_lineage(checkout, trained):
    result = trained[1]
    (version,) = versions()
    assert (result["version"], result["aliases"]) == ("1", ["challenger", "champion"])
    assert aliases() == {"challenger": "1", "champion": "1"}
    commit = git(checkout, "rev-parse", f"{version.tags['experiment_commit']}^{{commit}}").strip()
    assert version.tags["experiment"] == result["experiment"]
    assert version.tags["git_commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert version.tags["git_dirty"] == "false"
    assert version.tags["data_checks"] == "passed with warnings"  # few photos do not show all classes
    assert "fetch" in git(checkout, "show", f"{commit}:dvc.lock")
    assert len(version.tags["dvc_lock_sha256"]) == len(version.tags["params_sha256"]) == 64
    assert len(version.tags["evaluation_set_sha256"]) == 64
    assert version.tags["data_hash"].endswith(".dir")
    metrics = json.loads((Path(result["folder"]) / "reports/evaluation/metrics.json").read_text())
    assert float(version.tags["miou"]) == pytest.approx(metrics["miou"], abs=1e-6)
    assert float(version.tags["training_size.report_miou"]) == pytest.approx(
        metrics["training_size"]["report_miou"], abs=1e-6
    )


def test_the_checkout_is_not_touched(checkout):
    assert git(checkout, "status", "--porcelain") == ""


def test_results_to_look_at_are_copied_out(trained):
    folder = Path(trained[1]["folder"])
    for name in (
        "params.yaml",
        "dvc.lock",
        "models/segmenter.json",
        "reports/data_checks.json",
        "reports/training/history.csv",
        "reports/evaluation/panels.png",
        "reports/evaluation/per_class.csv",
        "reports/index.html",
    ):
        assert (folder / name).stat().st_size > 0


def test_mlflow_has_each_epoch_once_and_the_parameters(checkout):
    run = connect().get_run(versions()[0].run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "2"
    history = connect().get_metric_history(run.info.run_id, "val_miou")
    assert [point.step for point in history] == [1, 2]


def test_the_same_run_again_trains_nothing_and_registers_nothing(checkout, caplog):
    again = train(TINY)
    assert again["version"] == "1"
    assert len(versions()) == 1
    assert "Stage 'train' is cached" in caplog.text
    assert re.findall("Running stage '(.*)'", caplog.text) == ["source"]
    assert "gpu" not in caplog.text  # this server has no such limit, and nobody need know


def test_killed_before_the_aliases_moved_registering_again_completes_it(checkout, trained):
    client = connect()
    for alias in ("challenger", "champion"):
        client.delete_registered_model_alias(MODEL, alias)
    assert register(trained[1]["experiment"]) == "1"
    assert aliases() == {"challenger": "1", "champion": "1"}
    assert len(versions()) == 1


def test_a_revision_that_pins_no_result_is_refused(checkout):
    with pytest.raises(PipelineError, match="'nonsense' is no experiment"):
        register("nonsense")
    with pytest.raises(PipelineError, match=r"dvc\.lock of [0-9a-f]{12} cannot be had"):
        register("HEAD")
    assert len(versions()) == 1


def test_a_refused_override_starts_nothing(checkout):
    before = git(checkout, "for-each-ref", "refs/exps")
    with pytest.raises(PipelineError, match=r"^overrides: refused\n  train\.epoch: unknown key"):
        train(TINY | {"train.epoch": 3})
    with pytest.raises(PipelineError, match=r"encoder\.name: .* the nearest is vit_small_patch14_dinov2"):
        train(TINY | {"encoder.name": "vit_smal_patch14_dinov2"})
    assert git(checkout, "for-each-ref", "refs/exps") == before
    assert len(versions()) == 1


@pytest.mark.slow
def test_a_branch_that_moved_on_is_registered_as_what_it_is_now(trained, cached_checkout, monkeypatch):
    checkout = cached_checkout()
    monkeypatch.chdir(checkout)
    # MLflow keeps the last store that this process used in the environment; this checkout has its own.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{checkout}/mlruns/mlflow.db")
    weights = []
    for seed in (0, 1):
        train(TINY | {"train.seed": seed}, isolated=False)
        git(checkout, "add", "-A")
        git(checkout, "commit", "--quiet", "-m", f"seed {seed}")
        register("HEAD")
        folder = checkout / "runs" / git(checkout, "rev-parse", "--short=12", "HEAD").strip()
        assert not (folder / "models/models").exists()
        weights.append((folder / "models/segmenter.safetensors").read_bytes())
        assert weights[-1] == (checkout / "models/segmenter.safetensors").read_bytes()
    assert weights[0] != weights[1]

    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("seed: 1", "seed: 2"))
    git(checkout, "commit", "--quiet", "-am", "Other parameters, no new result")
    with pytest.raises(PipelineError, match=r"is of another params\.yaml: train; run `dvc repro`"):
        register("HEAD")
    assert len(versions()) == 2


@pytest.mark.slow
def test_faulty_data_lists_every_offender_and_registers_nothing(checkout, tmp_path):
    folder = VocFolder(tmp_path / "own photos")
    draw_sample(folder.root, 6)
    folder.photo("val_001").write_bytes(folder.photo("val_001").read_bytes()[:900])
    Image.fromarray(np.full((50, 50), 77, np.uint8)).save(folder.mask("val_002"))
    Image.new("RGB", (40, 40)).save(folder.mask("train_001"))
    folder.mask("train_002").unlink()
    folder.photo("train_003").unlink()
    with folder.split_file("val").open("a") as stream:
        stream.write("train_004\n../../outside\n")
    count = len(versions())
    with pytest.raises(PipelineError) as failure:
        train(TINY | {"fetch.source": "directory", "fetch.directory": str(folder.root), "fetch.limit": None})
    for words in (
        "JPEGImages/val_001.jpg",
        "SegmentationClass/val_002.png",
        "77",
        "SegmentationClass/train_001.png",
        "SegmentationClass/train_002.png",
        "JPEGImages/train_003.jpg",
        "train_004",
        "../../outside",
    ):
        assert words in str(failure.value)
    assert len(versions()) == count


@pytest.mark.slow
def test_own_photos_in_a_relative_folder_are_watched_by_recorded_runs(checkout):
    folder = VocFolder(checkout / "data/own")
    draw_sample(folder.root, 4)
    result = train(TINY | {"fetch.source": "directory", "fetch.directory": "data/own", "train.epochs": 1})
    assert git(checkout, "status", "--porcelain") == ""
    mask = read_mask(folder.mask("val_001")).copy()
    mask[:20, :20] = VOID
    mask_image(mask).save(folder.mask("val_001"))
    changed = train(TINY | {"fetch.source": "directory", "fetch.directory": "data/own", "train.epochs": 1})
    hashes = [
        YAML(typ="safe").load((Path(run["folder"]) / "dvc.lock").read_text())["stages"]["fetch"]["outs"][0]["md5"]
        for run in (result, changed)
    ]
    assert hashes[0] != hashes[1]


@contextmanager
def artifact_server(folder: Path) -> Iterator[str]:
    """The URL of an MLflow server through which artifacts go as well, as one for a team has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2],
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts",
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                requests.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        kill_tree(server.pid)


@pytest.mark.slow
def test_ids_of_all_scripts_and_with_all_signs_are_registered_through_a_server_that_stores_artifacts(
    cached_checkout, monkeypatch, tmp_path
):
    folder, checkout = VocFolder(tmp_path / "own photos"), cached_checkout()
    draw_sample(folder.root, 4)
    ids = ["बिल्ली क्षि", "a+b, c & d @ #1 100%?", "p (1)", "x=y;z'q\"[*]<b>$a$|"]
    for number, identifier in enumerate(ids, 1):
        decomposed = unicodedata.normalize("NFD", identifier)
        folder.photo(f"val_{number:03d}").rename(folder.root / f"JPEGImages/{decomposed}.JPG")
        folder.mask(f"val_{number:03d}").rename(folder.mask(decomposed))
    folder.split_file("val").write_text("\n".join(ids), encoding="utf-8")
    monkeypatch.chdir(checkout)
    with artifact_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        own = {"fetch.source": "directory", "fetch.directory": os.path.relpath(folder.root, checkout)}
        result = train(TINY | own | {"train.epochs": 1})
        (version,) = versions()
        stored = {file.path for file in connect().list_artifacts(version.run_id, "reports/training/panels/epoch_01")}
    assert stored == {f"reports/training/panels/epoch_01/{number}.png" for number in range(1, 5)}
    with np.load(Path(result["folder"]) / "reports/evaluation/per_image_confusion.npz") as evaluated:
        assert evaluated["ids"].tolist() == ids
    # promotion reads them from DVC's cache
    assert len(list(evaluation_set(version.tags["experiment_commit"]))) == len(ids)


@pytest.mark.slow
def test_a_tracking_server_that_is_away_costs_no_training(checkout, monkeypatch):
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setattr("flows.train.register_model", register_without_waiting())
        with pytest.raises(PipelineError, match="The training is done and kept as experiment") as failure:
            train(TINY | {"preprocess.image_size": 70})
    name = str(failure.value).split("python -m flows.register ")[1].split()[0]
    count = len(versions())
    first = register(name)
    assert register(name) == first
    assert len(versions()) == count + 1
    assert aliases() == {"challenger": first, "champion": "1"}
    assert len(runs_named(name)) == 1
    # DVC's run cache once answered a changed size with the old one's outputs, and the wrong model was registered
    assert json.loads((checkout / "runs" / name / "models/segmenter.json").read_text())["image_size"] == 70


def runs_named(name: str) -> list:
    experiment = connect().get_experiment_by_name(MODEL)
    return connect().search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")


def test_registering_goes_on_with_the_run_that_a_killed_flow_left_open(checkout, trained):
    name = trained[1]["experiment"]
    opened = start_run("left open")
    assert start_run("left open") == opened
    end_run(opened, "KILLED")
    assert start_run("left open") != opened
    assert register(name) == "1"
    assert len(runs_named(name)) == 1


@pytest.mark.parametrize(("uri", "tries"), [("http://127.0.0.1:9", 3), ("localhost:9", 1)])
def test_only_a_server_that_does_not_answer_is_tried_again(tmp_path, monkeypatch, uri, tries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tried = []
    monkeypatch.setattr("flows.register.lineage", lambda *_: tried.append(1) or {"dvc_lock_sha256": "x"})

    @flow
    def registering():
        register_model.with_options(retry_delay_seconds=0)(Revision("x", "x", "x"), tmp_path, None)

    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI"):
        registering()
    assert len(tried) == tries


def test_a_deleted_experiment_is_refused_before_the_training(checkout, caplog):
    client = connect()
    number = client.get_experiment_by_name(MODEL).experiment_id
    before = git(checkout, "for-each-ref", "refs/exps")
    client.delete_experiment(number)
    try:
        with pytest.raises(PipelineError, match=f"mlflow experiments restore --experiment-id {number}"):
            train(TINY)
    finally:
        client.restore_experiment(number)
    assert git(checkout, "for-each-ref", "refs/exps") == before
    assert "Running stage" not in caplog.text


@pytest.mark.parametrize("text", [r"a\b", r"it's", r"back\'s", "end\\", 'say "x"', "a=b, c: {d}", "[1]"])
def test_text_reaches_params_as_it_was_written(text):
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    assert parser.parse_override(f"fetch.url={_hydra('fetch.url', text)}").value() == text


def test_what_dvc_would_replace_is_refused():
    with pytest.raises(PipelineError, match=r"fetch\.url: .* holds \$\{"):
        _hydra("fetch.url", "a${b}")


def test_a_training_holds_the_slot_of_its_server(checkout):
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu", limit=1))
        try:
            with _gpu_slot():
                assert client.read_global_concurrency_limit_by_name("gpu").active_slots == 1
            assert client.read_global_concurrency_limit_by_name("gpu").active_slots == 0
        finally:
            client.delete_global_concurrency_limit_by_name("gpu")


def register_without_waiting():
    from flows.register import register_model

    return register_model.with_options(retries=0)


@pytest.mark.slow
def test_killed_in_an_epoch_nothing_is_left_behind_and_the_next_run_goes_on(checkout, caplog):
    count = len(versions())
    changes = {"train.epochs": 20, "train.lr": 0.0003}
    flow = start(checkout, "epoch 2/20", **changes)
    assert temporary_servers(checkout)
    # Prefect's password is not for what DVC runs
    assert not any(CLIENT in stage.environ() for stage in stage_processes(checkout))
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    deadline = time.monotonic() + 15
    while stage_processes(checkout) + temporary_servers(checkout) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert stage_processes(checkout) == temporary_servers(checkout) == []
    result = train(TINY | changes)
    assert "going on from the last finished epoch" in caplog.text
    assert "epoch 2/20" not in caplog.text
    assert "epoch 20/20" in caplog.text
    assert len(versions()) == count + 1
    history = (Path(result["folder"]) / "reports/training/history.csv").read_text().splitlines()
    assert len(history) == 21
    run_id = connect().get_model_version(MODEL, result["version"]).run_id
    points = connect().get_metric_history(run_id, "val_miou")  # those of before the kill, too
    assert [point.step for point in points] == list(range(1, 21))


@pytest.mark.slow
def test_the_same_training_twice_at_once_is_refused_and_another_goes_beside_it(checkout):
    flow = start(checkout, "epoch 1/400", **{"train.epochs": 400})
    try:
        with pytest.raises(PipelineError, match="is training exactly this already"):
            train(TINY | {"train.epochs": 400})
        assert train(TINY | {"train.epochs": 1})["version"]
        assert flow.poll() is None
    finally:
        flow.terminate()
        flow.wait(30)
    assert stage_processes(checkout) == []


BARE = """
import sys
from pathlib import Path
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/voc-segmentation/1")
photos = sorted(Path(sys.argv[1]).glob("val_*.jpg"))
frame = pd.DataFrame({"image": [photo.read_bytes() for photo in photos]})
for photo, mask in zip(photos, model.predict(frame)["mask"], strict=True):
    Path(sys.argv[2], f"{photo.stem}.png").write_bytes(mask)
"""


def closure(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for these, by the metadata of those installed here."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(line) for line in distribution(name).requires or []]
    return found


@pytest.mark.slow
def test_the_registered_model_predicts_the_evaluated_masks_with_its_own_requirements(checkout, trained, tmp_path):
    raw = VocFolder(tmp_path / "raw")
    draw_sample(raw.root, TINY["fetch.limit"])
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}/1"))
    bare, masks = tmp_path / "bare", tmp_path / "masks"  # `bare`: what pip would install for the model, nothing else
    bare.mkdir()
    masks.mkdir()
    for name in closure((model / "requirements.txt").read_text().split()):
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top != ".." and not (bare / top).exists():
                (bare / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    assert (bare / "torch").exists()
    assert not (bare / "prefect").exists()
    env = environment() | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/mlruns/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": str(bare),
    }
    command = [sys.executable, "-S", "-c", BARE, str(raw.photo("val_001").parent), str(masks)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)

    folder = Path(trained[1]["folder"])
    with np.load(folder / "reports/evaluation/per_image_confusion.npz") as evaluated:
        assert len(evaluated["ids"]) == TINY["fetch.limit"]
        for identifier, confusion in zip(evaluated["ids"], evaluated["confusion"], strict=True):
            pair = (read_mask(masks / f"{identifier}.png"), read_mask(raw.mask(identifier)))
            predicted, truth = (torch.tensor(labels)[None] for labels in pair)
            assert np.array_equal(confusion_matrices(predicted, truth, len(CLASSES))[0], confusion)
    photo, predicted = Image.open(raw.photo("val_001")), read_mask(masks / "val_001.png")
    assert np.array_equal(predicted, Predictor.load(folder / "models", Augmentation(flip=True)).mask(photo))
    assert not np.array_equal(predicted, Predictor.load(folder / "models").mask(photo))


def test_no_code_of_the_registered_model_is_pickled(checkout):
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}/1"))
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert kinds <= {"", ".py", ".html", ".json", ".safetensors", ".yaml", ".yml", ".txt"}
