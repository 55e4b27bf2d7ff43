"""An orchestrated run is a DVC experiment: run one, find its commit, copy out what people want to look at."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from ruamel.yaml import YAML

from flows.password import CLIENT, SERVER
from segmentation.data.voc import VocFolder, parse_lines
from segmentation.errors import PipelineError
from segmentation.files import sha256_file, sha256_json
from segmentation.paths import (
    DATA_CHECKS,
    EVALUATION,
    MODEL,
    RAW,
    REPORT,
    TRAINING,
    check_checkout,
    project_root,
)
from segmentation.settings import Settings, load_settings

GRACE_SECONDS = 10


@dataclass(frozen=True)
class Revision:
    """A commit that pins a finished run: an experiment's, or any git commit with a complete `dvc.lock`."""

    name: str
    commit: str
    baseline: str


def new_name() -> str:
    """A name for an experiment, unique and in order of time."""
    return f"train-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:4]}"


def run_experiment(
    name: str, overrides: Mapping[str, Any], isolated: bool, env: Mapping[str, str], log: Callable[[str], None]
) -> Revision:
    """Run `dvc exp run` as a child process, its output line by line to `log`.

    Whatever ends this function, a cancelled flow included, ends the child and everything that it started.

    Args:
        name: the experiment's.
        overrides: values by dotted key of `params.yaml`.
        isolated: in a temporary copy; else in the checkout itself.
        env: added to the child's environment.
        log: takes a line.

    Raises:
        PipelineError: a stage failed; with the lines that say why.
    """
    check_repository(isolated)
    command = [sys.executable, "-m", "dvc", "exp", "run", "--name", name, *(["--temp"] if isolated else [])]
    for key, value in overrides.items():
        command += ["--set-param", f"{key}={_hydra(key, value)}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "FLOW_PID": str(os.getpid())} | dict(env)
    for password in (SERVER, CLIENT):  # stages talk to no Prefect server
        environment.pop(password, None)
    child = subprocess.Popen(
        command, cwd=project_root(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last: deque[str] = deque(maxlen=10)
    why: list[str] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            text = line.rstrip()
            # DVC says this of every output that a fresh clone does not have yet
            if text and not text.startswith("WARNING: No file hash info found"):
                log(text)
                last.append(text)
                # from the first line that a stage or DVC marks as an error, each line once
                if (why or text.lower().startswith(("error", "traceback"))) and text not in why:
                    why.append(text)
        code = child.wait()
    finally:
        kill_tree(child.pid)
    if code:
        raise PipelineError(f"`dvc exp run` failed (exit code {code}):\n" + "\n".join(why or last))
    return find_revision(name)


def kill_tree(pid: int) -> None:
    """End a process and all its descendants: ask, then insist."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(family, timeout=GRACE_SECONDS)[1]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def find_revision(name: str) -> Revision:
    """The revision that an experiment's name or a git revision stands for.

    Raises:
        PipelineError: there is none.
    """
    check_repository()
    for line in _git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines():
        commit, ref = line.split(" ", 1)
        parts = ref.split("/")  # refs/exps/<2 digits>/<38 digits of the commit it started from>/<name>
        if parts[-1] == name and len(parts) == 5:
            return Revision(name, commit, parts[2] + parts[3])
    found = _try_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode:
        raise PipelineError(f"{name!r} is no experiment (`dvc exp list`) and no git revision")
    commit = found.stdout.decode().strip()
    # Named by its commit: what `HEAD` or a branch stands for changes, and so would what lies in its folder.
    return Revision(commit[:12], commit, commit)


def copy_out(revision: Revision) -> Path:
    """Copy parameters, model and reports of a revision to `runs/<name>/`, and return that folder.

    What lay there is replaced as a whole: a killed or an older copy never mixes with this one.

    Raises:
        PipelineError: the revision lacks an output, or DVC's cache does.
    """
    from dvc.api import DVCFileSystem

    folder = project_root() / "runs" / revision.name
    files = DVCFileSystem(str(project_root()), rev=revision.commit)
    folder.parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _fetch_outputs(files, revision, fresh)
        fresh.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _fetch_outputs(files: Any, revision: Revision, folder: Path) -> None:
    for path in ("params.yaml", "dvc.lock", DATA_CHECKS, MODEL, TRAINING, EVALUATION, REPORT):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            files.get(str(path), str(target), recursive=files.isdir(str(path)))
        except OSError as error:
            raise PipelineError(
                f"{path} of {revision.name} cannot be had: {error}; run `dvc repro` and commit, or `dvc pull`"
            ) from None


def evaluation_set(commit: str) -> Iterator[tuple[bytes, bytes]]:
    """Photo and mask of every val pair in list order, as the files lie in the `data/raw` of a run's commit.

    Raises:
        PipelineError: this checkout lacks the commit, or DVC's cache the files.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    folder = VocFolder(RAW)
    try:
        files = DVCFileSystem(str(project_root()), rev=commit)
        for identifier in parse_lines(files.read_bytes(str(folder.split_file("val")))):
            yield files.read_bytes(str(folder.photo(identifier))), files.read_bytes(str(folder.mask(identifier)))
    except (OSError, DvcException, SCMError) as error:
        raise PipelineError(
            f"{RAW} of {commit[:12]} cannot be had: {error}; run this in the checkout that trained the version, or get "
            "the experiment (`dvc exp pull`) and its data (`dvc pull`)"
        ) from None


def lineage(revision: Revision, folder: Path) -> dict[str, str]:
    """Where a run comes from, as tags of its model version.

    Args:
        revision: the run.
        folder: what `copy_out` returned.

    Raises:
        PipelineError: `dvc.lock` is of other parameters or code than the revision's.
    """
    changed = _git("diff", "--name-only", revision.baseline, revision.commit, "--", ":!dvc.lock", ":!params.yaml")
    lock, params = (YAML(typ="safe").load((folder / name).read_text()) for name in ("dvc.lock", "params.yaml"))
    _check_lock(revision, lock, params)
    checks = json.loads((folder / DATA_CHECKS).read_text(encoding="utf-8"))
    return {
        "experiment": revision.name,
        "experiment_commit": revision.commit,
        "git_commit": revision.baseline,
        "git_dirty": "true" if changed.strip() else "false",
        "dvc_lock_sha256": sha256_file(folder / "dvc.lock"),
        "data_hash": lock["stages"]["fetch"]["outs"][0]["md5"],
        "evaluation_set_sha256": checks["splits"]["val"]["sha256"],
        "params_sha256": sha256_json(params),
        "data_checks": checks["result"],
    }


def _check_lock(revision: Revision, lock: dict[str, Any], params: dict[str, Any]) -> None:
    """Whether the results that `dvc.lock` names are those of the revision's parameters and code."""
    stages = lock["stages"].values()
    stale = {
        f"params.yaml: {key.partition('.')[0]}"  # the key is a section, or one key of it with a dot
        for stage in stages
        for key, value in stage.get("params", {}).get("params.yaml", {}).items()
        if _value(params, key) != value
    }
    # stages share modules: each is asked for once
    code = {
        (dep["path"], dep["md5"]) for stage in stages for dep in stage.get("deps", ()) if dep["path"].endswith(".py")
    }
    for path, md5 in code:
        shown = _try_git("show", f"{revision.commit}:{path}")  # a file that the commit lacks is another one, too
        if hashlib.md5(shown.stdout, usedforsecurity=False).hexdigest() != md5:
            stale.add(path)
    if stale:
        raise PipelineError(
            f"dvc.lock of {revision.name} is of another {', '.join(sorted(stale))}; "
            "run `dvc repro`, commit, and register that"
        )


def _value(params: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return params.get(section, {}).get(name) if name else params.get(section)


def check_settings(overrides: Mapping[str, Any], named: str) -> Settings:
    """The settings of a run, after all that can be known of them without data, network or server.

    Args:
        overrides: values by dotted key of `params.yaml`.
        named: where they come from, as the user knows it.

    Raises:
        PipelineError: a key, a value or the encoder is refused.
    """
    settings = load_settings(project_root() / "params.yaml", overrides, named)
    for key, value in overrides.items():
        _hydra(key, value)
    from segmentation.model.encoder import check_encoder  # torch takes seconds

    check_encoder(settings.encoder, settings.preprocess.image_size, settings.decoder.skip_connections)
    return settings


def check_repository(isolated: bool = False) -> None:
    """Whether git can keep a run here. DVC commits uncommitted edits to carry them along, and that needs a name.

    Args:
        isolated: whether the run takes place in a copy, which DVC makes through git.

    Raises:
        PipelineError: it cannot; with git's own words where they say more.
    """
    check_checkout()
    where = project_root()
    found = _try_git("rev-parse", "--is-inside-work-tree")
    if b"not a git repository" in found.stderr:
        raise PipelineError(
            f"{where}: no git repository, and a run is kept as a commit; "
            "clone the project, or: git init && git add -A && git commit"
        )
    if found.returncode:
        raise PipelineError(f"{where}: git refuses this folder:\n{found.stderr.decode(errors='replace').strip()}")
    if found.stdout.strip() != b"true":
        raise PipelineError(f"{where}: this is git's own folder or a bare repository; clone it, and run in the clone")
    if _try_git("rev-parse", "--verify", "--quiet", "HEAD").returncode:
        raise PipelineError(
            f"{where}: the git repository has no commit yet, and a run starts from one: git add -A && git commit"
        )
    if isolated and _git("rev-parse", "--is-shallow-repository").strip() == "true":
        raise PipelineError(
            f"{where}: a shallow clone (git clone --depth), from whose copies DVC brings back no result; get the whole "
            "history (git fetch --unshallow), or run in the checkout itself (--in-place; deployments: isolated=false)"
        )
    if not _git("status", "--porcelain", "--untracked-files=no"):
        return
    for key in ("user.name", "user.email"):
        if not _git("config", "--default", "", "--get", key).strip():
            raise PipelineError(
                f"git config: {key} is not set, and uncommitted edits travel along as a commit; "
                f"set it (git config {key} …), or commit or stash the edits"
            )


def _git(*arguments: str) -> str:
    done = _try_git(*arguments)
    if done.returncode:
        raise PipelineError(f"`git {' '.join(arguments)}` failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def _try_git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        # in English: its words are looked at
        return subprocess.run(
            ["git", *arguments], cwd=project_root(), env=os.environ | {"LC_ALL": "C"}, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise PipelineError(
            "git: not found, and a run is kept as a commit; install it (Debian, Ubuntu: apt-get install git)"
        ) from None


def _hydra(key: str, value: Any) -> str:
    """A value in the grammar of `dvc exp run --set-param`, which is Hydra's."""
    text = json.dumps(value, ensure_ascii=False)
    if "${" in text:
        raise PipelineError(f"{key}: {value!r} holds ${{, which DVC would replace; write it into params.yaml instead")
    if isinstance(value, str):
        # a backslash stands for itself, but before a quote
        return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"
    return text
