"""The password of the local Prefect server.

Prefect answers pages of every origin and never looks at the name that it is called by. Without a password, any page
that a user opens in a browser could make a deployment whose steps are shell commands, and the worker would run them.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

from dotenv import dotenv_values, set_key

from segmentation.errors import PipelineError

# what the server asks for, and what every client sends; Prefect reads both from the environment, else from `.env` of
# the current folder
SERVER = "PREFECT_SERVER_API_AUTH_STRING"
CLIENT = "PREFECT_API_AUTH_STRING"


class Password(NamedTuple):
    """A password as `user:password`, and in words where it is kept."""

    value: str
    place: str

    def environment(self) -> dict[str, str]:
        """The variables for a server and its clients."""
        return {SERVER: self.value, CLIENT: self.value}


def new_password() -> str:
    """As `user:password`, which Prefect and tools for HTTP expect, of letters and digits, which no file must quote."""
    return f"voc:{secrets.token_hex(16)}"


def get_password(file: Path) -> Password:
    """The user's password, from the environment or from `file`; else a new one, written to `file`.

    Afterwards `file` holds both variables and only its owner can read it, unless the environment gives the password.

    Args:
        file: `.env` of the checkout. Its other lines stay as they are.

    Raises:
        PipelineError: the two variables differ, or `file` cannot be read, written or kept from others.
    """
    file = file.resolve()  # a link stays a link
    kept = _read(file)
    found: dict[str, Password] = {}
    for name in (SERVER, CLIENT):
        # an empty value is none: Prefect would ask for a password and let nobody in
        if value := os.environ.get(name):
            found[name] = Password(value, f"{name} in the environment")
        elif value := kept.get(name):
            found[name] = Password(value, f"{name} in {file}")
    for password in found.values():
        if not password.value.isascii():  # Prefect compares nothing else
            raise PipelineError(f"{password.place}: use letters, digits and signs of ASCII only")
    if len({password.value for password in found.values()}) > 1:
        places = " and ".join(password.place for password in found.values())
        raise PipelineError(f"{places} differ: set both to the same password, or remove one")
    if found and all(os.environ.get(name) for name in found):
        return next(iter(found.values()))
    password = next(iter(found.values()), Password(new_password(), f"{SERVER} in {file}"))
    try:
        _close(file)
        _write(file, {name: password.value for name in (SERVER, CLIENT) if name not in found})
        _close(file)
    except OSError as error:
        raise PipelineError(
            f"{file}: the password of the Prefect server cannot be kept there ({error}); make it a file that you own, "
            f"in a folder that you can write, or export {SERVER} and {CLIENT}"
        ) from None
    return password


def _read(file: Path) -> dict[str, str | None]:
    if file.exists() and not file.is_file():
        raise PipelineError(f"{file}: this is not a file, and Prefect reads its password from it; move it away")
    try:
        return dict(dotenv_values(file))
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"{file}: cannot be read ({error}), and every `prefect` command reads it; make it UTF-8 text that you own"
        ) from None


def _write(file: Path, values: dict[str, str]) -> None:
    before = file.stat() if file.exists() else None
    for name, value in values.items():
        # through a temporary file beside it, which is the owner's alone from the start
        set_key(file, name, value, quote_mode="never")
    if before is not None and file.stat().st_uid != before.st_uid:  # root, in a user's checkout
        os.chown(file, before.st_uid, before.st_gid)


def _close(file: Path) -> None:
    """Keep the file from everyone but its owner."""
    if not file.exists() or not _open_to_others(file):
        return
    file.chmod(0o600)
    if _open_to_others(file):
        raise OSError("others can read it, and this file system does not let it be closed to them")
    print(f"{file}: others could read it; closed to them now (mode 600). Change its passwords if they may know them.")


def _open_to_others(file: Path) -> bool:
    return bool(file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
