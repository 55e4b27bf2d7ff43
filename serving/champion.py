"""The model that is served: the registry's champion, followed when its alias moves."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from segmentation.errors import PipelineError, error_text
from segmentation.prediction.predictor import Predictor
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.versions import find_version, load_predictor
from serving import limits

ALIAS = "champion"
log = logging.getLogger("serving")


@dataclass(frozen=True)
class Served:
    """A model, and what the registry says of it."""

    entry: ModelVersion
    predictor: Predictor
    metrics: dict[str, float]

    @property
    def version(self) -> str:
        return str(self.entry.version)


class Champion:
    """The champion, loaded; a thread looks for a new one and puts it in the old one's place once it has predicted.

    `served` is replaced whole and never changed: whoever took it keeps one consistent model.

    Args:
        check: predicts with a model, and raises when it cannot be served.

    Raises:
        PipelineError: there is none, or it cannot be loaded or fails the check.
    """

    def __init__(self, check: Callable[[Predictor], None]) -> None:
        self._check = check
        self._client = connect()
        self._failed: tuple[tuple[str, str | None], float, PipelineError] | None = None
        self.served = self._load(find_version(self._client, ALIAS))
        self.trouble: str | None = None  # shown to everybody: the log says more

    def watch(self) -> None:
        """Follow the champion until the process ends."""
        threading.Thread(target=self._watch, name="champion", daemon=True).start()

    def _watch(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        while True:
            time.sleep(limits.POLL_SECONDS)
            if trim:  # glibc would keep the memory of a replaced model, and of large photos
                trim(0)
            self._look()

    def _look(self) -> None:
        trouble = "the champion cannot be looked up"
        try:
            entry = find_version(self._client, ALIAS)
            trouble = f"version {entry.version}, the champion, cannot be served"
            if _identity(entry) == _identity(self.served.entry):
                # tags and aliases may have changed; a logged model never does
                self.served = replace(self.served, entry=entry)
            else:
                self._follow(entry)
        except Exception as error:  # whatever it is, what is loaded goes on being served
            if trouble != self.trouble:
                log.warning(
                    "still serving version %s: %s: %s", self.served.version, trouble, " ".join(f"{error}".split())
                )
            self.trouble = trouble
        else:
            if self.trouble:
                log.info("serving version %s, the champion again", self.served.version)
            self.trouble = None

    def _follow(self, entry: ModelVersion) -> None:
        if self._failed and self._failed[0] == _identity(entry) and time.monotonic() < self._failed[1]:
            raise self._failed[2]
        started = time.monotonic()
        try:
            served = self._load(entry)
        except PipelineError as error:
            self._failed = _identity(entry), time.monotonic() + limits.RETRY_SECONDS, error
            raise
        seconds = time.monotonic() - started
        log.info("version %s replaces %s, loaded in %.1f s", served.version, self.served.version, seconds)
        self.served = served

    def _load(self, entry: ModelVersion) -> Served:
        try:
            predictor = load_predictor(entry)
            self._check(predictor)
            return Served(entry, predictor, self._metrics(entry.run_id))
        except Exception as error:  # a foreign or damaged model can fail in any way
            name = f"models:/{MODEL_NAME}/{entry.version}"
            said = error_text(error).removeprefix(f"{name}: ")
            raise PipelineError(
                f"{name}, the champion, cannot be served ({said}); move the alias to a version that can be"
            ) from error

    def _metrics(self, run_id: str | None) -> dict[str, float]:
        """The scores that the version's run was registered with; none when the run was deleted."""
        try:
            logged = self._client.get_run(run_id).data.metrics if run_id else {}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logged = {}
        return {key.removeprefix("eval/"): value for key, value in logged.items() if key.startswith("eval/")}


def _identity(entry: ModelVersion) -> tuple[str, str | None]:
    """What tells a version's model from others: one that was deleted and made anew has the old number."""
    return str(entry.version), entry.source
