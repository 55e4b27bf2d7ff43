"""The registered model's aliases, moved here alone, so that a kill between any two requests leaves each on a version.

`champion` is served, `previous` is what a rollback returns to, `challenger` is the newest version.
MLflow keeps no history of aliases, so whoever moves them writes down why first (`record`), on the run of a version.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient

from segmentation.errors import PipelineError
from segmentation.paths import scratch
from segmentation.registry.client import MODEL_NAME, answering, connect
from segmentation.registry.store import shown, tracking_uri

LAST_MOVE = "last_move"


def read() -> dict[str, str]:
    """The version that each alias is on, once what an interrupted `move` left is put right.

    Raises:
        PipelineError: there is no registered model, or the tracking server does not answer.
    """
    client = connect()
    with _lock(), answering():
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            raise PipelineError(
                f"{shown(tracking_uri())} has no model {MODEL_NAME}; `python -m flows.train` registers one"
            )
        return _settled(client)


def stamp() -> dict[str, str]:
    """When and by whom: for a record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        user = str(os.getuid())
    return {"at": datetime.now(UTC).isoformat(timespec="microseconds"), "by": f"{user}@{socket.gethostname()}"}


def record(version: str, kind: str, content: Mapping[str, Any]) -> str:
    """Write why aliases move, or do not, as JSON to the run of a version; returns the artifact's URI.

    Args:
        version: the number of the version that it is about.
        kind: "decision" or "rollback".
        content: with the keys of `stamp`; the same content again replaces its file.

    Raises:
        PipelineError: the tracking server does not answer.
    """
    path = f"promotion/{kind}-{datetime.fromisoformat(content['at']):%Y%m%dT%H%M%S.%fZ}.json"
    client = connect()
    with answering():
        run_id = client.get_model_version(MODEL_NAME, version).run_id
        assert run_id is not None
        client.log_dict(run_id, dict(content), path)
    return f"runs:/{run_id}/{path}"


def move(champion: str, expected: str | None, why: str) -> dict[str, str]:
    """Make a version the champion, and `previous` the champion before it; returns where all aliases are.

    First the model's tag `last_move` says what the aliases were and will be, then `previous` moves, then `champion`:
    that one request is the promotion. Who is killed before it has promoted nothing, and the next `read` or `move` takes
    `previous` back to where the tag says it was.

    Moves and registrations from one checkout wait for each other. MLflow cannot move an alias on a condition, so
    between machines only the second look at `champion`, right before, holds two moves apart.

    Args:
        champion: the version's number.
        expected: the champion that the decision was about, `None` for none.
        why: the record's URI.

    Raises:
        PipelineError: the champion is another one by now, or the tracking server does not answer.
    """
    client = connect()
    with _lock(), answering():
        before = _settled(client)
        if before.get("champion") != expected:
            raise PipelineError(
                f"models:/{MODEL_NAME}@champion: {_named(before.get('champion'))} by now, no longer {_named(expected)} "
                "as when this was decided; nothing was moved, run it again to decide anew"
            )
        after = before | {"champion": champion} | ({"previous": expected} if expected else {})
        note = {"before": before, "after": after, "why": why}
        client.set_registered_model_tag(MODEL_NAME, LAST_MOVE, json.dumps(note))
        if expected:
            client.set_registered_model_alias(MODEL_NAME, "previous", expected)
        client.set_registered_model_alias(MODEL_NAME, "champion", champion)
        return after


def after_registration(version: str) -> tuple[str, ...]:
    """`challenger` to the newest version, and `champion` to this one only where no version has it.

    Waits for a `move` of the same checkout, and a `move` waits for it: a champion promoted meanwhile is seen and stays.

    Args:
        version: the number of the version that was registered.

    Returns:
        The aliases that are on it now.

    Raises:
        PipelineError: the tracking server does not answer, or refuses.
    """
    client = connect()
    with _lock(), answering():
        held = _settled(client)
        newest = "challenger" not in held or int(version) > int(held["challenger"])
        for alias, wanted in (("challenger", newest), ("champion", "champion" not in held)):
            if wanted:
                client.set_registered_model_alias(MODEL_NAME, alias, version)
                held[alias] = version
        return tuple(sorted(alias for alias, holder in held.items() if holder == version))


def _settled(client: MlflowClient) -> dict[str, str]:
    """The aliases; with `previous` back where it was, if the last move was cut off before `champion` moved."""
    model = client.get_registered_model(MODEL_NAME)
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    if LAST_MOVE not in model.tags:
        return aliases
    last = json.loads(model.tags[LAST_MOVE])
    before, after = last["before"], last["after"]
    halfway = before | {"previous": after.get("previous")}
    if any(aliases.get(alias) != halfway.get(alias) for alias in ("champion", "previous")) or halfway == before:
        return aliases
    was = before.get("previous")
    if any(str(found.version) == was for found in client.search_model_versions(f"name = '{MODEL_NAME}'")):
        client.set_registered_model_alias(MODEL_NAME, "previous", was)
        return aliases | {"previous": was}
    client.delete_registered_model_alias(MODEL_NAME, "previous")
    return {alias: version for alias, version in aliases.items() if alias != "previous"}


def _lock() -> FileLock:
    path = scratch() / "aliases.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _named(version: str | None) -> str:
    return f"version {version}" if version else "no version"
