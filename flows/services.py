"""Start the local services, register the deployments, and stop everything together: `python -m flows.services`.

Runs a Prefect server, an MLflow tracking server and a Prefect worker until Ctrl-C, SIGTERM, or the end of any one of
them. All listen on this machine only. The Prefect server asks for a password, which is kept in `.env`. Logs:
`scratch/services/<name>.log`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.password import get_password
from segmentation.errors import PipelineError
from segmentation.paths import check_checkout, project_root, scratch
from segmentation.registry.store import REGISTRY, TRACKING, own_store

HOST = "127.0.0.1"
START_LIMIT = 120.0
POOL = "local"
GPU = "gpu"


@dataclass
class Service:
    """A child process, and every process it was ever seen to have started (also in other sessions)."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    family: set[psutil.Process]

    def look(self) -> None:
        """Take in new descendants: once a parent is dead, its children cannot be found through it."""
        for member in list(self.family):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.family.update(member.children(recursive=True))

    def stop(self, grace: float) -> None:
        """End what the service started, then itself: a worker that ends first cuts off what its runs have to report."""
        self.look()
        leader = {member for member in self.family if member.pid == self.process.pid}
        _end(self.family - leader, grace)
        self.look()
        _end(self.family, grace)


def _end(members: set[psutil.Process], grace: float) -> None:
    """Ask the topmost to end, which know in which order to end those below them; kill what is left after `grace`."""
    pids = {member.pid for member in members}
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.ppid() not in pids:
                member.terminate()
    for member in psutil.wait_procs(members, timeout=grace)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, timeout=5)


def main() -> None:
    """Parse the command line, run the services until the end, exit with 1 if that end was an error."""
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__.splitlines()[0])
    parser.add_argument("--prefect-port", type=int, default=4200, help="port of the Prefect server (default: 4200)")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="port of the MLflow server (default: 5000)")
    args = parser.parse_args()
    # installed before any child starts: a child would inherit a signal that this process ignores (as shells make
    # background jobs do with SIGINT), and the worker stops itself by SIGINT
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    services: list[Service] = []
    failed = False
    try:
        run(args.prefect_port, args.mlflow_port, services)
    except KeyboardInterrupt:
        print("stopping …", flush=True)
    except PipelineError as error:
        failed = True
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # the worker goes first: its runs still have to tell both servers how they ended
        for service in reversed(services):
            service.stop(grace=20 if service.name == "worker" else 10)
    sys.exit(1 if failed else 0)


