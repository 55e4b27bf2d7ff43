import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from prefect.testing.utilities import prefect_test_harness

from flows.train import train
from tests.conftest import TINY


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=90):
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


@pytest.fixture(scope="session")
def trained(prefect_server, cached_checkout, shared_cache) -> tuple[Path, dict]:
    """A checkout in which flow `train` has run once, and what it returned."""
    checkout = cached_checkout()
    before = Path.cwd()
    os.chdir(checkout)
    try:
        with FileLock(f"{shared_cache}.lock"):
            return checkout, train(TINY)
    finally:
        os.chdir(before)


@pytest.fixture
def checkout(trained, monkeypatch) -> Path:
    """That checkout, as the current folder."""
    monkeypatch.chdir(trained[0])
    return trained[0]
