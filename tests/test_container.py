import fnmatch
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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
    assert all(line.endswith("=") for line in lines)  # no secret, and none that works by default


def test_compose_asks_for_every_secret_and_holds_none(root, compose):
    text = (root / "compose.yaml").read_text()
    assert not re.search(r"\$\{\w+:?-", text)  # a default
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY", key):
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
