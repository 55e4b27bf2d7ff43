"""What a user sees of a long piece of work: in real processes, with a real clock, into a pipe and on a terminal."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import grimp
import pytest

from segmentation import progress
from segmentation.progress import Progress, lines_to

WORK = """
import sys, time
from segmentation import progress
from segmentation.progress import Progress

progress.EVERY = 0.2
"""
COUNTED = (
    WORK
    + """
print("before")
with Progress("encode", 40, "photo", before=10) as shown:
    for _ in range(30):
        time.sleep(0.03)
        shown.advance()
print("after")
"""
)


def start(code: str, root: Path, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **options)


def piped(code: str, root: Path) -> list[str]:
    """The lines that a process writes to stdout; nothing may be on stderr."""
    child = start(code, root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert out.endswith("\n")
    return out.splitlines()


def on_a_terminal(code: str, root: Path, columns: int) -> str:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = start(code, root, stdout=writer, stderr=writer)
    os.close(writer)
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(reader)
    assert child.wait(timeout=60) == 0
    return shown.decode()


def test_into_a_pipe_go_whole_lines_in_order_with_what_the_stage_prints(root):
    first, *lines, last = piped(COUNTED, root)
    assert (first, last) == ("before", "after")
    assert 3 <= len(lines) <= 5
    for line in lines:
        assert re.fullmatch(r"encode: \d\d of 40 photos \(\d\d ?%\), \d+\.\d a second, [01] s left", line)


def test_rate_and_time_left_do_not_count_what_was_done_before(root):
    """30 of 40 in 30 × 0.03 s: with all 40 counted the rate would be a third higher from the start, and falling."""
    code = (
        WORK
        + """
with Progress("encode", 1010, "photo", before=1000) as shown:
    for _ in range(2):
        time.sleep(0.45)
        shown.advance()
"""
    )
    *_, last = piped(code, root)
    found = re.fullmatch(r"encode: 1,001 of 1,010 photos \(99 ?%\), (\S+) (?:s a photo|a second), (\d+) s left", last)
    assert found
    assert 4 <= float(found[2]) <= 12  # nine more at half a second each


def test_lines_come_while_a_single_item_takes_longer(root):
    code = (
        WORK
        + """
with Progress("evaluate", 3, "photo") as shown:
    time.sleep(0.7)
"""
    )
    lines = piped(code, root)
    assert len(lines) == 3
    assert lines[0] == "evaluate: 0 of 3 photos (0%), 0 s so far"


def test_lines_come_at_once_and_not_at_the_end(root):
    child = start(WORK + "with Progress('wait'): time.sleep(60)", root, stdout=subprocess.PIPE)
    started = time.monotonic()
    assert child.stdout.readline().startswith("wait: ")
    assert time.monotonic() - started < 30
    child.kill()
    child.communicate()


def test_bytes_of_an_unknown_total(root):
    code = (
        WORK
        + """
with Progress("download", None, "B", before=5_000_000) as shown:
    shown.advance(2_000_000)
    time.sleep(0.3)
"""
    )
    assert re.fullmatch(r"download: 7 MB, \d+\.\d MB a second", piped(code, root)[0])


def test_what_ends_sooner_prints_nothing(root):
    code = """
from segmentation.progress import Progress

with Progress("fetch", 9, "file") as shown:
    shown.advance(9)
print("done")
"""
    assert piped(code, root) == ["done"]


def test_on_a_terminal_the_bar_stays_and_no_line_comes(root):
    shown = on_a_terminal(COUNTED, root, 80)
    assert "\rencode:" in shown
    assert "40/40" in shown
    assert "a second" not in shown
    assert re.search(r"40/40 \[.*\r\nafter\r\n$", shown)


def test_a_terminal_without_a_width_has_no_room_for_a_bar_and_gets_lines(root):
    assert "of 40 photos" in on_a_terminal(COUNTED, root, 0)


@pytest.mark.parametrize("ending", ["raise SystemExit('error: the disk is full')", "time.sleep(60)"])
def test_an_error_or_ctrl_c_ends_it_at_once_without_half_a_line(root, ending):
    code = (
        WORK
        + f"""
with Progress("encode", 3, "photo") as shown:
    time.sleep(0.5)
    print("now", flush=True)
    {ending}
"""
    )
    child = start(code, root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line == "now\n":
            break
    began = time.monotonic()
    child.send_signal(signal.SIGINT if "sleep" in ending else signal.SIGCONT)
    rest, err = child.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert child.returncode not in (0, None)
    assert ("KeyboardInterrupt" if "sleep" in ending else "error: the disk is full") in err
    assert all(line.endswith("\n") for line in [*lines, *rest.splitlines(keepends=True)])


def test_a_reader_that_goes_away_does_not_end_the_work(root, tmp_path):
    code = (
        WORK
        + f"""
with Progress("encode", 3, "photo") as shown:
    time.sleep(1)
open({str(tmp_path / "done")!r}, "w").close()
"""
    )
    child = start(code, root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    child.wait(timeout=20)
    assert (tmp_path / "done").exists()
    assert "Traceback" not in child.stderr.read().replace("Exception ignored", "")
    child.stderr.close()


def test_no_thread_is_left_and_lines_go_where_a_flow_wants_them(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    threads, lines = threading.active_count(), []
    with lines_to(lines.append), Progress("promote", 2, "photo", note=lambda: "loss 0.5") as shown:
        shown.advance()
        time.sleep(0.3)
    assert threading.active_count() == threads
    assert len(lines) >= 2
    assert all(line.startswith("promote: 1 of 2 photos (50%), ") and line.endswith("loss 0.5") for line in lines)


def test_counting_costs_next_to_nothing():
    started = time.perf_counter()
    with Progress("encode", 100_000, "photo") as shown:
        for _ in range(100_000):
            shown.advance()
    assert time.perf_counter() - started < 1  # 10 µs an item would be nothing, too


def test_nothing_else_draws_bars_of_its_own():
    """A bar of tqdm's is silent in a pipe, or fills a log with its control characters."""
    graph = grimp.build_graph("segmentation", "stages", "flows", include_external_packages=True, cache_dir=None)
    assert graph.find_modules_that_directly_import("tqdm") == {"segmentation.progress"}
