import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.train import train
from tests.conftest import TINY


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture(scope="session")
def trained(prefect_server, new_checkout) -> tuple[Path, dict]:
    """A checkout in which flow `train` has run once, and what it returned."""
    checkout = new_checkout()
    before = Path.cwd()
    os.chdir(checkout)
    try:
        return checkout, train(TINY)
    finally:
        os.chdir(before)


@pytest.fixture
def checkout(trained, monkeypatch) -> Path:
    """That checkout, as the current folder."""
    monkeypatch.chdir(trained[0])
    return trained[0]
