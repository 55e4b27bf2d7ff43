"""Serve the champion over HTTP: `python -m serving`.

The model comes from the registry at MLFLOW_TRACKING_URI, or from this checkout's own store (mlruns/). When the alias
`champion` moves there, the server follows within seconds. docs/serving.md describes the rest.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys

import uvicorn

from segmentation.errors import PipelineError
from serving.app import create_app
from serving.champion import Champion
from serving.http import configure
from serving.worker import Worker


def main() -> None:
    """Parse the command line and serve until Ctrl-C or SIGTERM; exit with 1 when there is nothing to serve."""
    parser = argparse.ArgumentParser(
        prog="python -m serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; in a container: 0.0.0.0)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # else a line at each try when MLflow is away
    log = logging.getLogger("serving")
    log.setLevel(logging.INFO)
    try:
        listening = bind(arguments.host, arguments.port)  # before the model is loaded, which takes longer
        worker = Worker()
        champion = Champion(worker.check)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    champion.watch()
    host, port = listening.getsockname()[:2]
    log.info("version %s on %s: http://%s:%d", champion.served.version, champion.served.predictor.device, host, port)
    try:
        uvicorn.Server(configure(create_app(champion, worker))).run([listening])
    except KeyboardInterrupt:
        log.info("stopped")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        PipelineError: it is taken, or no address of this machine.
    """
    try:
        if port != port & 0xFFFF:
            raise OverflowError("ports go from 0 to 65535")  # getaddrinfo would cut it down to another one
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port just left counts as taken
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise PipelineError(f"{host}:{port} cannot be listened on ({error}); choose another --port or --host") from None
    return listening


if __name__ == "__main__":
    main()
