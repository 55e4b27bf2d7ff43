"""What the server does when the champion moves, cannot be loaded, cannot be asked for, or is not there."""

import math
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import requests

from benchmarks.serving import register_random
from segmentation.errors import PipelineError
from segmentation.model import segmenter as model_files
from segmentation.prediction.predictor import Predictor
from segmentation.registry.client import MODEL_NAME, connect
from serving.__main__ import bind
from serving.champion import Champion
from serving.worker import Worker
from tests.serving.conftest import CARD, Server, mask_png, photo


def health(server) -> dict:
    answer = requests.get(f"{server.url}/healthz", timeout=5)
    assert answer.status_code == 200
    return answer.json()


def await_health(server, status: str) -> dict:
    deadline = time.monotonic() + 40
    while (said := health(server))["status"] != status:
        assert time.monotonic() < deadline, server.text()
        time.sleep(0.2)
    return said


def test_the_champion_is_followed_and_no_request_is_dropped(store, server):
    bodies = [photo(91, 64, seed) for seed in range(4)]
    expected = {version: [mask_png(store.predictor(version), body) for body in bodies] for version in ("1", "2")}
    assert expected["1"] != expected["2"]
    stop, seen, wrong = threading.Event(), [], []

    def client(at: int) -> None:
        while not stop.is_set():
            answer = server.segment(bodies[at])
            version = answer.headers.get("Model-Version")
            seen.append(version)
            if answer.status_code != 200 or answer.content != expected[version][at]:
                wrong.append(answer)

    clients = [threading.Thread(target=client, args=(at,)) for at in range(4)]
    for thread in clients:
        thread.start()
    try:
        for version in ("2", "1"):
            store.crown(version)
            server.await_version(version)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert wrong == []
    assert {"1", "2"} == set(seen)
    assert server.segment(bodies[0]).headers["Model-Version"] == "1"
    assert "version 2 replaces 1" in server.text()


def test_tags_and_aliases_of_the_champion_are_those_of_now(store, server):
    store.client.set_model_version_tag(MODEL_NAME, "1", "looked_at", "yes")
    deadline = time.monotonic() + 20
    while "looked_at" not in (tags := requests.get(f"{server.url}/model", timeout=5).json()["tags"]):
        assert time.monotonic() < deadline, tags
        time.sleep(0.2)


def test_a_champion_without_finite_logits_is_not_taken(store, server, tmp_path):
    body = photo(91, 64, 1)
    with store.here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_files, "_require_finite", lambda *_: None)  # as another program would write it
        broken = register_random(tmp_path, CARD, 3, scale=math.nan)
    try:
        store.crown(broken)
        said = await_health(server, "degraded")
        assert said["detail"] == f"version {broken}, the champion, cannot be served"
        answer = server.segment(body)
        assert answer.headers["Model-Version"] == "1"
        assert answer.content == mask_png(store.predictor("1"), body)
    finally:
        store.crown("1")
    assert await_health(server, "ok")["detail"] is None
    (line,) = [line for line in server.text().splitlines() if f"version {broken}" in line]  # not at every look
    assert "not finite" in line
    assert "Traceback" not in server.text()


def test_without_mlflow_the_loaded_model_is_served(store, server):
    body = photo(91, 64, 1)
    database = sqlite3.connect(store.folder / "mlflow.db")
    database.execute("ALTER TABLE registered_model_aliases RENAME TO away")
    try:
        said = await_health(server, "degraded")
        assert said["detail"] == "the champion cannot be looked up"
        assert server.segment(body).content == mask_png(store.predictor("1"), body)
    finally:
        database.execute("ALTER TABLE away RENAME TO registered_model_aliases")
        database.close()
    await_health(server, "ok")
    assert "still serving version 1" in server.text()
    assert "no such table: registered_model_aliases" in server.text()


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """A store of its own with version 1, the champion."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    register_random(tmp_path / "first", CARD, 1)
    return connect()


def test_a_champion_without_its_files_is_named_with_the_file(own_store):
    stored = own_store.get_model_version_download_uri(MODEL_NAME, "1")
    weights = f"{stored}/artifacts/models/segmenter.safetensors"
    Path(weights.removeprefix("file://")).unlink()
    with pytest.raises(PipelineError) as error:
        Champion(Worker().check)
    assert str(error.value) == (
        f"models:/{MODEL_NAME}/1, the champion, cannot be served ({weights}: not found; put its files back, or use "
        "another version); move the alias to a version that can be"
    )


def test_a_registered_model_made_anew_is_followed_though_its_version_has_the_old_number(own_store, tmp_path):
    champion, body = Champion(Worker().check), photo(91, 64, 1)
    first = mask_png(champion.served.predictor, body)
    own_store.delete_registered_model(MODEL_NAME)
    assert register_random(tmp_path / "second", CARD, 2) == "1"
    champion._look()
    assert champion.trouble is None
    assert mask_png(champion.served.predictor, body) != first
    expected = mask_png(Predictor.load(tmp_path / "second/models"), body)
    assert mask_png(champion.served.predictor, body) == expected


@pytest.mark.slow
def test_without_a_champion_the_server_ends_and_says_what_to_do(store, server):
    store.client.delete_registered_model_alias(MODEL_NAME, "champion")
    try:
        said = await_health(server, "degraded")  # one that runs goes on
        assert "champion" in said["detail"]
        late = Server(store)
        assert late.process.wait(timeout=60) == 1
    finally:
        store.crown("1")
    (error,) = [line for line in late.text().splitlines() if line.startswith("error:")]
    assert "champion" in error
    assert "python -m flows.train" in error
    assert "Traceback" not in late.text()


@pytest.mark.slow
def test_an_address_that_cannot_be_had_is_refused_before_the_model_is_loaded(store, server):
    other = Server(store, "--port", str(server.port))
    assert other.process.wait(timeout=60) == 1
    (error,) = other.text().splitlines()
    assert error.startswith(f"error: 127.0.0.1:{server.port} ")
    assert error.endswith("choose another --port or --host")


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 8000), ("127.0.0.1", 70000), ("127.0.0.1", -1), ("no host", 1)]
)
def test_no_address_of_this_machine_is_refused(host, port):
    with pytest.raises(PipelineError, match="cannot be listened on"):
        bind(host, port)
