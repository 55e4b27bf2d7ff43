"""The champion behind HTTP: `python -m serving`."""

import os

# read when torch is imported: threads of OpenMP that wait are to sleep, not to spin, for a photo that is decoded or
# another process needs the core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# read when mlflow is imported, so set before; as in flows/__init__.py, which a server does not need
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# the champion is looked up every few seconds: better no answer soon than one in minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
