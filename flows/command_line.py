"""The command lines of flows by hand, read and checked before Prefect is imported: what is wrong shows at once.

Each `python -m flows.<flow>` calls `read` first, then imports what it needs to run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from segmentation.errors import PipelineError
from segmentation.paths import check_checkout, project_root, scratch
from segmentation.registry.store import tracking_uri

T = TypeVar("T")


def read(arguments: Callable[[], T]) -> T:
    """What one of the functions below returns; an error that the user can repair ends the process with its message.

    Prefect's temporary server keeps its database in the checkout, apart from that of the services: no home folder is
    needed, and neither disturbs the other. A `PREFECT_HOME` that is set stays.
    """
    os.environ.setdefault("PREFECT_HOME", str(scratch() / "prefect-by-hand"))
    try:
        found = arguments()
        check_checkout()
        tracking_uri()
        scratch().mkdir(exist_ok=True)  # Prefect makes the last folder of its path alone, and warns where it cannot
        return found
    except PipelineError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {scratch()}: cannot be made ({error.strerror}); run in a checkout that you can write")


def train() -> tuple[dict[str, Any], bool]:
    """The overrides, and whether to run in a copy.

    Raises:
        PipelineError: a deployment, a key or a value is wrong, or git cannot keep the run.
    """
    from flows.experiment import check_repository, check_settings

    parser = argparse.ArgumentParser(
        prog="python -m flows.train",
        description="Train, evaluate and register here and now, without a Prefect server.",
        epilog="With `make services` running: prefect deployment run 'train/voc2012'",
    )
    parser.add_argument("--deployment", metavar="NAME", help="take the parameters of train/NAME in prefect.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of params.yaml")
    parser.add_argument("--in-place", action="store_true", help="run in the checkout, not in a temporary copy")
    arguments = parser.parse_args()
    named = "--set"
    overrides = {}
    if arguments.deployment:
        overrides = _deployment_overrides(arguments.deployment)
        named = f"--set, or train/{arguments.deployment} in prefect.yaml"
    for setting in arguments.set:
        key, value = _setting(setting)
        overrides[key] = value
    check_repository(isolated=not arguments.in_place)
    check_settings(overrides, named)
    return overrides, not arguments.in_place


def register() -> str:
    """The revision to register.

    Raises:
        PipelineError: there is no such revision, or git cannot look.
    """
    from flows.experiment import find_revision

    parser = argparse.ArgumentParser(
        prog="python -m flows.register",
        description="Register a finished run's model in MLflow. A result is registered only once.",
    )
    parser.add_argument("revision", help="an experiment's name (`dvc exp list`) or a git revision, such as HEAD")
    revision = parser.parse_args().revision
    find_revision(revision)
    return revision


def promote() -> tuple[str, str | None]:
    """The version to promote, and the reason to force it.

    Raises:
        PipelineError: a setting is wrong.
    """
    from segmentation.settings import load_settings

    parser = argparse.ArgumentParser(
        prog="python -m flows.promote",
        description="Promote a model version to champion, if the gate lets it.",
        epilog="Exit status: 0 = it is the champion, 3 = refused, 1 = an error. "
        "With `make services` running: prefect deployment run 'promote/champion'",
    )
    parser.add_argument(
        "--version", default="challenger", metavar="N", help="version number or alias (default: challenger, the newest)"
    )
    parser.add_argument("--force", metavar="REASON", help="promote it whatever the comparison says; the reason is kept")
    arguments = parser.parse_args()
    load_settings(project_root() / "params.yaml")
    return arguments.version, arguments.force


def rollback() -> str:
    """The reason for it."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.rollback",
        description="Make the version at `previous` the champion again.",
        epilog="With `make services` running: prefect deployment run 'rollback/champion' --param 'reason=…'",
    )
    parser.add_argument("reason", help="why, for the record")
    return parser.parse_args().reason


def predict() -> argparse.Namespace:
    """`source`, `out`, `version` and `overlays`."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.predict",
        description="Predict the masks of a folder or a list of photos here and now, without a Prefect server.",
    )
    parser.add_argument("source", metavar="FOLDER_OR_LIST", help="a folder, or a text file with one path a line")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: runs/predictions/NAME)")
    parser.add_argument("--version", default="champion", help="an alias or a version number (default: champion)")
    parser.add_argument("--overlays", action="store_true", help="also write each photo with its mask over it")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise PipelineError(f"--set {text}: write it as key=value, for example train.epochs=2")
    try:
        return key, YAML(typ="safe").load(value)
    except YAMLError as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(f"--set {text}: {value!r} is no YAML value: {reason}; quote it") from None


def _deployment_overrides(name: str) -> dict[str, Any]:
    file = project_root() / "prefect.yaml"
    try:
        deployments = YAML(typ="safe").load(file.read_text(encoding="utf-8"))["deployments"]
    except FileNotFoundError:
        raise PipelineError(f"{file}: not found; run from the project's folder") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{file}: not valid YAML: {error}") from None
    known = {entry["name"]: entry for entry in deployments if entry["entrypoint"].startswith("flows/train.py")}
    if name not in known:
        raise PipelineError(f"--deployment {name}: {file.name} has {', '.join(known)}")
    return dict(known[name].get("parameters", {}).get("overrides") or {})
