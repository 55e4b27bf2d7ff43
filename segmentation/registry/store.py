"""Where runs and models are kept: the address of the MLflow store, checked before anything is started."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from segmentation.errors import PipelineError
from segmentation.paths import check_checkout, project_root

TRACKING, REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
DATABASES = ("postgresql", "mysql", "mssql")


def own_store() -> str:
    """The checkout's own store, `mlruns/mlflow.db`.

    Raises:
        PipelineError: the checkout's path has a sign that no address can hold.
    """
    check_checkout()
    return f"sqlite:///{project_root()}/mlruns/mlflow.db"


def tracking_uri() -> str:
    """The store of `MLFLOW_TRACKING_URI`, else the checkout's own; the same from whatever folder a process runs in.

    Raises:
        PipelineError: the address is misspelled or of a store that cannot be used, or `MLFLOW_REGISTRY_URI` is another.
    """
    uri = _checked(TRACKING) or own_store()
    registry = _checked(REGISTRY)
    if registry not in (None, uri):
        raise PipelineError(
            f"{REGISTRY}: {shown(registry)} is another store than {shown(uri)}, and runs and models are kept together; "
            f"unset {REGISTRY}, or set {TRACKING} to the same"
        )
    return uri


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store; `None` for any other store."""
    if not uri.startswith("sqlite"):
        return None
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def shown(uri: str | None) -> str:
    """An address for a message or a log: without its user and password."""
    return re.sub(r"(^|://)[^/]+@", r"\1***@", uri or "")


def _checked(name: str) -> str | None:
    """The address that a variable holds, absolute; `None` if it is unset or blank.

    Raises:
        PipelineError: it is misspelled, or of a store that cannot be used.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    kind, separator, rest = text.partition("://")
    kind = kind.lower()
    if separator and kind in ("http", "https"):
        return _server(name, text)
    if separator and kind.partition("+")[0] == "sqlite":
        return _sqlite(name, text, rest)
    if separator and kind == "postgresql":  # SQLAlchemy's default is a driver that is not among our packages
        return f"postgresql+psycopg2://{rest}"
    if separator and kind.partition("+")[0] in DATABASES:
        return text
    raise PipelineError(f"{name}: {shown(text)} {_advice(text, kind if separator else '', rest)}")


def _server(name: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise PipelineError(f"{name}: {shown(text)} names no server; write http://HOST:PORT")
    bare = re.split(r"[?#]", text)[0].rstrip("/")
    if parts.query or parts.fragment or "#" in text:
        raise PipelineError(f"{name}: {shown(text)} is the address of a page; write {shown(bare)}")
    return bare


def _sqlite(name: str, text: str, rest: str) -> str:
    """Relative paths are relative to the checkout, as those in `params.yaml`; SQLAlchemy reads `%3F` as `?`."""
    scheme = text.partition("://")[0].lower()
    path, mark, query = rest.partition("?")
    if not path.startswith("/"):
        raise PipelineError(f"{name}: {text} has too few slashes; write sqlite:///{path or 'mlruns/mlflow.db'}")
    path = path[1:]
    if path in ("", ":memory:"):
        raise PipelineError(
            f"{name}: {text} is a store in memory, lost with the process; write sqlite:///mlruns/mlflow.db"
        )
    if path.startswith("file:"):
        raise PipelineError(f"{name}: {text} has two schemes; write sqlite:///{path.removeprefix('file:')}")
    file = Path(path).expanduser()
    if not file.is_absolute():
        check_checkout()
        file = project_root() / file
    if path.endswith("/") or Path(unquote(str(file))).is_dir():
        raise PipelineError(f"{name}: {text} is a folder; write sqlite:///{path.rstrip('/')}/mlflow.db")
    return f"{scheme}:///{os.path.normpath(file)}{mark}{query}"


def _advice(text: str, scheme: str, rest: str) -> str:
    """What is wrong with an address of no usable kind, and the right spelling."""
    if text[:1] in ("'", '"'):
        return "is in quotes; write it without"
    if not scheme and "@" in text.partition("/")[0]:
        host = text.rpartition("@")[2]
        return f"lacks its scheme; write http://{host}, and the login into MLFLOW_TRACKING_USERNAME and _PASSWORD"
    if scheme == "postgres":
        return f"is of a kind that SQLAlchemy does not know; write postgresql://{shown('://' + rest)[3:]}"
    if text.lower().startswith(("databricks", "uc:")):
        return "is not supported, for its registry is another one; write http://HOST:PORT of an MLflow server"
    for near in ("http", "https", "sqlite"):
        if text.lower().startswith(f"{near}:"):
            slashes = "///" if near == "sqlite" else "//"
            path = text[len(near) + 1 :]
            return f"lacks slashes; write {near}:{slashes}{path if near == 'sqlite' else path.lstrip('/')}"
    if scheme not in ("", "file"):
        return f"is of an unknown kind; write http://HOST:PORT, sqlite:///PATH.db or {DATABASES[0]}://…"
    if re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[\w.-]+):\d+(/.*)?|localhost", text):
        return f"lacks its scheme; write http://{text.rstrip('/')}"
    path = unquote(urlsplit(text).path) if text.startswith("file:") else text
    if path.endswith((".db", ".sqlite", ".sqlite3")):
        return f"lacks its scheme; write sqlite:///{path}"
    if "/" not in text and not (project_root() / text).exists() and not text.startswith((".", "~")):
        return f"lacks its scheme; write http://{text}:PORT for a server, sqlite:///{text}.db for a file"
    folder = path.rstrip("/")
    return (
        f"is a folder, where MLflow no longer keeps runs; write sqlite:///{folder}/mlflow.db "
        "(`mlflow migrate-filestore` moves the runs of an old folder)"
    )
