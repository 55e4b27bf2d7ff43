"""The flows, in a checkout that trained a version."""

import json
import re
import shutil
import time
from pathlib import Path

import mlflow
import pytest
from prefect.client.orchestration import get_client
from safetensors.torch import load_file, save_file

from flows import promote as promotion
from flows.promote import promote
from flows.rollback import rollback
from segmentation import progress
from segmentation.errors import PipelineError
from segmentation.files import sha256_file, write_json
from segmentation.registry import aliases as registry_aliases
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.register import register

KEY = "promotion-decision"


@pytest.fixture(scope="module")
def better(trained, tmp_path_factory) -> Path:
    """The trained run with a model that sees background everywhere: two epochs on four photos know less."""
    folder = tmp_path_factory.mktemp("better") / "run"
    shutil.copytree(trained[1]["folder"], folder)
    weights = folder / "models/segmenter.safetensors"
    tensors = load_file(weights)
    tensors["decoder.head.weight"] *= 0
    tensors["decoder.head.bias"] *= 0
    save_file(tensors, weights)
    card = json.loads((folder / "models/segmenter.json").read_text())
    write_json(folder / "models/segmenter.json", card | {"weights_sha256": sha256_file(weights)})
    return folder


@pytest.fixture
def two_versions(checkout, better, monkeypatch) -> Path:
    """A checkout with the trained version 1, and version 2, which is the champion and the challenger."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{checkout}/mlruns/mlflow.db")
    client = connect()
    tags = client.get_model_version(MODEL_NAME, "1").tags
    assert register(better, tags | {"experiment": "better", "dvc_lock_sha256": "better"}).version == "2"
    client.set_registered_model_alias(MODEL_NAME, "champion", "2")
    return checkout


def aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in connect().get_registered_model(MODEL_NAME).aliases.items()}


def records(version: str, kind: str) -> list[dict]:
    """What lies on a version's run, oldest first."""
    run = connect().get_model_version(MODEL_NAME, version).run_id
    found = sorted(file.path for file in connect().list_artifacts(run, "promotion") if f"/{kind}-" in file.path)
    return [json.loads(mlflow.artifacts.load_text(f"runs:/{run}/{path}")) for path in found]


def artifact(key: str) -> str:
    with get_client(sync_client=True) as client:
        return client.request("GET", "/artifacts/{key}/latest", path_params={"key": key}).json()["data"]


def test_a_worse_model_is_refused_with_a_status_of_its_own(two_versions, capsys):
    assert not (two_versions / "data/raw").exists()  # the photos come from the run's commit
    with pytest.raises(SystemExit) as ended:
        promotion.main("1", None)
    assert ended.value.code == 3
    assert f"Refused: models:/{MODEL_NAME}/1\n  gain: mIoU" in capsys.readouterr().out
    assert aliases() == {"challenger": "2", "champion": "2"}
    (decision,) = records("1", "decision")
    assert (decision["verdict"], decision["candidate"]["version"], decision["photos"]) == ("refuse", "1", 4)
    folder = two_versions / "runs" / decision["candidate"]["experiment"]
    metrics = json.loads((folder / "reports/evaluation/metrics.json").read_text())
    assert decision["scores"]["candidate"]["miou"] == metrics["miou"]


def run_log(state) -> list[str]:
    wanted = {"logs": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}, "sort": "TIMESTAMP_ASC"}
    lines: list[str] = []
    with get_client(sync_client=True) as client:
        while True:
            page = client.request("POST", "/logs/filter", json=wanted | {"limit": 200, "offset": len(lines)}).json()
            lines += [entry["message"] for entry in page]
            if len(page) < 200:
                return lines


@pytest.mark.slow
def test_how_far_the_measuring_is_lands_in_the_runs_log(two_versions, monkeypatch, capfd):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    state = promote("1", return_state=True)
    deadline = time.monotonic() + 60  # Prefect sends what is logged every few seconds
    lines = run_log(state)
    while not any(line.startswith("refuse, version 1") for line in lines) and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = run_log(state)
    for pattern in (
        r"promote: score: [0-4] of 4 photos \(\d+%\), .+",
        r"promote: reload the model and predict again: \d+ s so far",
    ):
        assert any(re.fullmatch(pattern, line) for line in lines), lines
    assert "promote: score" not in capfd.readouterr().out  # the log has them, and nothing else


def test_force_promotes_on_record_and_rollback_returns(two_versions, monkeypatch):
    move, seen = registry_aliases.move, {}

    def watched(version, expected, why):
        seen.update(aliases=aliases(), record=json.loads(mlflow.artifacts.load_text(why)), shown=artifact(KEY))
        return move(version, expected, why)

    monkeypatch.setattr(registry_aliases, "move", watched)
    state = promote("1", "to see\n\n# it | fail", return_state=True)
    assert (state.name, state.type.value) == ("Promoted", "COMPLETED")
    assert aliases() == {"challenger": "2", "champion": "1", "previous": "2"}
    decision = records("1", "decision")[-1]
    assert (decision["verdict"], decision["force_reason"]) == ("promote", "to see # it | fail")
    assert decision["aliases"]["champion"] == seen["aliases"]["champion"] == "2"  # written and shown before it moved
    assert seen["record"] == decision
    # what a person wrote cannot change the page
    title = "# promote: version 1 against champion version 2"
    assert seen["shown"].startswith(f"{title}\n\n- forced: to see \\# it \\| fail\n- gain: ")

    state = rollback("it\r\n<b>failed", return_state=True)
    assert state.name == "Rolled back"
    assert aliases() == {"challenger": "2", "champion": "2", "previous": "1"}
    (record,) = records("1", "rollback")
    assert (record["reason"], record["from"], record["to"]) == ("it <b>failed", "1", "2")
    assert record["aliases"] == {"challenger": "2", "champion": "1", "previous": "2"}
    assert "\n\nit \\<b\\>failed\n\n" in artifact("rollback")


def test_the_champion_stays_as_it_is(two_versions):
    state = promote(return_state=True)
    assert (state.name, state.result()["branch"]) == ("Unchanged", "already champion")
    assert records("2", "decision")[-1]["verdict"] == "keep"


def test_an_override_without_a_reason_or_anywhere_to_go_is_refused(two_versions):
    with pytest.raises(PipelineError, match="force_reason: is empty"):
        promote(force_reason="  ")
    with pytest.raises(PipelineError, match="reason: is empty"):
        rollback("")
    with pytest.raises(PipelineError, match=r"reason: holds the control character U\+001B; write it without"):
        rollback("\x1b[2J")
    client = connect()
    client.set_registered_model_alias(MODEL_NAME, "previous", "2")
    with pytest.raises(PipelineError, match="is the champion itself, so there is nothing to return to"):
        rollback("why not")
    client.delete_registered_model_alias(MODEL_NAME, "previous")
    with pytest.raises(PipelineError, match="no version has this alias"):
        rollback("why not")
