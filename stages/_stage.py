"""What all stages share: `--help`, settings, and an error that a user can mend shown without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from segmentation.errors import PipelineError
from segmentation.settings import Settings, load_settings


def run_stage(stage: Callable[[Settings], None], description: str | None, *instead: Callable[[Settings], None]) -> None:
    """Parse the command line, read and check all settings, then run the stage; a `PipelineError` exits with 1.

    Args:
        stage: what DVC runs.
        description: for `--help`.
        instead: what an option of the function's name runs instead; its docstring is the option's help.
    """
    parser = argparse.ArgumentParser(description=description)
    for function in instead:
        parser.add_argument(
            f"--{function.__name__}", action="store_const", const=function, dest="run", help=function.__doc__
        )
    parser.set_defaults(run=stage)
    run = parser.parse_args().run
    _end_with_starter()
    try:
        run(load_settings())
    except PipelineError as error:
        sys.exit(f"error: {error}")


def _end_with_starter() -> None:
    """End this process when the DVC or the flow that started it is killed: nobody would take its results.

    DVC marks the stages that it starts with `DVC_ROOT`, the flow with its process id in `FLOW_PID`.
    """
    if "DVC_ROOT" not in os.environ:
        return
    parent, flow = os.getppid(), os.environ.get("FLOW_PID")

    def watch() -> None:
        while os.getppid() == parent and (flow is None or psutil.pid_exists(int(flow))):
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os.write(2, b"error: what started this stage is gone; stopping\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
