import fnmatch
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import requests
from ruamel.yaml import YAML

from tests.attack import WAYS, attack
from tests.conftest import environment

NEVER_IN_THE_IMAGE = (
    ".env",
    ".git/config",
    ".dvc/config.local",
    "data/raw/x.jpg",
    "mlruns/mlflow.db",
    "runs/x",
    "tests/x",
)


@pytest.fixture(scope="module")
def compose(root) -> dict:
    return YAML(typ="safe").load((root / "compose.yaml").read_text())


def allowed(root: Path) -> list[str]:
    """What `.dockerignore` lets in; its first rule leaves everything out."""
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return [line.removeprefix("!") for line in lines[1:] if line.startswith("!")]


def test_the_image_holds_what_runs_and_nothing_else(root):
    inside = allowed(root)
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    for entry in inside:
        assert any(name == entry or name.startswith(f"{entry}/") for name in tracked), entry
    for name in NEVER_IN_THE_IMAGE:
        assert not any(fnmatch.fnmatch(name, entry) or name.startswith(f"{entry}/") for entry in inside), name
    packages = {name.split("/")[0] for name in tracked if name.endswith("/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= set(inside)


def installed(root: Path, torch_index: str) -> str:
    """The part of the lock that the Dockerfile installs, hashes included: its own commands, run by a shell."""
    text = (root / "Dockerfile").read_text()
    names = (
        re.search(r"developers='.*", text)[0].removesuffix("\\"),
        re.search(r"torch='.*", text)[0].removesuffix("\\"),
    )
    awk = re.search(r"awk (-v .*) \\\n", text)[1]
    script = f"{names[0]}\n{names[1]}\nawk {awk} requirements.lock"
    return subprocess.run(
        ["sh", "-euc", script], cwd=root, env={"PATH": os.environ["PATH"], "TORCH_INDEX": torch_index},
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip


def entries(lock: str) -> dict[str, list[str]]:
    """The hashes of each package."""
    return {
        re.match(r"[\w-]+", entry)[0]: re.findall(r"--hash=sha256:[0-9a-f]{64}", entry)
        for entry in re.split(r"\n(?=[a-z])", lock)
        if not entry.startswith("#")
    }


def test_the_image_leaves_out_the_packages_that_only_developers_run(root):
    text = (root / "pyproject.toml").read_text()
    development = set(re.findall(r'"([\w-]+)"', text[text.index("# development:") : text.index("\n]\n")]))
    assert development <= {re.match(r"[\w-]+", each)[0] for each in tomllib.loads(text)["project"]["dependencies"]}
    locked = entries((root / "requirements.lock").read_text())
    inside = entries(installed(root, ""))
    assert locked.keys() - inside.keys() == development
    assert inside == {name: hashes for name, hashes in locked.items() if name not in development}


def test_every_package_is_locked_with_a_hash(root):
    assert [name for name, hashes in entries((root / "requirements.lock").read_text()).items() if not hashes] == []


def test_torch_from_another_index_brings_its_own_cuda_or_none(root):
    left_out = entries(installed(root, "")).keys() - entries(installed(root, "http://127.0.0.1:9")).keys()
    assert {"torch", "torchvision", "triton", "nvidia-cudnn-cu13", "cuda-toolkit"} <= left_out
    assert all(re.match("torch$|torchvision$|triton$|nvidia-|cuda-", name) for name in left_out)


def test_compose_needs_exactly_what_env_example_has(root):
    used = set(re.findall(r"\$\{(\w+)", (root / "compose.yaml").read_text()))
    lines = [line for line in (root / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    assert used == {line.split("=")[0] for line in lines}
    # no secret, and none that works by default; the password of Prefect's clients is the server's
    assert all(line.endswith("=") or re.fullmatch(r"\w+=\$\{\w+\}", line) for line in lines)


def test_compose_asks_for_every_secret_and_holds_none(root, compose):
    text = (root / "compose.yaml").read_text()
    assert not re.search(r"\$\{\w+:?-", text)  # a default
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING", key):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]*)?\}", value), f"{name}: {key}"
    for variable in re.findall(r"^(\w+)=", (root / ".env.example").read_text(), re.MULTILINE):
        assert f"${{{variable}:?" in text


def test_compose_waits_for_health_and_listens_on_this_machine_only(compose):
    services = compose["services"]
    assert set(services) == {"postgres", "s3", "mlflow", "prefect", "worker", "server"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert ":" in service["image"] or service["image"] == "voc-segmentation", name
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[needed]
    volumes = {entry.split(":")[0] for service in services.values() for entry in service.get("volumes", [])}
    assert volumes == set(compose["volumes"])
    # the image's own health check asks the model server
    assert "healthcheck" not in services["server"]
    assert all("healthcheck" in service for name, service in services.items() if name != "server")


@pytest.mark.slow
def test_a_hostile_page_gets_nothing_from_the_prefect_server_of_compose(root, compose, tmp_path, browser):
    """As compose runs it, but on a free port of this machine only, and with SQLite."""
    service = compose["services"]["prefect"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [{"0.0.0.0": "127.0.0.1", "4200": str(port)}.get(word, word) for word in service["command"]]
    assert command[0] == "prefect"
    env = environment() | {
        key: re.sub(r"\$\{(\w+)[^}]*\}", "voc:secret", value) for key, value in service["environment"].items()
    }
    env |= {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}",
    }
    shutil.copy(root / "prefect.toml", tmp_path)  # it lies in the image's folder, too
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        api = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + 90
        while not _healthy(f"{api}/health"):  # as compose asks: without the password
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)

        def ask(path: str, **json: object) -> requests.Response:
            return requests.post(f"{api}{path}", json=json, auth=("voc", "secret"), timeout=10)

        assert ask("/work_pools/", name="local", type="process").ok
        seen = [attack(browser, port, way, tmp_path / "unused") for way in WAYS]
        assert seen == ["TypeError: Failed to fetch", "Error: 401", "sent"]
        assert ask("/flows/filter").json() == ask("/deployments/filter").json() == []
    finally:
        server.terminate()
        server.wait(30)


def _healthy(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False
