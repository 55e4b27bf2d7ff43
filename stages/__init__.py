"""One thin module per DVC stage, run as `python -m stages.<stage>`.

DVC runs whatever `python3` PATH finds first. Where that one lacks the project's packages, the stage starts again in the
checkout's own `.venv`, so that `.venv/bin/dvc repro` works in a shell in which the environment is not active.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from segmentation.account import complete_account
from segmentation.errors import PipelineError

if find_spec("pydantic") is None or find_spec("lightning") is None:
    here = Path.cwd()
    found = [p / ".venv" for p in (here, *here.parents) if (p / ".venv" / "bin" / "python").exists()]
    if not found or Path(sys.prefix) == found[0]:
        sys.exit(f"{sys.executable} lacks the project's packages: run `make install`, then `. .venv/bin/activate`")
    python = str(found[0] / "bin" / "python")
    os.execv(python, [python, *sys.orig_argv[1:]])

try:
    complete_account()
except PipelineError as error:
    sys.exit(f"error: {error}")
