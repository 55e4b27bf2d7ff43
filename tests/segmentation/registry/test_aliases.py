import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from segmentation.errors import PipelineError
from segmentation.registry import aliases
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.register import start_run

WRITES = ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias")


class Killed(BaseException):
    """What no `except Exception` catches."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    """A real store with five versions of nothing, and an empty registry made before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("store"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
        found = connect()
        with pytest.raises(PipelineError, match="has no model"):
            aliases.read()
        found.create_registered_model(MODEL_NAME)
        for number in range(5):
            found.create_model_version(MODEL_NAME, "file:///nowhere", run_id=start_run(f"run {number}"))
        yield found


@pytest.fixture(autouse=True)
def cleared(client: MlflowClient) -> None:
    model = client.get_registered_model(MODEL_NAME)
    for alias in model.aliases:
        client.delete_registered_model_alias(MODEL_NAME, alias)
    for key in model.tags:
        client.delete_registered_model_tag(MODEL_NAME, key)


def put(client: MlflowClient, **held: str) -> None:
    for alias, version in held.items():
        client.set_registered_model_alias(MODEL_NAME, alias, version)


def stored(client: MlflowClient) -> dict[str, str]:
    """The aliases as they lie there; each must be on a version."""
    found = {alias: str(version) for alias, version in client.get_registered_model(MODEL_NAME).aliases.items()}
    for version in found.values():
        client.get_model_version(MODEL_NAME, version)
    return found


def kill_at(patch: pytest.MonkeyPatch, step: int, after: bool) -> None:
    """The write of this number to the registry is the last thing that happens, or does not happen any more."""
    count = itertools.count()

    def wrap(name):
        write = getattr(MlflowClient, name)

        def writing(*args, **kwargs):
            number = next(count)
            if number == step and not after:
                raise Killed
            write(*args, **kwargs)
            if number == step:
                raise Killed

        return writing

    for name in WRITES:
        patch.setattr(MlflowClient, name, wrap(name))


START = [
    {"champion": "1", "previous": "2", "challenger": "3"},
    {"champion": "1", "challenger": "3"},
    {"challenger": "3"},
    {"previous": "2", "challenger": "3"},
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("start", START, ids=lambda held: "+".join(held))
def test_killed_at_any_write_the_aliases_are_valid_and_a_second_run_completes(client, monkeypatch, start, step, after):
    put(client, **start)
    champion = start.get("champion")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step, after)
        aliases.move("3", champion, "why")
        raise Killed  # a move without a champion has a write less
    left = stored(client)
    assert left["champion" if champion else "challenger"] in {"1", "3"}
    if left.get("champion") == "3":
        assert left == start | {"champion": "3"} | ({"previous": "1"} if champion else {})
        return
    assert aliases.read() == start == stored(client)  # nothing was promoted, and nothing is lost
    assert aliases.move("3", champion, "why") == stored(client)
    assert stored(client) == start | {"champion": "3"} | ({"previous": "1"} if champion else {})


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(3))
def test_a_rollback_that_is_killed_comes_to_its_end_by_a_second_one(client, monkeypatch, step, after):
    put(client, champion="1", previous="2", challenger="3")
    aliases.move("3", "1", "promotion")
    assert stored(client) == {"champion": "3", "previous": "1", "challenger": "3"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step, after)
        aliases.move("1", "3", "rollback")
    held = aliases.read()
    if held["champion"] == "3":
        assert held["previous"] == "1"
        aliases.move("1", "3", "rollback")
    assert stored(client) == {"champion": "1", "previous": "3", "challenger": "3"}


@pytest.mark.parametrize("step", range(2))
def test_the_repair_may_be_killed_too(client, monkeypatch, step):
    put(client, champion="1", previous="2", challenger="3")
    for k in (1, 0):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, k, after=bool(step))
            aliases.move("3", "1", "why")
    assert aliases.read() == {"champion": "1", "previous": "2", "challenger": "3"} == stored(client)


def test_a_champion_that_a_person_moved_meanwhile_stands(client):
    put(client, champion="1", previous="2", challenger="3")
    put(client, champion="4")
    with pytest.raises(PipelineError, match="version 4 by now, no longer version 1"):
        aliases.move("3", "1", "why")
    assert stored(client) == {"champion": "4", "previous": "2", "challenger": "3"}
    assert "last_move" not in client.get_registered_model(MODEL_NAME).tags


def test_a_promotion_that_a_person_takes_back_by_hand_stays_taken_back(client):
    put(client, champion="1", previous="2", challenger="3")
    aliases.move("3", "1", "why")
    put(client, champion="1")
    assert aliases.read() == {"champion": "1", "previous": "2", "challenger": "3"}
    put(client, champion="5")
    assert aliases.read()["champion"] == "5"


def test_after_a_half_move_a_person_moves_the_champion(client, monkeypatch):
    put(client, champion="1", previous="2", challenger="3")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1, after=True)
        aliases.move("3", "1", "why")
    put(client, champion="4")
    assert aliases.read() == {"champion": "4", "previous": "1", "challenger": "3"} == stored(client)


def test_a_previous_that_was_deleted_meanwhile_is_not_brought_back(client, monkeypatch):
    doomed = str(client.create_model_version(MODEL_NAME, "file:///nowhere").version)
    put(client, champion="1", previous=doomed, challenger="3")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1, after=True)
        aliases.move("3", "1", "why")
    client.delete_model_version(MODEL_NAME, doomed)
    assert aliases.read() == {"champion": "1", "challenger": "3"} == stored(client)


def test_of_two_moves_at_once_one_wins_and_the_other_says_so(client):
    put(client, champion="1", challenger="3")
    outcomes: list[dict[str, str] | PipelineError] = []
    barrier = threading.Barrier(2)

    def go(version: str) -> None:
        barrier.wait()
        try:
            outcomes.append(aliases.move(version, "1", "why"))
        except PipelineError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=go, args=(version,)) for version in ("3", "4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = (outcome for outcome in outcomes if isinstance(outcome, dict))
    (lost,) = (outcome for outcome in outcomes if isinstance(outcome, PipelineError))
    assert won == stored(client)
    assert won["previous"] == "1"
    assert f"version {won['champion']} by now, no longer version 1" in str(lost)


def test_a_record_lies_on_the_run_and_says_who_and_when(client):
    content = aliases.stamp() | {"verdict": "refuse"}
    uri = aliases.record("2", "decision", content)
    assert uri.startswith(f"runs:/{client.get_model_version(MODEL_NAME, '2').run_id}/promotion/decision-2")
    assert json.loads(mlflow.artifacts.load_text(uri)) == content
    assert "@" in content["by"]
    assert content["at"].endswith("+00:00")
    assert aliases.record("2", "decision", content) == uri


def test_a_tracking_server_that_is_away_is_one_message(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match="does not answer"):
        aliases.read()
