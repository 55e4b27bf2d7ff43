"""The services as a user starts them, with a flow of a few lines in place of the real one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from dotenv import dotenv_values
from prefect.settings import PREFECT_API_URL
from ruamel.yaml import YAML

from tests.attack import WAYS, attack

FLOW = """
import subprocess
from typing import Any

from prefect import flow, task


@task
def prepare() -> None: ...


@flow
def train(overrides: dict[str, Any] | None = None, isolated: bool = True) -> None:
    prepare()
    subprocess.run(["sleep", "600"])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Services:
    """`python -m flows.services` in a small copy of the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.ports[0]}/api"
        self.mlflow = f"http://127.0.0.1:{self.ports[1]}"
        self.output = folder / "output.txt"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        ports = ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.services", *ports, *arguments],
                cwd=self.folder,
                env=self.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        return env | {"PREFECT_HOME": str(self.folder / "prefect-home"), "PATH": os.defpath}

    def password(self) -> str:
        value = dotenv_values(self.folder / ".env")["PREFECT_API_AUTH_STRING"]
        assert value
        return value

    def ask(self, method: str, path: str, json: object = None) -> Any:
        """What the Prefect server answers to a client with the password."""
        user, _, secret = self.password().partition(":")
        answer = requests.request(method, f"{self.api}{path}", json=json, auth=(user, secret), timeout=10)
        answer.raise_for_status()
        return answer.json()

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def await_ready(self, process: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: "Ctrl-C stops all" in self.text() or process.poll() is not None, 240)
        assert process.poll() is None, self.text()


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def services(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Services:
    # one for all tests: the databases are made once, and later starts find a work pool and deployments already there
    folder = tmp_path_factory.mktemp("services") / "a check out"
    for file in ("flows/__init__.py", "flows/password.py", "flows/services.py", "prefect.toml", "prefect.yaml"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, folder / file)
    # deployed, but not run here: flows of one line
    for entry in YAML(typ="safe").load((root / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]:
        file, name = entry["entrypoint"].split(":")
        (folder / file).write_text(f"from prefect import flow\n\n\n@flow\ndef {name}(): ...\n", encoding="utf-8")
    (folder / "segmentation" / "registry").mkdir(parents=True)
    for name in ("__init__.py", "account.py", "errors.py", "paths.py", "registry/__init__.py", "registry/store.py"):
        shutil.copy(root / "segmentation" / name, folder / "segmentation" / name)
    return Services(folder)


@pytest.fixture
def running(services: Services) -> Iterator[subprocess.Popen[bytes]]:
    (services.folder / "flows" / "train.py").write_text(FLOW, encoding="utf-8")
    process = services.start()
    yield process
    for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("index", "service", "flag"), [(0, "Prefect", "--prefect-port"), (1, "MLflow", "--mlflow-port")]
)
def test_an_occupied_port_is_refused_before_anything_starts(
    services: Services, index: int, service: str, flag: str
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", services.ports[index]))
        holder.listen()
        assert services.start().wait(timeout=30) == 1
    assert services.text().startswith(f"error: {service}: port {services.ports[index]} ")
    assert flag in services.text()
    assert not (services.folder / "mlruns").exists()  # the first test of all: nothing was started yet


def test_the_attack_works_where_no_password_is_asked(browser: Any) -> None:
    """The server of the tests: were the attack out of date, this would say so."""
    api = PREFECT_API_URL.value()
    if not requests.get(f"{api}/work_pools/local", timeout=5).ok:
        requests.post(f"{api}/work_pools/", json={"name": "local", "type": "process"}, timeout=5).raise_for_status()
    port = int(api.split(":")[2].split("/")[0])
    assert [attack(browser, port, way, Path("unused")) for way in WAYS] == ["done", "done", "sent"]
    flows = {flow["name"]: flow["id"] for flow in requests.post(f"{api}/flows/filter", json={}, timeout=5).json()}
    assert set(WAYS) <= set(flows)
    runs = requests.post(f"{api}/flow_runs/filter", json={}, timeout=5).json()
    assert {flows[WAYS[0]], flows[WAYS[1]]} <= {run["flow_id"] for run in runs}


@pytest.mark.slow
def test_all_start_run_a_flow_and_stop_together(
    services: Services, running: subprocess.Popen[bytes], browser: Any
) -> None:
    services.await_ready(running)
    assert requests.get(f"{services.api}/health", timeout=5).ok

    marker = services.folder / "attacked"
    seen = [attack(browser, services.ports[0], way, marker) for way in WAYS]
    assert seen == ["TypeError: Failed to fetch", "Error: 401", "sent"]
    assert not set(WAYS) & {flow["name"] for flow in services.ask("POST", "/flows/filter", {})}
    assert services.ask("POST", "/flow_runs/filter", {}) == []
    assert requests.get(f"{services.mlflow}/health", timeout=5).ok

    # The page, by the name that is not in its API's address: for the browser that is another origin.
    page = browser.new_page()
    page.set_default_timeout(60_000)
    asked = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
    page.goto(f"http://localhost:{services.ports[0]}/deployments")
    page.get_by_placeholder("admin:pass").fill(services.password())
    page.get_by_role("button", name="Login").click()
    page.get_by_text("voc2012").first.wait_for()
    page.close()
    assert asked - {None} == {"localhost", "127.0.0.1"}  # None: pictures inside the page

    # A store that the server made must serve `python -m flows.train` without it: no server-only artifact address.
    made = requests.post(
        f"{services.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "made"}, timeout=30
    ).json()
    got = requests.get(
        f"{services.mlflow}/api/2.0/mlflow/experiments/get", params=made, timeout=30
    ).json()["experiment"]  # fmt: skip
    assert got["artifact_location"].startswith("file://")

    deployments = {}
    for name in ("voc2012", "sample"):
        deployments[name] = services.ask("GET", f"/deployments/name/train/{name}")
        (step,) = deployments[name]["pull_steps"]
        assert step["prefect.deployments.steps.set_working_directory"] == {"directory": str(services.folder)}
    assert deployments["voc2012"]["parameters"] == {}
    assert deployments["sample"]["parameters"]["overrides"]["fetch.source"] == "sample"
    assert deployments["sample"]["parameters"]["overrides"]["encoder.pretrained"] is False
    assert services.ask("GET", "/deployments/name/promote/champion")
    assert services.ask("GET", "/v2/concurrency_limits/gpu")["limit"] == 1

    # as a user does it: `.env` in the current folder has the password
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deployment", "run", "train/sample"],
        cwd=services.folder, env=services.environment() | {"PREFECT_API_URL": services.api}, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (run,) = services.ask("POST", "/flow_runs/filter", {})
    me = psutil.Process(running.pid)
    wait_for(lambda: any(p.name() == "sleep" for p in me.children(recursive=True)), 40)
    tree = [me, *me.children(recursive=True)]
    assert len(tree) >= 6  # this one, two servers, worker, flow run, and what the flow run started
    # Prefect hears of tasks by events, which come through a socket with a log-in of its own
    done = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    wait_for(lambda: services.ask("POST", "/task_runs/filter", done), 20)
    (task,) = services.ask("POST", "/task_runs/filter", done)
    assert (task["flow_run_id"], task["task_key"].split("-")[0]) == (run["id"], "prepare")

    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 0
    assert psutil.wait_procs(tree, timeout=1)[1] == []
    log = (services.folder / "scratch" / "services" / "worker.log").read_text(encoding="utf-8")
    assert "Crashed" in log, f"run {run['id']} could not report its end"
    assert not marker.exists()
    secret = services.password().partition(":")[2].encode()
    written = [file for file in services.folder.rglob("*") if file.is_file() and secret in file.read_bytes()]
    assert written == [services.folder / ".env"]  # and no log, no database
    assert (services.folder / "mlruns" / "mlflow.db").exists()
    assert (services.folder / "prefect-home" / "prefect.db").exists()


@pytest.mark.slow
def test_all_stop_when_one_dies(services: Services, running: subprocess.Popen[bytes]) -> None:
    services.await_ready(running)
    tree = psutil.Process(running.pid).children(recursive=True)
    next(p for p in tree if "mlflow" in p.cmdline() and "server" in p.cmdline()).kill()
    assert running.wait(timeout=60) == 1
    assert "mlflow ended by itself" in services.text()
    assert "mlflow.log" in services.text()
    assert psutil.wait_procs(tree, timeout=1)[1] == []


@pytest.mark.slow
def test_a_failed_deployment_is_named_and_stops_all(services: Services, running: subprocess.Popen[bytes]) -> None:
    (services.folder / "flows" / "train.py").write_text("import no_such_module", encoding="utf-8")
    assert running.wait(timeout=120) == 1
    assert "deploy.log" in services.text()
    with pytest.raises(requests.ConnectionError):
        requests.get(services.api, timeout=5)
