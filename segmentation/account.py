"""What programs expect of an account: a home folder and a name. In a container it may have neither."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from segmentation.errors import PipelineError
from segmentation.paths import scratch


def complete_account() -> None:
    """Give this process and its children a usable `HOME`, and a `USER` where nothing says a name.

    Call it before Prefect, DVC, matplotlib or timm are imported: they compute their folders at import. A home folder
    that can be read stays, for the settings and weights in it. Where it cannot be written, caches go elsewhere.

    Raises:
        PipelineError: a folder is needed in `scratch/`, and cannot be made.
    """
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):  # as getpass asks
            os.environ["USER"] = str(os.getuid())
    home = os.environ.get("HOME") or (entry.pw_dir if entry else "")
    if os.path.isdir(home) and os.access(home, os.R_OK | os.X_OK):  # noqa: PTH112  "" is no folder here
        os.environ["HOME"] = home
    else:
        os.environ["HOME"] = str(_made("home"))
    if not os.access(os.environ["HOME"], os.W_OK):
        weights = Path(os.environ["HOME"], ".cache/huggingface")
        if "XDG_CACHE_HOME" not in os.environ and weights.is_dir():
            os.environ.setdefault("HF_HOME", str(weights))
        os.environ.setdefault("XDG_CACHE_HOME", str(_made("home/.cache")))
        os.environ.setdefault("MPLCONFIGDIR", str(_made("home/.config/matplotlib")))


def _made(name: str) -> Path:
    folder = scratch() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(
            f"HOME: is missing or cannot be written, and {folder} cannot be made instead: {error.strerror}; "
            "set HOME to a folder that you can write"
        ) from None
    return folder
