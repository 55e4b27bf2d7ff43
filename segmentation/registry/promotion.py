"""A model version against the champion: both measured now, on the same photos, and a decision with all its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mlflow.entities.model_registry import ModelVersion
from PIL import Image
from torch import Tensor

from segmentation.data.images import Pixels, read_mask, read_photo
from segmentation.errors import PipelineError
from segmentation.metrics.confusion import miou, photo_confusion
from segmentation.prediction.predictor import Predictor
from segmentation.progress import Progress
from segmentation.registry import aliases
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.gate import Check, absolute_checks, compare, promotes, relative_checks
from segmentation.registry.store import tracking_uri
from segmentation.registry.versions import find_version, load_predictor
from segmentation.settings import PromoteSettings

REPRODUCED = 4  # photos whose masks the stored model must give again

_OTHER_SET = (
    "evaluation set: the champion was evaluated on other photos, masks or classes than the candidate, and scores of "
    "different photos say nothing about each other"
)

Pair = tuple[bytes, bytes]


@dataclass(frozen=True)
class Contest:
    """A candidate, the champion that it would replace, and all aliases as they were found."""

    candidate: ModelVersion
    champion: ModelVersion | None
    aliases: dict[str, str]

    @property
    def branch(self) -> str:
        """What there is to decide: "comparison", "first champion", "already champion" or "other evaluation set"."""
        if self.champion is None:
            return "first champion"
        if self.champion.version == self.candidate.version:
            return "already champion"
        # The fingerprint is of photos at training size; the same raw data at another training size are the same photos.
        ours, theirs = self.candidate.tags, self.champion.tags
        same = any(ours[key] == theirs.get(key) for key in ("evaluation_set_sha256", "data_hash"))
        return "comparison" if same else "other evaluation set"


@dataclass
class Scored:
    """A model, and what was measured of it so far; `masks` are those of the first photos."""

    predictor: Predictor
    confusions: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    masks: list[Pixels] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.predictor.card.classes

    def score(self, photo: Image.Image, truth: Pixels) -> None:
        started = time.perf_counter()
        mask = self.predictor.mask(photo)
        self.seconds.append(time.perf_counter() - started)
        self.confusions.append(photo_confusion(mask, truth, len(self.classes)))
        if len(self.masks) < REPRODUCED:
            self.masks.append(mask)

    def summary(self) -> dict[str, float]:
        return {"miou": miou(torch.stack(self.confusions).sum(0)), "seconds": median(self.seconds)}


def contest(which: str) -> Contest:
    """Who stands against whom.

    Args:
        which: the candidate's version number or alias.

    Raises:
        PipelineError: there is no such version, it lacks its lineage, or the tracking server does not answer.
    """
    held = aliases.read()
    client = connect()
    candidate = find_version(client, which)
    missing = {"experiment_commit", "evaluation_set_sha256", "data_hash", "data_checks"} - set(candidate.tags)
    if missing or not candidate.run_id:
        raise PipelineError(
            f"models:/{MODEL_NAME}/{candidate.version}: lacks {', '.join(sorted(missing)) or 'its run'}, so its photos "
            "cannot be found; register it with `python -m flows.register`"
        )
    return Contest(candidate, find_version(client, held["champion"]) if "champion" in held else None, held)


def decide(
    found: Contest, pairs: Iterable[Pair], settings: PromoteSettings, force_reason: str | None
) -> dict[str, Any]:
    """Measure both models and judge: a decision, ready to be written as JSON. Moves nothing.

    Args:
        found: who stands against whom.
        pairs: photo and mask, as files' bytes, of each val pair of the candidate's data; read only to measure.
        settings: the section `promote` of `params.yaml`.
        force_reason: why the candidate is promoted whatever the numbers say; `None` = not forced.

    Raises:
        PipelineError: a model or a photo cannot be had.
    """
    branch, forced = found.branch, force_reason is not None
    decision: dict[str, Any] = {
        **aliases.stamp(),
        "verdict": "refuse",
        "branch": branch,
        "reasons": [],
        "force_reason": force_reason,
        "candidate": _identity(found.candidate),
        "champion": _identity(found.champion) if found.champion else None,
        "aliases": found.aliases,
        "thresholds": settings.model_dump(),
    }
    if branch == "already champion":
        return decision | {"verdict": "keep", "reasons": ["the candidate is the champion already"]}
    candidate = Scored(load_predictor(found.candidate))
    champion, trouble = None, None
    if found.champion and branch == "comparison":
        try:
            champion = Scored(load_predictor(found.champion))
        except Exception as error:  # a damaged or foreign model can fail in any way
            if not forced:
                raise PipelineError(
                    f"models:/{MODEL_NAME}/{found.champion.version}, the champion, cannot be loaded and compared with "
                    f"({error}); force a promotion to replace it"
                ) from error
            branch, trouble = "champion cannot be loaded", f"{error}"
    if champion and champion.classes != candidate.classes:
        branch, champion = "other evaluation set", None
    decision["branch"] = branch
    if branch == "other evaluation set" and not forced:
        return decision | {"reasons": [_OTHER_SET]}

    failure = _measure(found.candidate, candidate, champion, pairs)
    checks = absolute_checks(found.candidate.tags["data_checks"], failure)
    scores, comparison = {"candidate": candidate.summary()}, None
    if champion:
        scores["champion"] = champion.summary()
        stacks = (torch.stack(champion.confusions), torch.stack(candidate.confusions))
        comparison = compare(*stacks, candidate.classes)
        checks = relative_checks(comparison, champion.seconds, candidate.seconds, settings) + checks
    promoted = promotes(checks, forced)
    return decision | {
        "verdict": "promote" if promoted else "refuse",
        "reasons": _reasons(checks, promoted, force_reason) + ([f"champion: {trouble}"] if trouble else []),
        "photos": len(candidate.seconds),
        "scores": scores,
        "comparison": asdict(comparison) if comparison else None,
        "checks": [asdict(check) for check in checks],
    }


def _measure(version: ModelVersion, candidate: Scored, champion: Scored | None, pairs: Iterable[Pair]) -> str | None:
    """Score on each pair, side by side; then why the stored candidate does not give the same masks, if so."""
    photos = version.tags.get("photos", "")  # how many it was evaluated on
    total = int(photos) if photos.isdecimal() else None
    with Progress("promote: score", total, "photo") as progress:
        first = score_in_turn([champion, candidate] if champion else [candidate], pairs, progress.advance)
    return _reproduction_failure(version, first, candidate.masks)


def score_in_turn(models: Sequence[Scored], pairs: Iterable[Pair], advance: Callable[[], None]) -> list[bytes]:
    """Each model on each pair, one right after the other; who begins changes with every photo.

    Returns:
        The first `REPRODUCED` photos.
    """
    first: list[bytes] = []
    for number, (photo_bytes, mask_bytes) in enumerate(pairs):
        photo, truth = read_photo(photo_bytes)[0], read_mask(mask_bytes)
        if number == 0:
            for model in models:  # what is done only once is in nobody's time
                model.predictor.mask(photo)
        for model in models if number % 2 else reversed(models):  # neither of them always finds the caches warm
            model.score(photo, truth)
        if number < REPRODUCED:
            first.append(photo_bytes)
        advance()
    return first


def _reproduction_failure(version: ModelVersion, photos: list[bytes], masks: list[Pixels]) -> str | None:
    """Why the version, loaded as a server would, does not give these masks of these photos; `None` if it does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, photo in enumerate(photos):
            (folder / f"{number}.photo").write_bytes(photo)
        script, uri = Path(__file__).with_name("reload.py"), f"models:/{MODEL_NAME}/{version.version}"
        strict = {"MLFLOW_TRACKING_URI": tracking_uri(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        with Progress("promote: reload the model and predict again"):
            done = subprocess.run(
                [sys.executable, "-IB", str(script), uri, str(folder)],
                cwd=folder, env=os.environ | strict, capture_output=True, text=True,
            )  # fmt: skip
        if done.returncode:
            return f"reloaded from the registry it fails: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        again = [read_mask((folder / f"{number}.png").read_bytes()) for number in range(len(photos))]
    differ = sum(not np.array_equal(mask, other) for mask, other in zip(masks, again, strict=True))
    if differ:
        return f"reloaded from the registry, its stored code gives other masks of {differ} of {len(masks)} photos"
    return None


def _reasons(checks: list[Check], promoted: bool, force_reason: str | None) -> list[str]:
    failed = [f"{check.name}: {check.says}" for check in checks if not check.passed]
    if promoted and force_reason is not None:
        return [f"forced: {force_reason}", *failed]
    return failed or ["every check passed"]


def _identity(version: ModelVersion) -> dict[str, str | None]:
    names = ("experiment", "experiment_commit", "evaluation_set_sha256", "data_hash", "data_checks")
    return {"version": str(version.version), "run_id": version.run_id} | {
        name: version.tags.get(name) for name in names
    }
