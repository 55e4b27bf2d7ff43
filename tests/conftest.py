import os
import shutil
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

# several test processes on two cores: with two threads each they would mostly wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

if find_spec("prefect"):  # tests/portable need neither it nor MLflow and DVC
    import flows  # noqa: F401  switches telemetry off before they are imported

ROOT = Path(__file__).resolve().parents[1]

# The smallest run that goes through every stage for real.
LONGEST = ("test_train", "test_pipeline", "test_training", "test_predict", "test_promote", "test_services")
TINY = {
    "fetch.source": "sample",
    "fetch.limit": 4,
    "preprocess.image_size": 56,
    "encoder.name": "vit_small_patch14_dinov2",
    "encoder.pretrained": False,
    "decoder.channels": [16, 16, 8, 8],
    "train.epochs": 2,
    "train.workers": 0,
    "evaluate.flip": True,
}


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """Real VOC pairs in VOC layout, kept beside the repository and never in it."""
    folder = ROOT.parent / "shared" / "voc2012-subset" / "VOCdevkit" / "VOC2012"
    if not folder.is_dir():
        pytest.skip("real VOC pairs are not here: ../shared/voc2012-subset is missing")
    return folder


def git(checkout: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def environment() -> dict[str, str]:
    """That of an active `.venv`, without what would lead to a server of the machine."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    return env | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # CI runs as root; a page of `evil.test` comes from this machine, as after a change of the name's address (DNS)
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP *.test 127.0.0.1"]
        started = playwright.chromium.launch(executable_path=found, args=arguments)
        yield started
        started.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no test process is left with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def new_checkout(tmp_path_factory):
    """Makes checkouts of the working tree as it is: a git and DVC repository each, with one commit."""

    def make() -> Path:
        checkout = tmp_path_factory.mktemp("checkout")
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, checkout / name)
        git(checkout, "init", "--quiet")
        git(checkout, "add", "-A")
        git(checkout, "commit", "--quiet", "-m", "The working tree")
        return checkout

    return make


def png_declaring(width: int, height: int, bits: int = 8, kind: int = 2, rows: bytes = b"0") -> bytes:
    """A PNG written byte by byte: its header may promise what its data does not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def contrast(*colours):
    """WCAG's, of two CSS colours."""
    light = []
    for colour in colours:
        channels = np.array([int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ (0.2126, 0.7152, 0.0722)))
    return (max(light) + 0.05) / (min(light) + 0.05)
