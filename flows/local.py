"""Running a flow by hand, without a Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

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
            yield
        except PipelineError as error:
            sys.exit(f"error: {error}")
