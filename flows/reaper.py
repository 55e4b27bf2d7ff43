"""Ends Prefect's temporary server when the flow that started it was killed: `python reaper.py PID`.

A process of its own, because SIGKILL leaves the flow no time to do it.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import psutil


def main(pid: int) -> None:
    """Wait for the flow's end, then kill what is left of the servers that it had started."""
    servers: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        flow = psutil.Process(pid)
        while flow.is_running() and flow.status() != psutil.STATUS_ZOMBIE:
            for child in flow.children():
                with suppress(psutil.NoSuchProcess):
                    if "prefect.server" in " ".join(child.cmdline()):
                        servers.add(child)
            time.sleep(0.5)
    for server in servers:
        with suppress(psutil.NoSuchProcess):
            server.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]))
