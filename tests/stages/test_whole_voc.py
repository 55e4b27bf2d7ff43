"""The complete VOC 2012 from its archive to checked data, as a new user runs it; VOC's own files are drawn."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.official_voc import MOST_VOID, TRAIN, VAL, write_official
from tests.stages.test_pipeline import DVC, ran, set_params

LIMIT = 480  # seconds on two idle cores, for a run of all 2,913 pairs

# `python3` for DVC: runs the real one, and writes down what was asked for and its peak memory in KiB.
RECORDING = f"""#!{sys.executable} -IS
import os, sys
pid = os.spawnv(os.P_NOWAIT, {sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
with open({{record!r}}, "a") as record:
    record.write(f"{{{{sys.argv[-1]}}}} {{{{used.ru_maxrss}}}}\\n")
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@pytest.fixture
def validated(new_checkout, tmp_path):
    """Runs `dvc repro validate` on an archive of so many pairs.

    Returns what it printed, seconds, the peak memory of each stage in KiB, and `data_checks.json`.
    """

    def run(train: int, val: int) -> tuple[str, float, dict[str, int], dict[str, Any]]:
        archive, record, bin_folder = tmp_path / f"voc_{train}.tar", tmp_path / f"record_{train}", tmp_path / "bin"
        write_official(archive, train, val)
        with archive.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        bin_folder.mkdir(exist_ok=True)
        (bin_folder / "python3").write_text(RECORDING.format(record=str(record)))
        (bin_folder / "python3").chmod(0o755)
        checkout = new_checkout()
        set_params(checkout, {"fetch.archive": str(archive), "fetch.md5": md5, "encoder.pretrained": False})
        env = environment()
        started = time.monotonic()
        done = subprocess.run(
            [*DVC, "repro", "validate"], cwd=checkout, env=env | {"PATH": f"{bin_folder}:{env['PATH']}"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - started
        assert done.returncode == 0, done.stdout
        assert ran(done.stdout) == ["fetch", "preprocess", "validate"]
        peaks = dict(line.removeprefix("stages.").split() for line in record.read_text().splitlines())
        checked = json.loads((checkout / "reports/data_checks.json").read_text())
        archive.unlink()
        shutil.rmtree(checkout)  # gigabytes, of which pytest would keep three
        return done.stdout, seconds, {stage: int(peak) for stage, peak in peaks.items()}, checked

    return run


@pytest.mark.slow
def test_the_whole_of_voc_is_fetched_resized_and_checked_in_minutes_and_in_the_memory_of_a_part(validated):
    _, _, small, _ = validated(300, 300)
    output, seconds, large, checked = validated(TRAIN, VAL)
    print(output, f"{seconds:.0f} s; peak memory in KiB with 600 pairs {small}, with 2,913 {large}", sep="\n")
    assert seconds <= LIMIT
    assert set(large) == {"fetch", "preprocess", "validate"}
    assert all(large[stage] <= 1.1 * small[stage] for stage in large), (small, large)

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
