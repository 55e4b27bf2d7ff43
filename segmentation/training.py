"""Training with Lightning: resumable at every epoch (on a CPU to the bit), one at a time for one result."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from segmentation import model as model_files
from segmentation.data import PairDataset, split_ids
from segmentation.encoder import checkpoint_path, load_weights
from segmentation.errors import PipelineError
from segmentation.files import atomic_path, sha256_file, sha256_json
from segmentation.losses import cross_entropy, lovasz_softmax
from segmentation.metrics import confusion_matrices, miou, pixel_accuracy, report_miou
from segmentation.model import ModelCard, Segmenter
from segmentation.settings import EncoderSettings, Settings, TrainSettings
from segmentation.tracking import LiveCurves

KEPT_CHECKPOINT_FOLDERS = 5
# The modules that decide the weights: a checkpoint of other code is not gone on from. dvc.yaml names the same.
CODE = ("data", "decoder", "encoder", "losses", "metrics", "model", "training", "voc")

Batch = tuple[Tensor, Tensor, tuple[str, ...]]


def train(settings: Settings, processed: Path, classes: list[str], models: Path, reports: Path, scratch: Path) -> None:
    """Train on split `train`, validate on `val` every epoch, write the kept weights and the history.

    A checkpoint an epoch lies in `scratch/checkpoints/<key>`, keyed by everything that the result depends on; the next
    run with the same key goes on from there.

    Args:
        settings: sections `preprocess`, `encoder`, `decoder` and `train` are read.
        processed: `data/processed`.
        classes: class names by id.
        models: gets `segmenter.safetensors` and `segmenter.json`.
        reports: gets `history.csv`: one row an epoch.
        scratch: untracked folder.

    Raises:
        PipelineError: weights that cannot be had, a loss that is not finite, or the same training already running.
    """
    L.seed_everything(settings.train.seed, workers=True, verbose=False)
    checkpoint = checkpoint_path(settings.encoder)
    card = ModelCard(
        encoder=settings.encoder.name,
        trainable_blocks=settings.encoder.trainable_blocks,
        decoder_channels=settings.decoder.channels,
        image_size=settings.preprocess.image_size,
        classes=classes,
        encoder_weights=_origin(settings.encoder, checkpoint),
        epoch=0,
    )
    model = model_files.build(card)
    load_weights(model.encoder, settings.encoder.pretrained, checkpoint)
    with _checkpoint_folder(scratch / "checkpoints" / _key(settings, card, processed)) as folder:
        task = TrainingTask(model, settings.train)
        _fit(task, settings, processed, folder)
    epoch = settings.train.epochs
    if settings.train.keep == "best":
        epoch = task.best["epoch"]
        model.load_state_dict(task.best["state"], strict=False)
    model_files.save(model, card.model_copy(update={"epoch": epoch}), models)
    with atomic_path(reports / "history.csv") as temporary:
        pd.DataFrame(task.history).to_csv(temporary, index=False, float_format="%.6f")


class TrainingTask(L.LightningModule):
    """The report's recipe: AdamW on a weighted sum of losses; frozen weights are left out of checkpoints."""

    strict_loading = False

    def __init__(self, model: Segmenter, settings: TrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"miou": -1.0, "epoch": 0, "state": {}}
        self._losses: list[Tensor] = []
        self._confusions: list[Tensor] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images, masks, ids = batch
        logits = self.model(images)
        weighted = ((lovasz_softmax, self.settings.lovasz_softmax), (cross_entropy, self.settings.cross_entropy))
        loss = torch.stack([weight * function(logits, masks) for function, weight in weighted if weight]).sum()
        if not torch.isfinite(loss):
            raise PipelineError(f"train: the loss is {loss.item()} for {', '.join(ids)}; lower train.lr")
        self._losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        images, masks, _ids = batch
        logits = self.model(images)
        self._confusions.append(confusion_matrices(logits.argmax(1), masks, logits.shape[1]))

    def on_train_epoch_end(self) -> None:
        """Lightning has validated by now: close the epoch's row, before `ModelCheckpoint` saves it."""
        confusions = torch.cat(self._confusions).cpu()
        row = {
            "epoch": self.current_epoch + 1,
            "train_loss": torch.stack(self._losses).mean().item(),
            "val_accuracy": pixel_accuracy(confusions.sum(0)),
            "val_report_miou": report_miou(confusions),
            "val_miou": miou(confusions.sum(0)),
        }
        self._losses.clear()
        self._confusions.clear()
        self.history.append(row)
        if row["val_miou"] > self.best["miou"]:
            state = {key: value.detach().cpu().clone() for key, value in self._trained_state().items()}
            self.best = {"miou": row["val_miou"], "epoch": row["epoch"], "state": state}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.settings.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{key}" for key in self._trained_state()}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}
        checkpoint["history"], checkpoint["best"] = self.history, self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history, self.best = checkpoint["history"], checkpoint["best"]

    def _trained_state(self) -> dict[str, Tensor]:
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {key: value for key, value in self.model.state_dict().items() if key not in frozen}


