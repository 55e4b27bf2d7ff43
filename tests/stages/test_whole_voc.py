"""The complete VOC 2012 from its archive to checked data, as a new user runs it; VOC's own files are drawn."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.official_voc import MOST_VOID, TRAIN, VAL, write_official
from tests.stages.test_pipeline import DVC, ran, set_params

LIMIT = 480  # seconds that two idle cores may take for all 2,913 pairs

# `python3` for DVC: runs the real one, and writes down what was asked for and its peak memory in KiB.
RECORDING = f"""#!{sys.executable} -IS
import os, sys
pid = os.spawnv(os.P_NOWAIT, {sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
with open({{record!r}}, "a") as record:
    record.write(f"{{{{sys.argv[-1]}}}} {{{{used.ru_maxrss}}}}\\n")
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass
class Run:
    """What `dvc repro validate` printed, how long it and its children took, and what they wrote."""

    output: str
    seconds: float
    cpu_seconds: float
    peaks: dict[str, int]  # KiB, by stage
    checks: dict[str, Any]


@pytest.fixture
def archive(tmp_path) -> Iterator[Path]:
    path = tmp_path / "VOCtrainval_11-May-2012.tar"
    write_official(path)
    yield path
    path.unlink()


@pytest.fixture
def validate(new_checkout, tmp_path, archive):
    """Runs `dvc repro validate` on the first pairs of each split, or on all."""

    def run(limit: int | None) -> Run:
        folder, checkout = tmp_path / f"{limit}", new_checkout()
        folder.mkdir()
        record, python = folder / "record", folder / "python3"
        python.write_text(RECORDING.format(record=str(record)))
        python.chmod(0o755)
        with archive.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        changes = {"fetch.archive": str(archive), "fetch.md5": md5, "encoder.pretrained": False}
        set_params(checkout, changes | ({"fetch.limit": limit} if limit else {}))
        env = environment()
        started, before = time.monotonic(), cpu_seconds()
        try:
            done = subprocess.run(
                [*DVC, "repro", "validate"], cwd=checkout, env=env | {"PATH": f"{folder}:{env['PATH']}"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            seconds, cpu = time.monotonic() - started, cpu_seconds() - before
            assert done.returncode == 0, done.stdout
            peaks = [line.removeprefix("stages.").split() for line in record.read_text().splitlines()]
            checks = json.loads((checkout / "reports/data_checks.json").read_text())
            return Run(done.stdout, seconds, cpu, {stage: int(peak) for stage, peak in peaks}, checks)
        finally:
            shutil.rmtree(checkout)  # gigabytes, of which pytest would keep three

    return run


def cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_the_whole_of_voc_is_fetched_resized_and_checked_in_minutes_and_in_the_memory_of_a_part(validate):
    small, large = validate(300), validate(None)
    measured = f"{large.seconds:.0f} s, of the CPU {large.cpu_seconds:.0f} s; peaks {large.peaks}, of 600 {small.peaks}"
    print(large.output, measured, sep="\n")
    # where others use the cores, the clock tells of them, too; idle cores share the CPU's time, and wait for the disk
    assert min(large.seconds, large.cpu_seconds) <= LIMIT, measured
    assert ran(large.output) == list(large.peaks) == ["source", "fetch", "preprocess", "validate"]
    assert all(large.peaks[stage] <= 1.1 * small.peaks[stage] for stage in large.peaks), measured

    output, checked = large.output, large.checks
    assert {split: found["pairs"] for split, found in checked["splits"].items()} == {"train": TRAIN, "val": VAL}
    assert checked["result"] == "passed with warnings"
    (broken,) = [rule for rule in checked["rules"] if not rule["passed"]]
    assert (broken["rule"], broken["severity"]) == ("void_share", "warning")
    found = {Path(offender["file"]).stem: offender["found"] for offender in broken["first_offenders"]}
    shares = {identifier: float(text.removeprefix("void share ")) for identifier, text in found.items()}
    assert shares == pytest.approx(MOST_VOID, abs=0.003)
    assert "warning: void_share" in output
    for identifier, text in found.items():
        assert f"SegmentationClass/{identifier}.png  {text}" in output
