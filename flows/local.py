"""Running a flow by hand, without a Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)

from flows.password import new_password
from segmentation.errors import PipelineError


@contextmanager
def by_hand() -> Iterator[None]:
    """Within, flows run against a temporary in-process API, whatever server `prefect.toml` names.

    An error that the user can mend ends the process with its message.
    """
    # in a session of its own: what ends this process's group must not end it first
    subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reaper.py")), str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    # of its own: what `.env` or the environment has may be another server's, or half filled in
    password = new_password()
    settings = {
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        "server.api.auth_string": password,
        "api.auth_string": password,
    }
    with temporary_settings(settings, restore_defaults={PREFECT_API_URL}):
        try:
            _start_server()
            yield
        except PipelineError as error:
            sys.exit(f"error: {error}")


def _start_server() -> None:
    """Start the temporary server that the flow will use: one at a time, for two that make the database disturb it.

    Raises:
        PipelineError: it does not start.
    """
    home = PREFECT_HOME.value()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "start.lock"), get_client(sync_client=True):
            pass
    except OSError as error:
        raise PipelineError(
            f"PREFECT_HOME: {home} cannot be written: {error.strerror or error}; "
            "set it to a folder that you can write, or unset it"
        ) from None
    except RuntimeError as error:
        raise PipelineError(
            f"Prefect's temporary server does not start, with its database in {home}: {error}"
        ) from None
