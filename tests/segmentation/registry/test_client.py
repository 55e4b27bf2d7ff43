"""What the store's errors mean: only one that does not answer may be tried again."""

import errno
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.config
import botocore.session
import pytest
import sqlalchemy
from mlflow import MlflowClient

from segmentation.errors import PipelineError
from segmentation.registry import client as store
from segmentation.registry.client import EXPERIMENT, ServerAwayError, answering, connect, experiment_id
from segmentation.registry.register import start_run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store's file: to make one takes seconds."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def own(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The checkout's own store, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(database, tmp_path / "mlruns/mlflow.db")
    return connect()


def use(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Starts a server that gives one answer to everything, as a proxy in front of MLflow does."""
    started = []

    def start(status: int, body: str, kind: str = "application/json", seconds: float = 0) -> None:
        ended = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ended.wait(seconds)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append((server, ended))
        use(monkeypatch, f"http://127.0.0.1:{server.server_port}")

    yield start
    for server, ended in started:
        ended.set()
        server.shutdown()
        server.server_close()


def ask() -> PipelineError:
    with pytest.raises(PipelineError) as failed:
        start_run("a run")
    assert "\n" not in str(failed.value)
    return failed.value


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_overloaded_or_broken_is_away(serve, status):
    serve(status, "<html><body>Sorry</body></html>", "text/html")
    error = ask()
    assert isinstance(error, ServerAwayError)
    assert f"does not answer: too many {status} error responses" in str(error)


def test_a_server_that_is_not_there_or_too_slow_is_away(serve, monkeypatch):
    use(monkeypatch, "http://me:secret@127.0.0.1:9")
    error = ask()
    assert isinstance(error, ServerAwayError)
    assert str(error) == "MLFLOW_TRACKING_URI: http://***@127.0.0.1:9 does not answer: [Errno 111] Connection refused"
    serve(200, "{}", seconds=5)
    error = ask()
    assert isinstance(error, ServerAwayError)
    assert "does not answer: Read timed out. (read timeout=1)" in str(error)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, "You are not authenticated.", "asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSW"),
        (401, "<html><h1>401 Authorization Required</h1></html>", "asks for a login"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "does not permit this: .*Invalid Host h"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "does not permit this: PERMISSION_DENIED: no"),
        (
            404,
            "<html><h1>404 Not Found</h1></html>",
            "is no MLflow server: it answers with a web page; correct the add",
        ),
        (404, '{"detail": "Not Found"}', "is no MLflow server: it answers {'detail': 'Not Found'}; correct the add"),
        (200, "<html>Welcome</html>", "is no MLflow server: it answers with a web page"),
        (413, "too large", "refuses: .*413.*too large"),
        (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad"}', "refuses: INVALID_PARAMETER_VALUE: bad"),
    ],
)
def test_a_server_that_refuses_is_not_away(serve, status, body, says):
    serve(status, body, "text/plain")
    error = ask()
    assert not isinstance(error, ServerAwayError)
    assert "does not answer" not in str(error)
    with pytest.raises(PipelineError, match=says):
        raise error


def test_a_locked_database_is_away_and_a_damaged_one_is_not(own, tmp_path):
    file = tmp_path / "mlruns/mlflow.db"
    with sqlite3.connect(file) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        engine = sqlalchemy.create_engine(f"sqlite:///{file}", connect_args={"timeout": 0})
        with pytest.raises(ServerAwayError, match=r"mlflow\.db is locked by another process"), answering():
            engine.connect().execute(sqlalchemy.text("CREATE TABLE x (y)"))
    holder.close()
    readonly = sqlalchemy.create_engine(f"sqlite:///file:{file}?mode=ro&uri=true")
    written = pytest.raises(
        PipelineError, match=r"/mlflow\.db: attempt to write a readonly database; let this account w"
    )
    with readonly.connect() as connection, written, answering():
        connection.execute(sqlalchemy.text("CREATE TABLE x (y)"))
    with sqlalchemy.create_engine(f"sqlite:///{file}").connect() as connection:
        pages = connection.execute(sqlalchemy.text("PRAGMA page_count")).scalar()
        connection.execute(sqlalchemy.text(f"PRAGMA max_page_count = {pages}"))
        full = pytest.raises(PipelineError, match=r"/mlflow\.db: database or disk is full; make room on this disk")
        with full, answering():
            connection.execute(sqlalchemy.text("CREATE TABLE x AS SELECT zeroblob(1000000) AS y"))


def test_files_that_cannot_be_written_are_named(own, tmp_path):
    with pytest.raises(PipelineError, match=r"No space left on device; make room on this disk$") as failed, answering():
        Path("/dev/full").write_text("x")
    assert not isinstance(failed.value, ServerAwayError)
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=rf"^{tmp_path}/file/x: Not a directory"), answering():
        (tmp_path / "file/x").write_text("x")
    with pytest.raises(PipelineError, match=r"^/x: Permission denied; let this account write there$"), answering():
        raise PermissionError(errno.EACCES, "Permission denied", "/x")


def test_a_store_that_cannot_be_made_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(PipelineError, match=rf"^{tmp_path}/mlruns: File exists"):
        connect()


def test_the_files_of_a_server_may_lie_in_a_store_of_their_own(own):
    """As with `mlflow server --no-serve-artifacts` and S3: this process writes them there."""
    session = botocore.session.get_session()
    config = botocore.config.Config(connect_timeout=1, retries={"max_attempts": 0})
    keys = {"region_name": "x", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    with pytest.raises(ServerAwayError, match="the store of its files does not answer"), answering():
        session.create_client("s3", endpoint_url="http://127.0.0.1:9", config=config, **keys).list_buckets()
    with pytest.raises(PipelineError, match=r"the store of its files refuses: .*AccessDenied") as failed, answering():
        raise botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObject")
    assert not isinstance(failed.value, ServerAwayError)


def test_a_database_whose_driver_is_not_installed_is_refused(monkeypatch):
    use(monkeypatch, "mssql+pymssql://host/mlflow")
    assert (
        str(ask())
        == "MLFLOW_TRACKING_URI: mssql+pymssql://host/mlflow needs the package pymssql, which is not installed"
    )


def test_the_experiment_is_made_once_with_its_files_in_the_checkout(own, tmp_path):
    number = experiment_id(own)
    assert experiment_id(own) == number
    assert own.get_experiment(number).artifact_location == (tmp_path / "mlruns/artifacts").as_uri()


def test_an_experiment_that_another_process_makes_meanwhile_is_used(own, monkeypatch):
    look = MlflowClient.get_experiment_by_name

    def late(client, name):
        found = look(client, name)
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look)
        client.create_experiment(name)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    monkeypatch.setattr(store, "_check_location", lambda *_: None)
    assert experiment_id(own) == own.get_experiment_by_name(EXPERIMENT).experiment_id


def test_a_deleted_experiment_is_refused_until_it_is_restored(own):
    run = start_run("a run")
    number = own.get_run(run).info.experiment_id
    own.delete_experiment(number)
    with pytest.raises(PipelineError, match=rf"is deleted.*\n.*mlflow experiments restore --experiment-id {number}$"):
        start_run("a run")
    own.restore_experiment(number)
    assert start_run("a run") == run


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("mlflow-artifacts:/1", "an MLflow server keeps its files .*set MLFLOW_TRACKING_URI to its address"),
        ("file:///moved/away/mlruns/artifacts", "/moved/away/mlruns/artifacts, which does not exist"),
        ("/moved/away/50%25", "/moved/away/50%, which does not exist"),
    ],
)
def test_an_experiment_whose_files_cannot_be_kept_is_refused(own, location, says):
    own.create_experiment(EXPERIMENT, location)
    with pytest.raises(PipelineError, match=says):
        start_run("a run")


@pytest.mark.parametrize("location", ["s3://bucket/mlflow", "file://{there}"])
def test_files_may_be_kept_elsewhere(own, tmp_path_factory, location):
    own.create_experiment(EXPERIMENT, location.format(there=tmp_path_factory.mktemp("there")))
    assert start_run("a run")


def test_mlflow_uses_the_one_store_for_models_too(own, monkeypatch, tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///./mlruns/mlflow.db")
    connect()
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == uri
