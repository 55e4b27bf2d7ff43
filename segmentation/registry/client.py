"""The MLflow store: a client for it, the project's experiment in it, and what its errors mean."""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions
import mlflow
import requests
import sqlalchemy.exc
from boto3.exceptions import Boto3Error
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.file_utils import local_file_uri_to_path

from segmentation.errors import PipelineError
from segmentation.paths import project_root
from segmentation.registry.store import REGISTRY, TRACKING, database_file, shown, tracking_uri

MODEL_NAME = "voc-segmentation"
EXPERIMENT = "voc-segmentation"

# of MLflow's client, of a store in a database that it opens itself, and of files in S3 that it writes itself
_FAILURES = (
    MlflowException, OSError, ImportError, sqlalchemy.exc.SQLAlchemyError, Boto3Error,
    botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError,
)  # fmt: skip
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on this disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "let this account write there"),
}
_TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")


class ServerAwayError(PipelineError):
    """The store does not answer now, and may later: what failed can be tried again as it is."""


def connect() -> MlflowClient:
    """A client for `tracking_uri()`.

    Raises:
        ServerAwayError: a database that it opens itself does not answer.
        PipelineError: the address is refused, or the store cannot be opened.
    """
    uri = tracking_uri()
    # MLflow's default is to retry for minutes; whoever calls can simply call again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.pop(REGISTRY, None)  # blank, or another spelling of the same store, which MLflow would prefer
    with answering():
        if file := database_file(uri):
            file.parent.mkdir(parents=True, exist_ok=True)
            writable = file if file.exists() else file.parent
            if not os.access(writable, os.W_OK):  # MLflow would try for a minute
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(writable))
        mlflow.set_tracking_uri(uri)
        return MlflowClient(uri, uri)