def run(prefect_port: int, mlflow_port: int, services: list[Service]) -> None:
    """Start everything, appending to `services`, and watch it; returns only by exception."""
    check_port("Prefect", prefect_port, "--prefect-port")
    check_port("MLflow", mlflow_port, "--mlflow-port")
    if prefect_port == mlflow_port:
        raise PipelineError(f"--prefect-port and --mlflow-port are both {prefect_port}: choose two ports")
    check_checkout()
    password = get_password(project_root() / ".env")
    store, logs = project_root() / "mlruns", scratch() / "services"
    try:
        store.mkdir(exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"{error.filename}: {error.strerror}; start in a checkout that you can write") from None
    prefect_url, mlflow_url = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
    env = {
        # one database a checkout: deployments and runs of two checkouts must not meet in ~/.prefect
        "PREFECT_HOME": str(scratch() / "prefect"),
        # its own pages, by both names of this machine; Prefect's default is every page
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{prefect_url},http://localhost:{prefect_port}",
        **os.environ,  # telemetry is off in it: see flows/__init__.py
        "PREFECT_API_URL": f"{prefect_url}/api",
        # kept on disk: a slot that was held when the server stopped is given back, and not lost with its memory
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        TRACKING: mlflow_url,
        REGISTRY: mlflow_url,
        # background jobs of MLflow's own (language-model judges): five more processes, and nothing here uses them
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        **password.environment(),
    }

    def start(name: str, *arguments: str, env: dict[str, str] = env) -> None:
        log = logs / f"{name}.log"
        with log.open("wb") as out:
            # its own process group: Ctrl-C in the terminal must reach this process only, which stops them in order
            child = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        services.append(Service(name, child, log, {psutil.Process(child.pid)}))

    def prefect(name: str, *arguments: str) -> None:
        log = logs / f"{name}.log"
        with log.open("wb") as out:
            command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
            code = subprocess.call(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        if code:
            raise PipelineError(f"`prefect {' '.join(arguments)}` failed: see {log}")

    def missing(path: str) -> bool:
        status = get(prefect_port, path, password.value)
        if status not in (http.HTTPStatus.OK, http.HTTPStatus.NOT_FOUND):
            log = logs / "prefect.log"
            raise PipelineError(f"prefect answers {prefect_url}{path} with {status or 'nothing'}: see {log}")
        return status == http.HTTPStatus.NOT_FOUND

    start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
    start(
        "mlflow", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1",
        "--backend-store-uri", own_store(),
        # plain paths, as `python -m flows.train` writes without a server: a store serves both ways of running
        "--default-artifact-root", (store / "artifacts").as_uri(), "--no-serve-artifacts",
        env={name: value for name, value in env.items() if not name.startswith("PREFECT_")},
    )  # fmt: skip
    print("starting: Prefect and MLflow servers …", flush=True)
    await_health(services, {"prefect": (prefect_port, "/api/health"), "mlflow": (mlflow_port, "/health")})
    if missing(f"/api/work_pools/{POOL}"):
        prefect("work-pool", "work-pool", "create", POOL, "--type", "process")
    # one training at a time; `prefect gcl update gpu --limit N` stays as it is set
    if missing(f"/api/v2/concurrency_limits/{GPU}"):
        prefect("gpu", "global-concurrency-limit", "create", GPU, "--limit", "1")
    prefect("deploy", "deploy", "--all")
    start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
    print(
        f"Prefect  {prefect_url}\n         asks each browser once for a password: {password.place}\n"
        f"MLflow   {mlflow_url}\nlogs     {logs}\n\n"
        "In another terminal, with the environment active (. .venv/bin/activate):\n"
        + (f"  export PREFECT_API_URL={prefect_url}/api MLFLOW_TRACKING_URI={mlflow_url}\n")
        + "  dvc repro                                 run the stages by hand\n"
        "  prefect deployment run 'train/voc2012'    run them as a recorded experiment\n"
        "  prefect deployment run 'promote/champion' make the newest model the champion, if it is better\n\n"
        "Ctrl-C stops all.",
        flush=True,
    )
    while True:
        check_alive(services)
        time.sleep(1)


def check_port(service: str, port: int, flag: str) -> None:
    """Refuse a port on which something listens already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port just left counts as taken
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            text = f"{service}: port {port} of {HOST} is not free ({error}). Are the services running already?"
            raise PipelineError(f"{text} Otherwise choose another port with {flag}.") from error


def check_alive(services: list[Service]) -> None:
    """Raise when a service has ended by itself."""
    for service in services:
        service.look()
        code = service.process.poll()
        if code is not None:
            raise PipelineError(f"{service.name} ended by itself (exit code {code}): see {service.log}")


def get(port: int, path: str, password: str = "") -> int | None:
    """Status of a GET on this machine, or None without an answer; past any proxy that the environment names."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    headers = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"} if password else {}
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def await_health(services: list[Service], checks: dict[str, tuple[int, str]]) -> None:
    """Wait until each named service answers its health URL with 200."""
    deadline = time.monotonic() + START_LIMIT
    for name, (port, path) in checks.items():
        while get(port, path) != http.HTTPStatus.OK:
            check_alive(services)
            if time.monotonic() > deadline:
                log = next(s.log for s in services if s.name == name)
                url = f"http://{HOST}:{port}{path}"
                raise PipelineError(f"{name} does not answer {url} within {START_LIMIT:.0f} s: see {log}")
            time.sleep(0.3)


if __name__ == "__main__":
    main()
