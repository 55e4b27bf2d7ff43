"""`dvc repro` by hand, in a real DVC repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from segmentation.data.sample import draw_sample
from segmentation.data.voc import VocFolder
from tests.conftest import TINY, environment, git

DVC = (sys.executable, "-m", "dvc")


def dvc(checkout: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DVC, *arguments], cwd=checkout, env=env or environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


def set_params(checkout: Path, changes: dict) -> None:
    yaml, file = YAML(), checkout / "params.yaml"
    params = yaml.load(file.read_text())
    for key, value in changes.items():
        section, name = key.split(".")
        params[section][name] = value
    with file.open("w") as stream:
        yaml.dump(params, stream)


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def reproduced(new_checkout) -> Path:
    """A checkout in which `dvc repro` has run once."""
    checkout = new_checkout()
    set_params(checkout, TINY | {"train.keep": "last"})  # a better last epoch is not certain, another one is
    done = dvc(checkout, "repro")
    assert done.returncode == 0, done.stdout
    assert ran(done.stdout) == ["source", "fetch", "preprocess", "validate", "encode", "train", "evaluate"]
    return checkout


def test_every_declared_output_is_written(reproduced):
    metrics = json.loads((reproduced / "reports/evaluation/metrics.json").read_text())
    assert metrics["photos"] == 4
    assert 0 <= metrics["miou"] <= 1
    checks = json.loads((reproduced / "reports/data_checks.json").read_text())
    assert checks["result"] == "passed with warnings"  # four photos do not show all 21 classes
    assert [rule["rule"] for rule in checks["rules"] if not rule["passed"]] == ["classes_in_train"]
    assert git(reproduced, "status", "--porcelain").split() == ["M", "params.yaml", "??", "dvc.lock"]


def test_a_second_repro_does_nothing(reproduced):
    again = dvc(reproduced, "repro")
    assert ran(again.stdout) == ["source"]  # it looks whether there are other photos


def test_a_readme_edit_reruns_nothing(reproduced):
    (reproduced / "README.md").write_text("edited")
    assert dvc(reproduced, "status").stdout.split() == ["source:", "always", "changed"]


@pytest.mark.slow
def test_more_epochs_rerun_train_and_evaluate_alone(reproduced):
    set_params(reproduced, {"train.epochs": 3})
    assert ran(dvc(reproduced, "repro").stdout) == ["source", "train", "evaluate"]
    history = (reproduced / "reports/training/history.csv").read_text().splitlines()
    assert len(history) == 4


def test_metrics_and_plots_are_declared(reproduced):
    assert "miou" in dvc(reproduced, "metrics", "show").stdout
    assert "history.csv" in dvc(reproduced, "plots", "show", "--show-vega", "reports/training/history.csv").stdout


@pytest.mark.slow
def test_changed_photos_of_ones_own_are_fetched_anew(new_checkout, tmp_path):
    checkout, folder = new_checkout(), VocFolder(tmp_path / "own")
    draw_sample(folder.root, 2)
    set_params(checkout, TINY | {"fetch.source": "directory", "fetch.directory": str(folder.root)})
    assert ran(dvc(checkout, "repro", "fetch").stdout) == ["source", "fetch"]
    assert ran(dvc(checkout, "repro", "fetch").stdout) == ["source"]
    folder.mask("val_001").write_bytes(folder.mask("val_002").read_bytes())
    assert ran(dvc(checkout, "repro", "fetch").stdout) == ["source", "fetch"]
    assert VocFolder(checkout / "data/raw").mask("val_001").read_bytes() == folder.mask("val_001").read_bytes()


@pytest.mark.slow
def test_a_wrong_encoder_shows_before_the_data_is_fetched(new_checkout, tmp_path):
    checkout = new_checkout()
    set_params(checkout, TINY | {"fetch.source": "voc2012", "encoder.name": "vit_smal_patch14_dinov2"})
    failed = dvc(checkout, "repro")
    assert "the nearest is vit_small_patch14_dinov2" in failed.stdout
    assert "VOCtrainval" not in failed.stdout


@pytest.mark.slow
def test_masks_are_validated_without_weights(new_checkout, tmp_path):
    checkout, folder = new_checkout(), VocFolder(tmp_path / "own")
    draw_sample(folder.root, 2)
    own = {"fetch.source": "directory", "fetch.directory": str(folder.root), "encoder.pretrained": True}
    set_params(checkout, TINY | own)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "huggingface")}
    done = dvc(checkout, "repro", "validate", env=environment() | nowhere)
    assert done.returncode == 0, done.stdout
    failed = dvc(checkout, "repro", env=environment() | nowhere)
    assert failed.returncode != 0
    assert "the weights of vit_small_patch14_dinov2 cannot be loaded (127.0.0.1:9 does not answer" in failed.stdout
    assert ran(failed.stdout) == ["source", "encode"]


def test_a_refused_setting_stops_the_first_stage(reproduced, new_checkout):
    checkout = new_checkout()
    set_params(checkout, TINY | {"preprocess.image_size": 500, "fetch.source": "sample"})
    failed = dvc(checkout, "repro")
    assert failed.returncode != 0
    assert "preprocess.image_size: 500" in failed.stdout
    assert "nearest valid size is 504" in failed.stdout
    assert not (checkout / "data/raw").exists()


def test_a_folder_of_ones_own_is_looked_for_only_where_it_is_used_and_refused_in_words(new_checkout):
    checkout = new_checkout()
    for unused in (None, 5, "~/nowhere"):
        set_params(checkout, TINY | {"fetch.directory": unused})
        done = dvc(checkout, "repro", "source")
        assert done.returncode == 0, done.stdout
    for used, why in (
        (None, "directory: is not set"),
        (5, "quotes: '5'"),
        ("~/nowhere", f"{Path.home()}/nowhere: no such"),
    ):
        set_params(checkout, TINY | {"fetch.source": "directory", "fetch.directory": used})
        failed = dvc(checkout, "repro")
        assert failed.returncode != 0
        assert why in failed.stdout
        assert "unexpected error" not in failed.stdout
        assert "Traceback" not in failed.stdout


def test_where_python3_is_not_the_environments_the_stage_finds_it(reproduced, tmp_path):
    """`.venv/bin/dvc repro` in a shell in which the environment is not active."""
    system = shutil.which("python3", path="/usr/bin:/bin")
    if system is None:
        pytest.skip("no python3 outside the environment")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(system)
    (reproduced / ".venv/bin").mkdir(parents=True)
    try:
        (reproduced / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (reproduced / ".venv/bin/python").chmod(0o755)
        env = environment() | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        done = dvc(reproduced, "repro", "--force", "--single-item", "preprocess", env=env)
        assert done.returncode == 0, done.stdout
        assert "preprocess: 4 train, 4 val pairs" in done.stdout
    finally:
        shutil.rmtree(reproduced / ".venv")


@pytest.mark.slow
def test_two_repros_in_one_checkout_the_second_says_so(reproduced):
    set_params(reproduced, {"train.epochs": 300})
    with subprocess.Popen(
        [*DVC, "repro"], cwd=reproduced, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as first:
        try:
            for line in first.stdout:
                if line.startswith("epoch 1/"):
                    break
            second = dvc(reproduced, "repro")
            assert second.returncode != 0
            assert str(first.pid) in second.stdout
            assert first.poll() is None
        finally:
            first.send_signal(signal.SIGKILL)
    # The stage notices that its dvc is gone, and the next run takes its place and its checkpoint.
    set_params(reproduced, {"train.epochs": 300})
    deadline = time.monotonic() + 20
    folders = reproduced / "scratch/checkpoints"
    while time.monotonic() < deadline:
        owners = [json.loads(path.read_text())["pid"] for path in folders.glob("*/owner.json")]
        if not any(Path(f"/proc/{pid}").exists() and pid != os.getpid() for pid in owners):
            break
        time.sleep(0.2)
    with subprocess.Popen(
        [*DVC, "repro"], cwd=reproduced, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as third:
        lines = []
        try:
            for line in third.stdout:
                lines.append(line)
                if line.startswith("epoch "):
                    break
        finally:
            third.kill()
    assert any("going on from the last finished epoch" in line for line in lines), "".join(lines)
    assert not any(line.startswith("epoch 1/") for line in lines)


@pytest.mark.parametrize("stage", ["source", "fetch", "preprocess", "validate", "encode", "train", "evaluate"])
def test_help_needs_no_torch(stage, root):
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", "--help"]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "usage" in done.stdout
    assert "stages" in imported
    assert not imported & {"torch", "great_expectations", "pandas", "mlflow", "dvc", "prefect"}
