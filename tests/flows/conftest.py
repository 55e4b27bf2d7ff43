import os
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path

import pytest
from filelock import FileLock
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_SERVER_API_AUTH_STRING, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.train import train
from tests.conftest import TINY


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory) -> Iterator[None]:
    # without a password, whatever the environment or the `.env` of a user's checkout has
    passwords = {PREFECT_SERVER_API_AUTH_STRING, PREFECT_API_AUTH_STRING}
    for password in passwords:
        os.environ.pop(password.name, None)
    with temporary_settings(restore_defaults=passwords), ExitStack() as stack:
        with chdir(tmp_path_factory.mktemp("server")):
            stack.enter_context(prefect_test_harness(server_startup_timeout=90))
        yield


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory, worker_id) -> Path:
    """DVC's cache of all test processes: what one of them has trained, the others take from it."""
    folder = tmp_path_factory.getbasetemp()
    return (folder if worker_id == "master" else folder.parent) / "dvc-cache"


@pytest.fixture(scope="session")
def cached_checkout(new_checkout, shared_cache):
    """Makes checkouts with that cache."""

    def make() -> Path:
        checkout = new_checkout()
        (checkout / ".dvc/config.local").write_text(f"[cache]\n    dir = {shared_cache}\n")
        return checkout

    return make


@pytest.fixture(scope="module")
def trained(prefect_server, cached_checkout, shared_cache) -> tuple[Path, dict]:
    """A checkout in which flow `train` has run once, and what it returned; each file's own, for it counts versions."""
    checkout = cached_checkout()
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{shared_cache}.lock"):
        patch.chdir(checkout)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it to the store that it used last
        return checkout, train(TINY)


@pytest.fixture
def checkout(trained, monkeypatch) -> Path:
    """That checkout, as the current folder."""
    monkeypatch.chdir(trained[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return trained[0]