def experiment_id(client: MlflowClient) -> str:
    """The project's experiment, made on first use.

    Raises:
        ServerAwayError: the store does not answer.
        PipelineError: it is deleted, its files cannot be kept where it says, or the store refuses.
    """
    uri = tracking_uri()
    with answering():
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            own = project_root() / "mlruns/artifacts"
            try:
                # a server knows where to keep files; MLflow alone would keep them in the current folder
                if _is_server(uri):
                    return client.create_experiment(EXPERIMENT)
                own.mkdir(parents=True, exist_ok=True)
                return client.create_experiment(EXPERIMENT, own.as_uri())
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(EXPERIMENT)  # another process was faster
                assert found is not None
    named = f"MLflow experiment {EXPERIMENT} of {shown(uri)}"
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise PipelineError(
            f"{named}: it is deleted, and takes no runs; bring it back with\n"
            f"{TRACKING}={shlex.quote(shown(uri))} mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    _check_location(named, uri, found.artifact_location)
    return found.experiment_id


def _check_location(named: str, uri: str, location: str) -> None:
    """Whether files can be kept where the experiment says, before a training whose files they would be."""
    if _is_server(uri):
        return
    scheme = urlsplit(location).scheme
    if scheme == "mlflow-artifacts":
        raise PipelineError(
            f"{named}: an MLflow server keeps its files ({location}), and alone can; "
            f"start that server, and set {TRACKING} to its address"
        )
    if scheme not in ("", "file"):
        return
    folder = Path(local_file_uri_to_path(location))
    if folder != project_root() / "mlruns/artifacts" and not folder.is_dir():
        raise PipelineError(
            f"{named}: it keeps its files in {folder}, which does not exist (was the checkout moved?); "
            "move it back there, or begin a new store: move mlruns away"
        )


def _is_server(uri: str) -> bool:
    return uri.startswith("http")


@contextmanager
def answering() -> Iterator[None]:
    """Within, a store that does not answer is a `ServerAwayError`, and one that refuses a `PipelineError` with why."""
    try:
        yield
    except _FAILURES as error:
        raise _explained(error) from error


def _explained(error: BaseException) -> PipelineError:
    uri = tracking_uri()
    where = f"{TRACKING}: {shown(uri)}"
    for cause in _causes(error):
        match cause:
            case requests.exceptions.SSLError():
                return PipelineError(
                    f"{where} has a certificate that is refused: {_reason(cause)}; "
                    "MLFLOW_TRACKING_SERVER_CERT_PATH names the file of its authority"
                )
            case ImportError(name=str(package)):
                return PipelineError(f"{where} needs the package {package}, which is not installed")
            case requests.HTTPError(response=requests.Response() as response):
                return _refusal(where, response.status_code, f"{cause}")
            case (
                requests.ConnectionError()  # a refused connection, an unknown host
                | requests.Timeout()
                | requests.exceptions.RetryError()  # status 408, 429 or 5xx, again and again
                | requests.exceptions.ChunkedEncodingError()
                | ConnectionError()
                | TimeoutError()
            ):
                return ServerAwayError(f"{where} does not answer: {_reason(cause)}")
            case botocore.exceptions.HTTPClientError() | botocore.exceptions.ConnectionError():
                return ServerAwayError(f"{where}: the store of its files does not answer: {cause}")
            case botocore.exceptions.ClientError() | botocore.exceptions.NoCredentialsError():
                return PipelineError(f"{where}: the store of its files refuses: {cause}")
            case sqlalchemy.exc.OperationalError() | sqlalchemy.exc.TimeoutError():
                return _database(where, uri, cause)
            case OSError(errno=int(code), filename=str(file)):
                return PipelineError(
                    f"{file}: {cause.strerror}; {_ADVICE.get(code, 'the store keeps its files there')}"
                )
            case OSError(errno=int(code)):
                return PipelineError(f"{where}: {cause.strerror}; {_ADVICE.get(code, 'so a file is not written')}")
            case MlflowException(error_code=str(status)) if status in _TRANSIENT and cause.__cause__ is None:
                return ServerAwayError(f"{where} does not answer: {_line(cause)}")
    if isinstance(error, RestException) and "error_code" not in error.json:
        return PipelineError(f"{where} is no MLflow server: it answers {error.json}; correct the address")
    if isinstance(error, MlflowException):
        return _refusal(where, error.get_http_status_code(), f"{error}")
    return PipelineError(f"{where} refuses: {_line(error)}")


def _refusal(where: str, status: int, text: str) -> PipelineError:
    says = text.strip().splitlines()[0] if text.strip() else f"status {status}"
    if status == HTTPStatus.UNAUTHORIZED:
        return PipelineError(
            f"{where} asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            f"MLFLOW_TRACKING_TOKEN ({says})"
        )
    if status == HTTPStatus.FORBIDDEN:
        return PipelineError(f"{where} does not permit this: {says}")
    if "valid JSON format" in text or "<html" in text.lower():
        return PipelineError(f"{where} is no MLflow server: it answers with a web page; correct the address")
    return PipelineError(f"{where} refuses: {says}")


def _database(where: str, uri: str, error: sqlalchemy.exc.SQLAlchemyError) -> PipelineError:
    """An error of a database that this process opened itself."""
    original = getattr(error, "orig", None)
    if not isinstance(original, sqlite3.Error):
        # what a PostgreSQL server calls fatal it has answered: a wrong password, no such database
        kind, says = (PipelineError, "refuses") if "FATAL" in f"{error}" else (ServerAwayError, "does not answer")
        return kind(f"{where} {says}: {_line(original or error)}")
    name = getattr(original, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return ServerAwayError(f"{where} is locked by another process")
    if name == "SQLITE_FULL":
        return PipelineError(f"{database_file(uri)}: {original}; {_ADVICE[errno.ENOSPC]}")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return PipelineError(f"{database_file(uri)}: {original}; {_ADVICE[errno.EACCES]}")
    return PipelineError(f"{database_file(uri)}: {original}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """The last words of a chain of them: `[Errno 111] Connection refused`."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return _line(inner or error).rpartition(": ")[2]


def _line(error: object) -> str:
    return (f"{error}".strip() or type(error).__name__).splitlines()[0]
