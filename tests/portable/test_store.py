"""The address of the MLflow store, as users write it."""

import pytest

from segmentation.errors import PipelineError
from segmentation.paths import project_root
from segmentation.registry.store import database_file, own_store, shown, tracking_uri


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("written", [None, "", "  ", "\n"])
def test_nothing_is_the_checkouts_own_store(checkout, monkeypatch, written):
    if written is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", written)
    assert tracking_uri() == own_store() == f"sqlite:///{checkout}/mlruns/mlflow.db"


@pytest.mark.parametrize(
    ("written", "used"),
    [
        ("http://localhost:5000", "http://localhost:5000"),
        (" http://127.0.0.1:5000/ \n", "http://127.0.0.1:5000"),
        ("https://host.example/mlflow//", "https://host.example/mlflow"),
        ("http://me:secret@host:5000", "http://me:secret@host:5000"),
        ("http://[::1]:5000", "http://[::1]:5000"),
        ("postgresql://me:secret@host/mlflow", "postgresql+psycopg2://me:secret@host/mlflow"),
        ("postgresql+psycopg2://host/mlflow?sslmode=require", "postgresql+psycopg2://host/mlflow?sslmode=require"),
        ("mysql+pymysql://host/mlflow", "mysql+pymysql://host/mlflow"),
        ("sqlite:///mlflow.db", "sqlite:///{checkout}/mlflow.db"),
        ("sqlite:///./mlruns/../mlflow.db", "sqlite:///{checkout}/mlflow.db"),
        ("sqlite:///../other/mlflow.db", "sqlite:///{parent}/other/mlflow.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("SQLite:////srv/mlflow.db?timeout=5", "sqlite:////srv/mlflow.db?timeout=5"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:///{checkout}/mlflow.db"),
        ("sqlite:////srv/50%25/mlflow.db", "sqlite:////srv/50%25/mlflow.db"),
        ("sqlite:///~/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_what_can_be_used_is_used_and_relative_paths_start_at_the_checkout(checkout, monkeypatch, written, used):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", written)
    wanted = used.format(checkout=checkout, parent=checkout.parent)
    assert tracking_uri() == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", wanted)  # as a child process gets it, in whatever folder it runs
    monkeypatch.chdir("/")
    assert tracking_uri() == wanted


def test_relative_is_relative_to_the_checkout_in_an_isolated_experiment_too(checkout, monkeypatch):
    copy = checkout / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert project_root() == checkout
    assert tracking_uri() == f"sqlite:///{checkout}/mlflow.db"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("localhost:5000", "localhost:5000 lacks its scheme; write http://localhost:5000"),
        ("localhost", "write http://localhost"),
        ("127.0.0.1:5000/", "127.0.0.1:5000/ lacks its scheme; write http://127.0.0.1:5000"),
        ("[::1]:5000", "write http://[::1]:5000"),
        ("mlflow.example.com:5000/prefix", "write http://mlflow.example.com:5000/prefix"),
        ("mlflow.example.com", "write http://mlflow.example.com:PORT for a server"),
        ("http:/localhost:5000", "http:/localhost:5000 lacks slashes; write http://localhost:5000"),
        ("http://", "http:// names no server; write http://HOST:PORT"),
        ("http://:5000", "names no server"),
        ("http://host:port", "names no server"),
        ("http://127.0.0.1:5000/#/experiments/1", "is the address of a page; write http://127.0.0.1:5000"),
        ("http://h:5000?workflowType=x", "is the address of a page; write http://h:5000"),
        ("./mlruns", "./mlruns is a folder, where MLflow no longer keeps runs; write sqlite:///./mlruns/mlflow.db"),
        ("mlruns/", "write sqlite:///mlruns/mlflow.db"),
        ("file:./mlruns", "write sqlite:///./mlruns/mlflow.db"),
        ("file:///srv/mlruns", "write sqlite:////srv/mlruns/mlflow.db"),
        ("/srv/mlruns", "write sqlite:////srv/mlruns/mlflow.db"),
        ("~/mlruns", "write sqlite:///~/mlruns/mlflow.db"),
        ("mlflow.db", "mlflow.db lacks its scheme; write sqlite:///mlflow.db"),
        ("/srv/mlflow.db", "write sqlite:////srv/mlflow.db"),
        ("sqlite:mlflow.db", "sqlite:mlflow.db lacks slashes; write sqlite:///mlflow.db"),
        ("sqlite://mlflow.db", "sqlite://mlflow.db has too few slashes; write sqlite:///mlflow.db"),
        ("sqlite://", "sqlite:// has too few slashes; write sqlite:///mlruns/mlflow.db"),
        ("sqlite:///", "is a store in memory"),
        ("sqlite:///:memory:", "is a store in memory"),
        ("sqlite:///mlruns/", "is a folder; write sqlite:///mlruns/mlflow.db"),
        ("sqlite:///there", "is a folder; write sqlite:///there/mlflow.db"),
        ("sqlite:///file:mlflow.db?uri=true", "has two schemes; write sqlite:///mlflow.db"),
        ("postgres://me:secret@host/mlflow", "write postgresql://***@host/mlflow"),
        ("databricks", "is not supported"),
        ("databricks://profile", "is not supported"),
        ("databricks-uc", "is not supported"),
        ("s3://bucket/mlflow", "is of an unknown kind; write http://HOST:PORT, sqlite:///PATH.db or postgresql://"),
        ('"http://localhost:5000"', "is in quotes; write it without"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_the_right_spelling(checkout, monkeypatch, written, says):
    (checkout / "there").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", written)
    with pytest.raises(PipelineError) as refused:
        tracking_uri()
    text = str(refused.value)
    assert text.startswith("MLFLOW_TRACKING_URI: ")
    assert says in text
    assert "\n" not in text
    assert "secret" not in text


@pytest.mark.parametrize("same", ["http://127.0.0.1:5000", "http://127.0.0.1:5000/", ""])
def test_a_registry_of_its_own_is_refused_and_the_same_store_twice_is_not(monkeypatch, same):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", same)
    assert tracking_uri() == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://other:5000")
    with pytest.raises(PipelineError, match=r"MLFLOW_REGISTRY_URI: http://other:5000 is another store than http://127"):
        tracking_uri()
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "other:5000")
    with pytest.raises(
        PipelineError, match="MLFLOW_REGISTRY_URI: other:5000 lacks its scheme; write http://other:5000"
    ):
        tracking_uri()


@pytest.mark.parametrize("name", ["a#b", "a?b", "50%", "a%20b", "a'b\"c"])
def test_a_checkout_whose_path_a_tool_misreads_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for relative in ("", "sqlite:///mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relative)
        with pytest.raises(PipelineError, match="in its path, which DVC, Prefect or MLflow misread; rename"):
            tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


@pytest.mark.parametrize("name", ["a b", "a'b", 'a"b', "ü 猫", "a&b;c", "a@b", "a+b,c"])
def test_any_other_path_is_fine(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert database_file(tracking_uri()) == tmp_path / name / "mlruns/mlflow.db"


def test_the_file_of_a_database():
    assert str(database_file("sqlite:////srv/50%25/a b.db?timeout=5")) == "/srv/50%/a b.db"
    assert str(database_file("sqlite+pysqlite:////srv/x.db")) == "/srv/x.db"
    assert database_file("http://sqlite:5000") is None


def test_no_password_is_shown():
    assert shown("postgresql://me:p@ss@host/db") == "postgresql://***@host/db"
    assert shown("http://me:secret@host:5000/x") == "http://***@host:5000/x"
    assert shown("http://host:5000/a@b") == "http://host:5000/a@b"
    assert shown("me:secret@host:5000") == "***@host:5000"
    assert shown(None) == ""


def test_no_password_is_shown_of_an_address_without_a_scheme(checkout, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "me:secret@host:5000")
    with pytest.raises(PipelineError) as refused:
        tracking_uri()
    assert "secret" not in str(refused.value)
    assert "write http://host:5000, and the login into MLFLOW_TRACKING_USERNAME" in str(refused.value)
