"""What is wrong with a command line by hand shows before Prefect or a server is started."""

import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

import pytest

from flows.experiment import check_repository
from segmentation.errors import PipelineError
from tests.conftest import environment, git

HEAVY = {"prefect", "mlflow", "pandas", "dvc"}


def by_hand(
    flow: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """A finished `python -m flows.<flow>`, its messages without the import times, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", f"flows.{flow}", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment() | (env or {}), text=True, capture_output=True, check=False
    )
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, imported


@pytest.mark.parametrize("flow", ["train", "register", "promote", "rollback", "predict", "services"])
def test_help_needs_neither_prefect_nor_torch(flow, root):
    done, imported = by_hand(flow, "--help", cwd=root)
    assert done.returncode == 0
    assert f"usage: python -m flows.{flow}" in done.stdout
    assert "flows" in imported
    assert not imported & (HEAVY | {"torch"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set=train.epoch=3"], "--set: refused\n  train.epoch: unknown key (value 3); did you mean train.epochs?"),
        (["--set=train.image_size=56"], "did you mean preprocess.image_size?"),
        (["--set=epochs=3"], "--set: 'epochs' is no key; write it as section.key, for example train.epochs"),
        (["--set=train.epochs=0"], "--set: refused\n  train.epochs: 0 is out of range"),
        (["--set=train.lr"], "--set train.lr: write it as key=value"),
        (["--set=train.lr=[1"], "--set train.lr=[1: '[1' is no YAML value"),
        (["--set=fetch.url=a${b}"], "fetch.url: 'a${b}' holds ${"),
        (["--deployment=sampel"], "--deployment sampel: prefect.yaml has voc2012, sample"),
        (
            ["--deployment=sample", "--set=train.lr=x"],
            "--set, or train/sample in prefect.yaml: refused\n  train.lr: 'x'",
        ),
    ],
)
def test_what_is_wrong_is_said_once_and_at_once(arguments, says, root):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done, imported = by_hand("train", *arguments, cwd=root)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count(says) == 1
    assert "params.yaml: " not in done.stderr
    assert done.stdout == ""
    assert not imported & (HEAVY | {"torch"})
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    )  # of processor time: others run, too


def test_a_wrong_encoder_is_refused_before_a_server(root):
    done, imported = by_hand("train", "--set=encoder.name=vit_smal_patch14_dinov2", cwd=root)
    assert (done.returncode, "torch" in imported) == (1, True)
    assert (
        "encoder.name: timm knows no 'vit_smal_patch14_dinov2'; the nearest is vit_small_patch14_dinov2" in done.stderr
    )
    assert not imported & HEAVY


def test_a_fault_of_the_file_is_not_blamed_on_the_command_line(root, tmp_path):
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text().replace("epochs: 8 ", "epochs: 0 "))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "--quiet", "-m", "x")
    done, _ = by_hand("train", "--set=train.keep=lst", cwd=tmp_path, env={"PYTHONPATH": str(root)})
    assert "params.yaml: refused\n  train.epochs: 0 is out of range" in done.stderr
    assert "--set: refused\n  train.keep: 'lst' is not one of best, last; the nearest is last" in done.stderr


def repository(root: Path, folder: Path) -> Path:
    shutil.copy(root / "params.yaml", folder)
    git(folder, "init", "--quiet")
    return folder


def refused(root: Path, folder: Path, **env: str) -> str:
    done, imported = by_hand("train", cwd=folder, env={"PYTHONPATH": str(root)} | env)
    assert done.returncode == 1
    assert not imported & HEAVY
    return done.stderr


def test_a_folder_without_a_repository_is_told_to_make_one(root, tmp_path):
    assert "no git repository, and a run is kept as a commit; clone the project, or: git init" in refused(
        root, tmp_path
    )


def test_a_repository_without_a_commit_is_told_to_make_one(root, tmp_path):
    assert "has no commit yet, and a run starts from one: git add" in refused(root, repository(root, tmp_path))


def test_a_checkout_of_someone_else_gets_gits_own_words(root, tmp_path):
    """git's own switch for its tests: every folder is another account's."""
    said = refused(root, repository(root, tmp_path), GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert "detected dubious ownership" in said
    assert f"git config --global --add safe.directory {tmp_path}" in said
    assert "git init" not in said


def test_a_shallow_clone_is_refused_before_anything_runs_but_not_in_place(root, tmp_path):
    """From its copies DVC brings nothing back, after all the training."""
    (tmp_path / "whole").mkdir()
    git(tmp_path / "whole", "init", "--quiet")
    (tmp_path / "whole/params.yaml").write_bytes((root / "params.yaml").read_bytes())
    for message in ("one", "two"):
        git(tmp_path / "whole", "add", "-A")
        git(tmp_path / "whole", "commit", "--quiet", "--allow-empty", "-m", message)
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{tmp_path}/whole", "clone")
    said = refused(root, tmp_path / "clone")
    assert f"error: {tmp_path}/clone: a shallow clone (git clone --depth)" in said
    assert "git fetch --unshallow" in said
    assert "--in-place" in said
    with chdir(tmp_path / "clone"):
        with pytest.raises(PipelineError, match="a shallow clone"):
            check_repository(isolated=True)
        check_repository(isolated=False)
        git(tmp_path / "clone", "fetch", "--quiet", "--unshallow")
        check_repository(isolated=True)


@pytest.mark.parametrize("name", ["a#b", "a?b", "50%"])
def test_a_checkout_that_no_tool_can_address_is_refused_at_once(root, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "x")
    says = f"error: {folder}: has {name.strip('ab50')} in its path"
    assert says in refused(root, folder)
    for flow in ("predict", "services"):
        done, imported = by_hand(flow, *["x"] * (flow == "predict"), cwd=folder, env={"PYTHONPATH": str(root)})
        assert (done.returncode, says in done.stderr) == (1, True)
        assert not imported & HEAVY
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("flow", "arguments"),
    [("train", []), ("register", ["HEAD"]), ("promote", []), ("rollback", ["why"]), ("predict", ["photos"])],
)
def test_a_misspelled_store_is_refused_before_anything_starts(root, flow, arguments):
    done, imported = by_hand(flow, *arguments, cwd=root, env={"MLFLOW_TRACKING_URI": "localhost:5000"})
    assert done.returncode == 1
    assert done.stderr == "error: MLFLOW_TRACKING_URI: localhost:5000 lacks its scheme; write http://localhost:5000"
    assert not imported & HEAVY


def test_a_bare_repository_is_named(root, tmp_path):
    git(tmp_path, "init", "--quiet", "--bare")
    assert "bare repository; clone it" in refused(root, tmp_path)


def test_a_machine_without_git_is_told_to_install_it(root, tmp_path):
    said = refused(root, tmp_path, PATH=str(Path(sys.executable).parent))
    assert "git: not found" in said
    assert "install it" in said


BY_HAND = """
import sys
from pathlib import Path
from flows import command_line
command_line.read(lambda: None)
from prefect import flow
from flows.local import by_hand
@flow
def nothing() -> str:
    return "ran"
with by_hand():
    print(nothing())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("flows", "home"), [(3, "/nonexistent"), (1, "")])
def test_flows_in_a_new_checkout_make_one_database(tmp_path, root, flows, home):
    """At once, without a home folder: two servers that make the same database both die of it. Behind a proxy, too."""
    shutil.copy(root / "prefect.toml", tmp_path)
    proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env = environment() | proxy | {"PYTHONPATH": str(root)} | ({"HOME": home} if home else {})

    def run(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BY_HAND]
        return subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False)

    with ThreadPoolExecutor(flows) as pool:
        ended = list(pool.map(run, range(flows)))
    for done in ended:
        assert done.returncode == 0, done.stderr
        assert "ran" in done.stdout
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        assert len(done.stderr.splitlines()) < 15
    assert (tmp_path / "scratch/prefect-by-hand/prefect.db").exists()


def test_a_prefect_home_that_cannot_be_written_is_named(tmp_path, root):
    (tmp_path / "file").write_text("no folder")
    env = environment() | {"PYTHONPATH": str(root), "PREFECT_HOME": str(tmp_path / "file/home")}
    command = [sys.executable, "-c", BY_HAND]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert f"PREFECT_HOME: {tmp_path}/file/home cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
