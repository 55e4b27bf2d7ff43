"""Which Python `make` takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("awk", "cut", "dirname", "head", "ls", "make", "rm", "sed", "sh", "sort")


@pytest.fixture
def run(root: Path, tmp_path: Path):
    """Runs a command of the repository with a PATH that holds these tools and the Pythons in `bin`, and no home."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}/bin:{tmp_path}/tools"}
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)

    return run


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).unlink(missing_ok=True)  # a link would be written through
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


def link(folder: Path, name: str) -> None:
    put(folder, name, f'exec "{sys.executable}" "$@"')


def other(folder: Path, name: str, version: str) -> Path:
    """An interpreter that says it is another version: the real one, with that version set before the script runs."""
    parts = tuple(map(int, version.split(".")))
    code = f"import runpy, sys; sys.version_info = {parts}; sys._base_executable = '{folder / name}'"
    return put(folder, name, f'exec "{sys.executable}" -c "{code}; runpy.run_path(sys.argv[1])" "$@"')


def test_python3_comes_first_then_the_newest(run, tmp_path):
    other(tmp_path / "bin", "python3", "3.12.3")
    for minor in (11, 13, 14):
        other(tmp_path / "bin", f"python3.{minor}", f"3.{minor}.9")
    versions = [line.split()[0] for line in run(".ci/pythons").stdout.splitlines()]
    assert versions == ["3.12.3", "3.14.9", "3.13.9", "3.11.9"]


@pytest.mark.parametrize("version", ["3.8.1", "3.10.14", "3.11.1", "3.15.0"])
def test_a_python3_that_is_not_supported_is_passed_over(run, tmp_path, version):
    other(tmp_path / "bin", "python3", version)
    chosen = other(tmp_path / "bin", "python3.11", "3.11.2")
    put(tmp_path / "bin", "python3.12", "exit 127")  # what pyenv leaves for a version that is not active
    assert run(".ci/pythons").stdout == f"3.11.2 {chosen}\n"


def test_make_takes_it_and_python_overrides(run, tmp_path):
    chosen = other(tmp_path / "bin", "python3.13", "3.13.1")
    assert f'.ci/environment .venv "{chosen}"' in run("make", "-n", "environment").stdout
    assert '.ci/environment .venv "python3.12"' in run("make", "-n", "environment", "PYTHON=python3.12").stdout


def test_without_any_it_says_what_to_install(run):
    done = run("make", "environment")
    assert done.returncode != 0
    assert "no supported Python here; install one (>=3.11.2,<3.15" in done.stderr
    assert "apt-get install python3" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_that_is_named_and_not_supported_is_refused(run, tmp_path):
    named = other(tmp_path / "bin", "python3.10", "3.10.14")
    for python in (str(named), "/nonexistent/python3"):
        done = run("make", "environment", f"PYTHON={python}")
        assert f"{python} is missing or not supported (>=3.11.2,<3.15" in done.stderr


@pytest.mark.slow
def test_an_environment_of_another_version_is_made_anew_and_of_the_same_is_kept(run, tmp_path):
    link(tmp_path / "bin", "python3")
    folder = tmp_path / "environment"
    assert run("sh", ".ci/environment", str(folder), "python3").returncode == 0
    (folder / "mark").touch()
    assert run("sh", ".ci/environment", str(folder), "python3").returncode == 0
    assert (folder / "mark").exists()
    other(folder / "bin", "python", "3.14.0")
    assert run("sh", ".ci/environment", str(folder), "python3").returncode == 0
    assert not (folder / "mark").exists()
    assert os.access(folder / "bin" / "python", os.X_OK)