def _fit(task: TrainingTask, settings: Settings, processed: Path, folder: Path) -> None:
    """Fit from the folder's last checkpoint, or from the start."""
    manifest = processed / "manifest.parquet"
    train_set = PairDataset(processed, split_ids(manifest, "train"))
    val_set = PairDataset(processed, split_ids(manifest, "val"))
    options: dict[str, Any] = {
        "batch_size": settings.train.batch_size,
        "num_workers": settings.train.workers,
        "persistent_workers": settings.train.workers > 0,
    }
    # Lightning tells this sampler the epoch, so the order of epoch n is the same after a resume.
    sampler: Any = DistributedSampler(train_set, num_replicas=1, rank=0, seed=settings.train.seed)
    cuda = torch.cuda.is_available()
    last = folder / "last.ckpt"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    with warnings.catch_warnings():
        for harmless in (".*does not have many workers.*", ".*Checkpoint directory.*", ".*isinstance.treespec.*",
                         ".*LeafSpec.*", ".*smaller than the logging interval.*", ".*in eval mode.*"):  # fmt: skip
            warnings.filterwarnings("ignore", harmless)
        progress: list[Callback] = [TQDMProgressBar()] if sys.stderr.isatty() else []
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if cuda and torch.cuda.is_bf16_supported() else "32-true",
            max_epochs=settings.train.epochs,
            deterministic="warn" if cuda else True,
            logger=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=bool(progress),
            enable_model_summary=False,
            callbacks=[
                *progress,
                ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True),
                EpochLines(),
                LiveCurves(),
            ],
        )
        device = trainer.strategy.root_device
        print(f"train: {len(train_set)} train and {len(val_set)} val pairs on {device}", flush=True)
        if _is_whole(last):
            print(f"train: going on from the last finished epoch in {folder}", flush=True)
        trainer.fit(
            task,
            DataLoader(train_set, sampler=sampler, **options),
            DataLoader(val_set, **options),
            ckpt_path=last if last.exists() else None,
            weights_only=True,
        )


class EpochLines(Callback):
    """A line an epoch, and one every half minute within: readable in a log, where a progress bar is not."""

    def on_train_epoch_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        self.started = self.printed = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, _: Any, index: int) -> None:
        now = time.monotonic()
        if now - self.printed > 30:
            self.printed = now
            done, steps = index + 1, int(trainer.num_training_batches)
            left = (now - self.started) / done * (steps - done)
            loss = outputs["loss"].item()
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {done}/{steps}  loss {loss:.4f}  "
                f"{left / 60:.0f} min left in it",
                flush=True,
            )

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        # Runs before the module's own hook, which closes the row; the line is printed from there on.
        self.seconds = time.monotonic() - self.started

    def on_save_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, _: dict[str, Any]) -> None:
        assert isinstance(task, TrainingTask)
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in task.history[-1].items() if key != "epoch")
        print(f"epoch {len(task.history)}/{trainer.max_epochs}  {numbers}  {self.seconds:.0f} s", flush=True)


@contextmanager
def _checkpoint_folder(folder: Path) -> Iterator[Path]:
    """The folder, held exclusively: killing DVC may leave a training process behind that still writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "owner.json"
    lock = FileLock(folder / "lock", timeout=3)  # a training process whose DVC was killed ends within a second
    try:
        lock.acquire()
    except Timeout:
        try:
            pid = json.loads(owner.read_text())["pid"]
        except (OSError, ValueError, KeyError):
            pid = "unknown"
        raise PipelineError(
            f"train: process {pid} is training exactly this already (same settings, data and code); "
            f"wait for it, or stop it: kill {pid}"
        ) from None
    try:
        owner.write_text(json.dumps({"pid": os.getpid()}))
        os.utime(folder)
        _forget_old(folder)
        yield folder
    finally:
        lock.release()


def _is_whole(checkpoint: Path) -> bool:
    """Whether there is a checkpoint to go on from; a damaged one is put aside, and said."""
    if not checkpoint.exists():
        return False
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever zipfile, pickle or the disk do
        aside = checkpoint.replace(checkpoint.with_suffix(".damaged"))
        print(f"warning: {checkpoint} is damaged ({error}); kept as {aside.name}, training starts over", flush=True)
        return False
    return True


def _forget_old(current: Path) -> None:
    """Delete all but the newest checkpoint folders, leaving those in use."""
    with suppress(FileNotFoundError):  # another training may be tidying up as well
        folders = sorted(current.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in folders[KEPT_CHECKPOINT_FOLDERS:]:
            with suppress(Timeout, OSError), FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder)


def _key(settings: Settings, card: ModelCard, processed: Path) -> str:
    """Hash of everything that the trained weights depend on."""
    code = {name: sha256_file(Path(__file__).with_name(f"{name}.py")) for name in CODE}
    packages = {name: version(name) for name in ("torch", "timm", "lightning")}
    return sha256_json(
        {
            "card": card.model_dump(),
            "train": settings.train.model_dump(exclude={"workers"}),
            "data": sha256_file(processed / "manifest.parquet"),
            "code": code,
            "packages": packages,
            "machine": [platform.machine(), torch.cuda.is_available()],
        }
    )[:16]


def _origin(settings: EncoderSettings, checkpoint: Path | None) -> str:
    """Where the encoder's first weights come from, for the model card."""
    if checkpoint is not None:
        return f"{checkpoint.name} (sha256 {sha256_file(checkpoint)})" if checkpoint.is_file() else checkpoint.name
    return f"timm {settings.name}" if settings.pretrained else "random"
