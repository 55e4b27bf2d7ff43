"""What the frozen part of the encoder makes of every photo, computed once and kept as float16.

`features.json` says what the shards hold: `<split>_<number>.npy` are float16 `[n, V, K, P + N, D]`, photos in list
order, `shard_photos` in each but a split's last, V views (the photo, and mirrored where training mirrors), and for each
the tokens of `Encoder.frozen`, of the shape `tokens`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader

from segmentation.data.pairs import PairDataset, split_ids
from segmentation.data.voc import SPLITS
from segmentation.errors import PipelineError
from segmentation.files import atomic_path, sha256_code, sha256_json, write_json
from segmentation.model.encoder import Encoder, create_encoder
from segmentation.progress import Progress
from segmentation.scratch_folders import forget_old
from segmentation.settings import Settings

SHARD_PHOTOS = 32  # what a kill costs at most
# On a CPU a batch is no faster, and one photo at a time gives the bits that prediction gives.
BATCH = {"cpu": 1, "cuda": 16}

Shard = tuple[str, int, list[str]]  # split, number, ids


class FeatureCard(BaseModel):
    """`features.json`: what the tokens depend on, or why there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    weights_sha256: str
    blocks: list[int]
    image_size: int
    photos_sha256: str
    mirrored: bool
    shard_photos: int
    tokens: tuple[int, int, int]  # K, P + N, D


class Features:
    """The tokens in `folder`, mapped into memory as they are asked for."""

    def __init__(self, folder: Path, card: FeatureCard) -> None:
        self.folder, self.card = folder, card

    def tokens(self, split: str, position: int, mirrored: bool = False) -> Tensor:
        """Float16 `[K, P + N, D]` of the photo at `position` of a split; mirrored views exist for `train` alone.

        Raises:
            PipelineError: its shard is missing, damaged, or not laid out as `features.json` says.
        """
        shard, row = divmod(position, self.card.shard_photos)
        path = self.folder / _shard_name(split, shard)
        try:
            mapped = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise PipelineError(f"{path}: cannot be read ({error}); make it anew: dvc repro --force encode") from None
        views = 2 if self.card.mirrored and split == "train" else 1
        if (
            mapped.dtype != np.float16
            or mapped.shape[1:] != (views, *self.card.tokens)
            or not row < len(mapped) <= self.card.shard_photos
            or mirrored >= views
        ):
            raise PipelineError(
                f"{path}: {mapped.dtype} {mapped.shape} is not what features.json describes, or lacks photo {row}, "
                f"view {int(mirrored)}; make it anew: dvc repro --force encode"
            )
        return torch.from_numpy(np.array(mapped[row, int(mirrored)]))


def encode(settings: Settings, processed: Path, features: Path, scratch: Path) -> None:
    """Write the tokens of all photos of `processed` to `features`, or `features.json` alone where they are not kept.

    Shards are made in `scratch/features/<key>` and linked from there: what a killed run finished is not done again, nor
    is anything when only settings changed that the tokens do not depend on. Memory does not grow with the photos.

    Args:
        settings: sections `preprocess`, `encoder` and `encode`; of `decoder` the skip connections, of `train` the seed
            (of random weights) and the augmentation.
        processed: `data/processed`.
        features: the output folder.
        scratch: untracked folder.

    Raises:
        PipelineError: weights that cannot be had, tokens that are not finite, or too little room on the disk.
    """
    if reason := settings.not_cached():
        print(f"encode: nothing is kept, {reason}; training computes the frozen blocks in every epoch", flush=True)
        write_json(features / "features.json", {"not_cached": reason})
        return
    torch.manual_seed(settings.train.seed)  # of random weights: those that training starts from
    encoder = create_encoder(settings.encoder, settings.preprocess.image_size, settings.decoder.skip_connections)
    manifest = processed / "manifest.parquet"
    card = _describe(encoder, settings.preprocess.image_size, manifest, settings.train.horizontal_flip > 0)
    store = scratch / "features" / _key(card)
    store.mkdir(parents=True, exist_ok=True)
    with _held(store):
        shards = [(split, number, part) for split in SPLITS for number, part in _shards(split_ids(manifest, split))]
        missing = [shard for shard in shards if not (store / _shard_name(*shard[:2])).exists()]
        _check_room(encoder, card, missing, store)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder.eval().to(device)
        views, new = _views(card, shards), _views(card, missing)
        with Progress("encode", views, "view" if card.mirrored else "photo", before=views - new) as progress:
            for split, number, part in missing:
                tokens = _encode(encoder, processed, part, card.mirrored and split == "train", device, progress)
                _save(store / _shard_name(split, number), tokens)
        with Progress("encode: link", len(shards), "shard") as progress:
            for split, number, _ in shards:
                _link(store / _shard_name(split, number), features / _shard_name(split, number))
                progress.advance()
        write_json(features / "features.json", card.model_dump())
    forget_old(store, kept=1)  # DVC's cache has what the others were for
    size = sum(path.stat().st_size for path in features.iterdir())
    photos = sum(len(part) for *_, part in shards)
    print(f"encode: {photos} photos, {len(missing)} of {len(shards)} shards new, {size / 1e6:.0f} MB")


