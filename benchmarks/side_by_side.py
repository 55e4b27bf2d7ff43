"""What the benchmarks share: two sides take turns in one process, medians, peak memory, a table and its JSON."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segmentation.data.images import read_mask, resize_mask
from segmentation.data.voc import VocFolder
from segmentation.errors import PipelineError
from segmentation.files import write_json
from segmentation.settings import Settings, load_settings

SUBSET = Path(__file__).resolve().parents[2] / "shared" / "voc2012-subset" / "VOCdevkit" / "VOC2012"
PARAMS = Path(__file__).resolve().parents[1] / "params.yaml"


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line with `--voc` and `--json`."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--voc", type=Path, default=SUBSET, help="a folder in VOC layout (default: %(default)s)")
    made.add_argument("--json", type=Path, help="write the result to this file, too")
    return made


def run(made: argparse.ArgumentParser, benchmark: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Run it with what was parsed; what it returns goes to `--json` with the machine it comes from."""
    arguments = made.parse_args()
    if not arguments.voc.is_dir():
        made.error(f"{arguments.voc}: not found; name a folder in VOC layout with --voc")
    arguments.voc = arguments.voc.resolve()
    result = arguments.json.resolve() if arguments.json else None
    try:
        values = {"machine": machine(), **benchmark(arguments)}
    except PipelineError as error:
        sys.exit(f"error: {error}")
    if result:
        write_json(result, values)


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round; a slow moment of the machine slows both."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(timed(side))
    return seconds


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(plain: list[float], ours: list[float]) -> dict[str, float]:
    """Medians, and how many times the plain one is slower."""
    medians = statistics.median(plain), statistics.median(ours)
    return {"plain_s": medians[0], "ours_s": medians[1], "ratio": medians[0] / medians[1]}


def line(name: str, row: Mapping[str, float], unit: str = "s") -> None:
    print(f"{name:44}{row['plain_s']:10.3f} {unit}{row['ours_s']:10.3f} {unit}{row['ratio']:8.2f}×", flush=True)


class Call(NamedTuple):
    """A call's seconds, and the peak resident memory in GB of the process that made it."""

    seconds: float
    peak_gb: float


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Call:
    """Call a function in a process of its own (Linux)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_call, args=(sender, function, arguments))
    child.start()
    sender.close()
    call = receiver.recv()
    child.join()
    return call


def _call(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # else loader processes would be spawned in their turn, which takes seconds each
    multiprocessing.set_start_method(None, force=True)  # the platform's
    seconds = timed(partial(function, *arguments))
    # not getrusage: its figure starts with that of the process that spawned this one
    (peak,) = (entry for entry in Path("/proc/self/status").read_text().splitlines() if entry.startswith("VmHWM"))
    sender.send(Call(seconds, int(peak.split()[1]) / 2**20))


def settings_for(voc: Path, **overrides: Any) -> Settings:
    """The defaults on `voc` with random weights; an override's `__` is the dot of its key."""
    values = {"fetch.source": "directory", "fetch.directory": str(voc), "encoder.pretrained": False}
    return load_settings(PARAMS, values | {key.replace("__", "."): value for key, value in overrides.items()})


def real_masks(voc: Path, count: int, size: int) -> torch.Tensor:
    """The first val masks that have void and more than one class, `[count, size, size]` uint8."""
    folder, masks = VocFolder(voc), []
    for name in folder.ids("val"):
        mask = torch.tensor(resize_mask(read_mask(folder.mask(name)), size))
        if len(mask.unique()) > 2 and (mask == 255).any():
            masks.append(mask)
        if len(masks) == count:
            break
    return torch.stack(masks)
