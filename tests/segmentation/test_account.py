"""Accounts without a home folder or a name, as containers and CI machines give them."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

FOREIGN = 54321  # no entry in /etc/passwd
SHOW = (
    "import json, os; from segmentation.account import complete_account; complete_account(); "
    "print(json.dumps(dict(os.environ)))"
)


@pytest.fixture
def place(root):
    """A folder that a foreign account can enter and write: pytest's own are closed to it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    (folder / "segmentation").mkdir()
    for name in ("__init__", "account", "errors", "paths"):
        shutil.copy(root / "segmentation" / f"{name}.py", folder / "segmentation")
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder)


def account(place: Path, **env: str) -> dict[str, str]:
    """The environment after `complete_account`, for a foreign account where the tests run as root."""
    python = shutil.which("python3", path="/usr/bin:/bin")  # that of the tests may lie in a home folder
    if python is None:
        pytest.skip("no python3 in /usr/bin")
    foreign = {"user": FOREIGN, "group": FOREIGN, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [python, "-B", "-c", SHOW], cwd=place, env={"PATH": "/usr/bin:/bin", **env}, text=True, check=False,
        capture_output=True, **foreign,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take a foreign account")


@as_root
@pytest.mark.parametrize("env", [{}, {"HOME": ""}, {"HOME": "/nonexistent"}, {"HOME": "/root"}])
def test_without_a_home_that_can_be_read_there_is_one_in_scratch(place, env):
    if env.get("HOME") == "/root" and stat.S_IMODE(Path("/root").stat().st_mode) & 0o007:
        pytest.skip("/root is open here")
    found = account(place, **env)
    assert found["HOME"] == str(place / "scratch/home")
    assert Path(found["HOME"]).is_dir()
    assert found["USER"] == str(FOREIGN)


def test_a_home_and_a_name_that_are_there_stay(place):
    (place / "own").mkdir(mode=0o777)
    (place / "own").chmod(0o777)
    env = {"HOME": str(place / "own"), "USER": "someone"}
    found = account(place, **env)
    assert {key: found[key] for key in env} == env
    assert not {"XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME"} & found.keys()
    assert not (place / "scratch").exists()


def test_a_home_that_cannot_be_written_stays_and_caches_go_elsewhere(place):
    (place / "own").mkdir()
    (place / "own").chmod(0o555)
    found = account(place, HOME=str(place / "own"), USER="someone")
    assert found["HOME"] == str(place / "own")
    assert found["XDG_CACHE_HOME"] == str(place / "scratch/home/.cache")
    assert found["MPLCONFIGDIR"] == str(place / "scratch/home/.config/matplotlib")
    assert "HF_HOME" not in found


def test_weights_in_a_home_that_cannot_be_written_are_still_found(place):
    (place / "own/.cache/huggingface").mkdir(parents=True)
    (place / "own").chmod(0o555)
    found = account(place, HOME=str(place / "own"), USER="someone")
    assert found["HF_HOME"] == str(place / "own/.cache/huggingface")


def test_what_is_set_stays(place):
    (place / "own").mkdir()
    (place / "own").chmod(0o555)
    env = {"HOME": str(place / "own"), "XDG_CACHE_HOME": "/a", "MPLCONFIGDIR": "/b", "HF_HOME": "/c", "LOGNAME": "me"}
    found = account(place, **env)
    assert {key: found[key] for key in env} == env
    assert "USER" not in found
