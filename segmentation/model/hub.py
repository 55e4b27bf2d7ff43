"""A model's weights file from the Hugging Face hub's cache on this machine, or from the hub."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

# In the order in which timm looks for them.
NAMES = ("model.safetensors", "pytorch_model.bin")
ANSWER_SECONDS = 15.0  # that the hub has for its first answer, name look-up and all of its addresses included

T = TypeVar("T")


def weights_file(config: Mapping[str, Any]) -> Path:
    """The weights file that a timm model's `pretrained_cfg` names.

    What lies in the cache is used without a look at the network, so that a run repeated later has the same weights.
    Else the hub is asked once, shortly: its own client tries again for minutes before it says that nobody answers. The
    download itself takes as long as it needs.

    Raises:
        OSError: there is no such file, or no way to it; the first line of its text says why, and at which host.
    """
    repository, _, revision = config["hf_hub_id"].partition("@")
    names = [config["hf_hub_filename"]] if config.get("hf_hub_filename") else list(NAMES)
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    where = urlsplit(constants.ENDPOINT)
    proxy = "" if proxy_bypass(where.hostname or "") else urlsplit(getproxies().get(where.scheme, "")).netloc
    proxy = proxy.rpartition("@")[2]  # without a password
    host = f"{where.netloc} (through the proxy {proxy})" if proxy else where.netloc
    try:
        for name in names:
            url = hf_hub_url(repository, name, revision=revision or None)
            try:
                _within(ANSWER_SECONDS, lambda url=url: get_hf_file_metadata(url))  # type: ignore[misc]
            except EntryNotFoundError:
                continue
            print(f"downloading {repository}/{name} from {host} …", flush=True)
            return Path(hf_hub_download(repository, name, revision=revision or None))
    except TimeoutError:
        raise OSError(f"{host} does not answer within {ANSWER_SECONDS:.0f} s") from None
    except httpx2.RequestError as error:
        raise OSError(f"{host} does not answer: {str(error) or type(error).__name__}") from None
    raise OSError(f"{host} has neither of {', '.join(names)} in {repository}")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What the call returns or raises; `TimeoutError` after the time, and the call's thread ends with the process."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