def open_features(folder: Path, encoder: Encoder, image_size: int, manifest: Path) -> Features | None:
    """The kept tokens, or None where `encode` kept none.

    Raises:
        PipelineError: there is no result of `encode`, or it is of another encoder or of other photos.
    """
    try:
        values = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        if "not_cached" in values:
            return None
        card = FeatureCard.model_validate(values)
    except FileNotFoundError:
        raise PipelineError(f"{folder}/features.json: not found; run encode (`dvc repro`) first") from None
    except (json.JSONDecodeError, ValidationError) as error:
        raise PipelineError(f"{folder}/features.json: damaged: {error}; dvc repro --force encode") from None
    wanted = _describe(encoder, image_size, manifest, card.mirrored)
    if differing := [key for key, value in wanted.model_dump().items() if getattr(card, key) != value]:
        raise PipelineError(
            f"{folder}: made with another {', '.join(differing)}; make it anew: dvc repro --force encode"
        )
    return Features(folder, card)


def _describe(encoder: Encoder, image_size: int, manifest: Path, mirrored: bool) -> FeatureCard:
    rows = pd.read_parquet(manifest, columns=["split", "id", "image_sha256"])
    return FeatureCard(
        encoder=encoder.name,
        weights_sha256=_frozen_sha256(encoder),
        blocks=list(encoder.cached_blocks),
        image_size=image_size,
        photos_sha256=sha256_json(rows.to_numpy().tolist()),
        mirrored=mirrored,
        shard_photos=SHARD_PHOTOS,
        tokens=(len(encoder.cached_blocks), _token_count(encoder, image_size), encoder.dim),
    )


def _token_count(encoder: Encoder, image_size: int) -> int:
    return int(encoder.vit.num_prefix_tokens) + (image_size // encoder.patch) ** 2


def _frozen_sha256(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(card: FeatureCard) -> str:
    """Hash of everything that the tokens depend on."""
    code = sha256_code(("model/encoder", "model/features"))
    packages = {name: version(name) for name in ("timm", "torch")}
    machine = {"code": code, "packages": packages, "cuda": torch.cuda.is_available()}
    return sha256_json(card.model_dump() | machine)[:16]


def _shards(ids: list[str]) -> Iterator[tuple[int, list[str]]]:
    return enumerate(ids[start : start + SHARD_PHOTOS] for start in range(0, len(ids), SHARD_PHOTOS))


def _views(card: FeatureCard, shards: list[Shard]) -> int:
    return sum(len(part) * (2 if card.mirrored and split == "train" else 1) for split, _, part in shards)


def _shard_name(split: str, number: int) -> str:
    return f"{split}_{number:04d}.npy"


@torch.inference_mode()
def _encode(
    encoder: Encoder, processed: Path, ids: list[str], mirrored: bool, device: torch.device, progress: Progress
) -> NDArray[np.float16]:
    """Tokens `[n, V, K, P + N, D]` of some photos."""
    workers = 4 if device.type == "cuda" else 0  # a CPU is busy with the encoder
    parts = []
    for images, _, names in DataLoader(PairDataset(processed, ids), BATCH[device.type], num_workers=workers):
        pixels = images.to(device)
        views = (pixels, pixels.flip(-1)) if mirrored else (pixels,)
        tokens = torch.stack([encoder.frozen(encoder.normalise(view)) for view in views], dim=1).half().cpu()
        if bad := [name for name, photo in zip(names, tokens, strict=True) if not photo.isfinite().all()]:
            raise PipelineError(
                f"encode: the tokens are not finite (NaN) for {', '.join(bad)}: the encoder's weights "
                "are damaged or overflow; take another encoder.checkpoint or encoder.name"
            )
        parts.append(tokens.numpy())
        progress.advance(len(images) * len(views))
    return np.concatenate(parts)


def _save(path: Path, tokens: NDArray[np.float16]) -> None:
    try:
        with atomic_path(path) as temporary:
            np.save(temporary, tokens)
    except OSError as error:
        raise PipelineError(
            f"{path}: {error}; free some room (what is finished is kept), or set encode.cache: false"
        ) from None


def _check_room(encoder: Encoder, card: FeatureCard, missing: list[Shard], store: Path) -> None:
    one = 2 * math.prod(card.tokens)
    views = _views(card, missing)
    needed, free = 2 * views * one, shutil.disk_usage(store).free  # DVC's cache takes as much again
    if needed > free:
        raise PipelineError(
            f"{store}: {needed / 1e9:.1f} GB are needed for the features of {views} views ({one / 1e6:.1f} MB each, "
            f"and as much again in DVC's cache) and {free / 1e9:.1f} GB are free; make room, or set encode.cache: false"
        )


def _link(source: Path, target: Path) -> None:
    """The same file under two names; a copy where the disk cannot do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


@contextmanager
def _held(store: Path) -> Iterator[None]:
    """The store, held exclusively; whoever comes second waits, and finds the work done."""
    lock = FileLock(store / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("encode: another process computes exactly this; waiting for it", flush=True)
        with Progress("encode: waiting for the other process"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
