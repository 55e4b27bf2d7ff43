"""When and where the pipeline runs: Prefect flows, and the local services behind them."""

import logging
import os
import sys
from importlib.util import find_spec

from segmentation.account import complete_account
from segmentation.errors import PipelineError

# read when mlflow, prefect and dvc are imported, so set before any of them; MLflow ignores DO_NOT_TRACK=1
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

# the servers of this machine are not behind the proxy that the environment may name
direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "", "127.0.0.1", "localhost"]
if "127.0.0.1" not in direct[0].split(","):
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, direct))

if find_spec("prefect") is None:
    sys.exit(f"{sys.executable} lacks the project's packages: run `make install`, then `. .venv/bin/activate`")

try:
    complete_account()
except PipelineError as error:
    sys.exit(f"error: {error}")


def _without_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs what ends a run with its traceback; of an error that the user can mend the message is enough."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
        record.exc_text = None
    return True


for _name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
    logging.getLogger(_name).addFilter(_without_traceback)
