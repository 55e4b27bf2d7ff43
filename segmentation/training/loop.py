"""Training with Lightning: resumable at every epoch (on a CPU to the bit), one at a time for one result."""

from __future__ import annotations

import logging
import math
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from segmentation.data.images import mask_image
from segmentation.data.pairs import EpochSampler, FeaturePairs, PairDataset, augmentation, class_pixels, split_ids
from segmentation.errors import PipelineError
from segmentation.files import atomic_path, sha256_code, sha256_file, sha256_json, write_json
from segmentation.metrics.confusion import confusion_matrices, miou, pixel_accuracy, report_miou
from segmentation.model import segmenter as model_files
from segmentation.model.encoder import checkpoint_path, load_weights
from segmentation.model.features import Features, open_features
from segmentation.model.segmenter import ModelCard, Segmenter, name_some, not_finite
from segmentation.progress import Progress, on_terminal
from segmentation.settings import EncoderSettings, Settings, TrainSettings
from segmentation.training.checkpoints import checkpoint_folder, finished_epochs
from segmentation.training.live_curves import LiveCurves
from segmentation.training.losses import cross_entropy, dice, focal, lovasz_softmax, median_frequency_weights
from segmentation.training.optimizer import AveragedWeights, optimiser, precision, schedule

# The modules that decide the weights: a checkpoint of other code is not gone on from. dvc.yaml names the same.
CODE = (
    "data/images", "data/pairs", "data/voc", "metrics/confusion", "model/checkpoint_files", "model/decoder",
    "model/encoder", "model/features", "model/segmenter", "training/loop", "training/losses",
    "training/optimizer",
)  # fmt: skip
PACKAGES = ("lightning", "pillow", "segmentation-models-pytorch", "timm", "torch", "torchvision")
PANEL_PHOTOS = 4
UNCHECKED_STEPS = 50  # on a GPU: to look whether a loss is finite waits for it

Batch = tuple[Tensor, Tensor, tuple[str, ...]]


def train(
    settings: Settings, processed: Path, features: Path, classes: list[str], models: Path, reports: Path, scratch: Path
) -> None:
    """Train on split `train`, validate on `val` every epoch, write the kept weights and the history.

    Chosen epochs' masks of the first val photos are kept as well, as `panels/epoch_01/<number>.png`, to be looked at;
    the number is the photo's in the list, from 1.
    A checkpoint an epoch lies in `scratch/checkpoints/<key>`, keyed by everything that the result depends on; the next
    run with the same key goes on from there.

    Args:
        settings: sections `preprocess`, `encoder`, `decoder` and `train` are read.
        processed: `data/processed`.
        features: `data/features`; where `encode` kept nothing, the frozen blocks are computed in every step.
        classes: class names by id.
        models: gets `segmenter.safetensors` and `segmenter.json`.
        reports: gets `history.csv`, one row an epoch, and `panels/`.
        scratch: untracked folder.

    Raises:
        PipelineError: weights that cannot be had, features of other weights or photos, a loss, logits or weights
            that are not finite, no labelled val pixel, too little memory, or the same training already running.
    """
    L.seed_everything(settings.train.seed, workers=True, verbose=False)
    card = model_card(settings, classes)
    model = model_files.build(card)
    load_weights(model.encoder, settings.encoder.pretrained, checkpoint_path(settings.encoder))
    if found := not_finite(model.state_dict()):
        raise PipelineError(
            f"train: the encoder's weights are not finite before the first step: {name_some(found)}; take others than "
            f"those of {card.encoder_weights}"
        )
    for note in settings.without_effect():
        print(f"warning: {note}", flush=True)
    kept = open_features(features, model.encoder, card.image_size, processed / "manifest.parquet")
    with checkpoint_folder(scratch / "checkpoints" / _key(settings, card, processed, kept is not None)) as folder:
        task = TrainingTask(model, settings.train, _class_weights(settings.train, processed), folder)
        _fit(task, settings, processed, kept, folder)
        if (folder / "panels").exists():
            shutil.copytree(folder / "panels", reports / "panels", dirs_exist_ok=True)
    best = settings.train.keep == "best"
    epoch = task.best["epoch"] if best else settings.train.epochs
    model.load_state_dict(task.best["state"] if best else task.validated_state(), strict=False)
    model_files.save(model, card.model_copy(update={"epoch": epoch}), models)
    with atomic_path(reports / "history.csv") as temporary:
        pd.DataFrame(task.history).to_csv(temporary, index=False, float_format="%.8g")


def model_card(settings: Settings, classes: list[str]) -> ModelCard:
    """The card of the model that the settings describe, before its training."""
    encoder, decoder = settings.encoder, settings.decoder
    return ModelCard(
        encoder=encoder.name,
        trainable_blocks=encoder.trainable_blocks,
        decoder=decoder.type,
        decoder_channels=decoder.channels,
        decoder_norm=decoder.norm,
        skip_connections=decoder.skip_connections,
        image_size=settings.preprocess.image_size,
        classes=classes,
        encoder_weights=_origin(encoder, checkpoint_path(encoder)),
        epoch=0,
    )


class TrainingTask(L.LightningModule):
    """AdamW on a weighted sum of losses; frozen weights are left out of checkpoints.

    Args:
        model: what is trained.
        settings: section `train`.
        class_weights: of cross-entropy, `[C]`, or None.
        folder: where `not_finite.json` is left, with the ids of the batch behind a loss or weights that are not finite.
    """

    strict_loading = False
    class_weights: Tensor | None

    def __init__(self, model: Segmenter, settings: TrainSettings, class_weights: Tensor | None, folder: Path) -> None:
        super().__init__()
        self.model, self.settings, self.folder = model, settings, folder
        self.register_buffer("class_weights", class_weights, persistent=False)
        terms: tuple[tuple[float, Callable[[Tensor, Tensor], Tensor]], ...] = (
            (settings.lovasz_softmax, lovasz_softmax),
            (settings.cross_entropy, lambda logits, mask: cross_entropy(logits, mask, self.class_weights)),
            (settings.dice, dice),
            (settings.focal, focal),
        )
        self.losses = [(weight, function) for weight, function in terms if weight]
        self.averaged = AveragedWeights(self._trained_state(), settings.ema_decay) if settings.ema_decay else None
        self._averaged_step = 0
        self._lr = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"miou": -1.0, "epoch": 0, "state": {}}
        self._losses: list[Tensor] = []
        self._confusions: list[Tensor] = []
        self._unchecked: list[tuple[tuple[str, ...], Tensor]] = []  # ids and loss of steps
        self._last_ids: tuple[str, ...] = ()
        self._unchecked_logits: list[tuple[tuple[str, ...], Tensor]] = []  # ids, and whether they are finite

    def training_step(self, batch: Batch, _: int) -> Tensor:
        inputs, masks, ids = batch
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is that of the next one
        logits = self._logits(inputs, masks)
        loss = torch.stack([weight * function(logits, masks) for weight, function in self.losses]).sum()
        self._losses.append(loss.detach())
        self._unchecked.append((ids, loss.detach()))
        if len(self._unchecked) >= self.looks_after():
            self._check_losses()
        return loss

    def looks_after(self) -> int:
        """How many steps' losses are looked at together."""
        return 1 if self.device.type == "cpu" else UNCHECKED_STEPS

    def _check_losses(self) -> None:
        """Of the steps since the last check; the first that is not finite is named."""
        unchecked, self._unchecked = self._unchecked, []
        losses = torch.stack([loss for _, loss in unchecked]).tolist() if unchecked else []
        for (ids, _), loss in zip(unchecked, losses, strict=True):
            self._last_ids = ids
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss is {loss} for {', '.join(ids)}", ids, loss=str(loss))

    def _check_weights(self) -> None:
        """A finite loss may have a gradient that is not."""
        named = self._trained_state() | {f"average of {key}": value for key, value in self._averages().items()}
        if found := not_finite(named):
            what = f"the weights are not finite after epoch {self.current_epoch + 1} ({name_some(found)})"
            raise self._not_finite(
                f"{what}; its last photos: {', '.join(self._last_ids)}", self._last_ids, weights=found
            )

    def _check_logits(self) -> None:
        unchecked, self._unchecked_logits = self._unchecked_logits, []
        finite = torch.stack([fine for _, fine in unchecked]).tolist() if unchecked else []
        for (ids, _), fine in zip(unchecked, finite, strict=True):
            if not fine:
                raise self._not_finite(
                    f"the logits are not finite in validation for {', '.join(ids)}", ids, logits=True
                )

    def _not_finite(self, what: str, ids: Sequence[str], **found: Any) -> PipelineError:
        record = self.folder / "not_finite.json"
        write_json(record, {**found, "epoch": self.current_epoch + 1, "ids": list(ids)})
        return PipelineError(f"train: {what} (kept in {record}); lower train.lr, or set train.gradient_clip: 1.0")

    def _logits(self, inputs: Tensor, masks: Tensor) -> Tensor:
        """Of photos `[B, 3, S, S]` uint8, or of their kept tokens."""
        tokens = self._frozen(inputs) if inputs.dtype == torch.uint8 else inputs
        return self.model.trained(tokens, masks.shape[-2:])

    def _frozen(self, images: Tensor) -> Tensor:
        if self.settings.never_twice():
            return self.model.frozen(images)
        with torch.autocast(images.device.type, enabled=False):  # as in `encode`: keeping tokens changes no result
            return self.model.frozen(images)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.settings.seed + self.current_epoch)  # the same in a resumed epoch

    def on_train_batch_end(self, *_: Any) -> None:
        if self.averaged is not None and self.global_step > self._averaged_step:
            self._averaged_step = self.global_step
            self.averaged.update(self._trained_state())

    def on_validation_epoch_start(self) -> None:
        self._check_losses()
        self._check_weights()
        if self.averaged is not None:
            self.averaged.swap(self._trained_state())

    def on_validation_epoch_end(self) -> None:
        self._check_logits()
        if self.averaged is not None:
            self.averaged.swap(self._trained_state())

    def validation_step(self, batch: Batch, _: int) -> Tensor:
        inputs, masks, ids = batch
        logits = self._logits(inputs, masks)
        self._unchecked_logits.append((ids, logits.isfinite().all()))  # the best class of NaN would be one all the same
        prediction = logits.argmax(1)
        self._confusions.append(confusion_matrices(prediction, masks, logits.shape[1]))
        return prediction

    def on_train_epoch_end(self) -> None:
        """Lightning has validated by now: close the epoch's row, before `ModelCheckpoint` saves it."""
        confusions = torch.cat(self._confusions).cpu()
        if not confusions.any():
            raise PipelineError(
                "train: no mask of the val split has a labelled pixel, so no epoch can be scored; add some"
            )
        row = {
            "epoch": self.current_epoch + 1,
            "train_loss": torch.stack(self._losses).mean().item(),
            "val_accuracy": pixel_accuracy(confusions.sum(0)),
            "val_report_miou": report_miou(confusions),
            "val_miou": miou(confusions.sum(0)),
            "lr": self._lr,
        }
        self._losses.clear()
        self._confusions.clear()
        self.history.append(row)
        if row["val_miou"] > self.best["miou"]:
            state = {key: value.detach().cpu().clone() for key, value in self.validated_state().items()}
            self.best = {"miou": row["val_miou"], "epoch": row["epoch"], "state": state}

    def configure_optimizers(self) -> Any:
        chosen = self.settings
        adamw = optimiser(self.model, chosen.lr, chosen.weight_decay, chosen.encoder_lr_scale, chosen.layer_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = schedule(adamw, chosen.schedule, steps, round(steps / chosen.epochs * chosen.warmup_epochs))
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's, which refuses fused optimisers: they could unscale gradients, but bfloat16 scales none."""
        if gradient_clip_val:
            groups = optimizer.param_groups
            nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{key}" for key in self._trained_state()}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}
        checkpoint["history"], checkpoint["best"] = self.history, self.best
        if self.averaged is not None:
            checkpoint["averaged"] = self.averaged.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history, self.best = checkpoint["history"], checkpoint["best"]
        if self.averaged is not None:
            self.averaged.load_state_dict(checkpoint["averaged"])
            self._averaged_step = checkpoint["global_step"]

    def validated_state(self) -> dict[str, Tensor]:
        """The weights that validation sees: the averaged ones, where there are any."""
        return self._averages() or self._trained_state()

    def _averages(self) -> dict[str, Tensor]:
        return {} if self.averaged is None else self.averaged.average

    def _trained_state(self) -> dict[str, Tensor]:
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {key: value for key, value in self.model.state_dict().items() if key not in frozen}


def _fit(task: TrainingTask, settings: Settings, processed: Path, features: Features | None, folder: Path) -> None:
    """Fit from the folder's last checkpoint, or from the start."""
    manifest = processed / "manifest.parquet"
    chosen, size = settings.train, settings.preprocess.image_size
    changes = augmentation(size, chosen.horizontal_flip, chosen.scale, chosen.colour_jitter)
    train_set, val_set = (
        PairDataset(processed, ids, augmented)
        if features is None
        else FeaturePairs(processed, ids, augmented, partial(features.tokens, split))
        for split, ids, augmented in (
            ("train", split_ids(manifest, "train"), changes),
            ("val", split_ids(manifest, "val"), None),
        )
    )
    options: dict[str, Any] = {
        "batch_size": chosen.batch_size,
        "num_workers": chosen.workers,
        "persistent_workers": chosen.workers > 0,
    }
    cuda = torch.cuda.is_available()
    last = folder / "last.ckpt"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    with warnings.catch_warnings():
        for harmless in (".*does not have many workers.*", ".*Checkpoint directory.*", ".*isinstance.treespec.*",
                         ".*LeafSpec.*", ".*smaller than the logging interval.*", ".*in eval mode.*"):  # fmt: skip
            warnings.filterwarnings("ignore", harmless)
        progress: list[Callback] = [TQDMProgressBar()] if on_terminal() else []
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            precision=precision(),
            max_epochs=chosen.epochs,
            accumulate_grad_batches=chosen.accumulate,
            gradient_clip_val=chosen.gradient_clip,
            deterministic="warn" if cuda else True,
            logger=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=bool(progress),
            enable_model_summary=False,
            callbacks=[
                *progress,
                ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True),
                EpochPanels(folder / "panels", chosen.panel_epochs),
                EpochLines(),
                LiveCurves(),
            ],
        )
        where = f"{trainer.strategy.root_device}, {trainer.precision}"
        print(f"train: {len(train_set)} train and {len(val_set)} val pairs on {where}", flush=True)
        sampler = EpochSampler(train_set, chosen.seed)
        if finished := finished_epochs(last):
            print(f"train: going on from the last finished epoch in {folder}", flush=True)
            sampler.set_epoch(finished)  # loader processes ask it before Lightning has told it
        with _memory_remedy():
            trainer.fit(
                task,
                DataLoader(train_set, sampler=sampler, **options),
                DataLoader(val_set, **options),
                ckpt_path=last if finished else None,
                weights_only=True,
            )


@contextmanager
def _memory_remedy() -> Iterator[None]:
    """Turn a lack of memory, on a GPU or not, into what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise PipelineError(
            f"train: out of memory ({text.splitlines()[0] if text else type(error).__name__}); lower train.batch_size "
            "(and raise train.accumulate by as much), encoder.trainable_blocks, decoder.channels or "
            "preprocess.image_size"
        ) from None


class EpochPanels(Callback):
    """Keeps the masks of the first val photos after chosen epochs, `[S, S]` palette PNGs `epoch_01/<number>.png`.

    Not by id: MLflow takes no artifact whose name has a `#` or a `%`, and a `?` ends it.
    """

    def __init__(self, folder: Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = folder, set(epochs)
        self.kept = 0

    def on_validation_epoch_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        self.kept = 0

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        epoch = trainer.current_epoch + 1
        if epoch not in self.epochs:
            return
        for prediction in outputs:
            if self.kept < PANEL_PHOTOS:
                self.kept += 1
                with atomic_path(self.folder / f"epoch_{epoch:02d}" / f"{self.kept}.png") as temporary:
                    mask_image(prediction.cpu().numpy().astype(np.uint8)).save(temporary)


class EpochLines(Callback):
    """A line an epoch, and within an epoch the progress, but on a terminal, where Lightning's bar has it."""

    def __init__(self) -> None:
        self.shown = ExitStack()
        self.progress: Progress | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        self.started, self.loss = time.monotonic(), torch.tensor(torch.nan)
        self._show(trainer, "", int(trainer.num_training_batches), lambda: f"loss {self.loss.item():.4f}")

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.loss = outputs["loss"]  # a number only in a line: a GPU would be waited for
        self._advance()

    def on_validation_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        self._show(trainer, ", validation", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, *_: Any) -> None:
        self._advance()

    def on_validation_end(self, *_: Any) -> None:
        self.shown.close()

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        # Runs before the module's own hook, which closes the row; the line is printed from there on.
        self.seconds = time.monotonic() - self.started

    def on_exception(self, *_: Any) -> None:
        self.shown.close()

    def on_save_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, _: dict[str, Any]) -> None:
        assert isinstance(task, TrainingTask)
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in task.history[-1].items() if key != "epoch")
        print(f"epoch {len(task.history)}/{trainer.max_epochs}  {numbers}  {self.seconds:.0f} s", flush=True)

    def _show(self, trainer: L.Trainer, part: str, steps: int, note: Callable[[], str] | None = None) -> None:
        self.shown.close()
        if not on_terminal():
            what = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{part}"
            self.progress = self.shown.enter_context(Progress(what, steps, "step", note=note))

    def _advance(self) -> None:
        if self.progress is not None:
            self.progress.advance()


def _key(settings: Settings, card: ModelCard, processed: Path, cached: bool) -> str:
    """Hash of everything that the trained weights depend on."""
    packages = {name: version(name) for name in PACKAGES}
    return sha256_json(
        {
            "card": card.model_dump(),
            "train": settings.train.model_dump(exclude={"workers"}),
            "data": sha256_file(processed / "manifest.parquet"),
            "cached": cached,
            "code": sha256_code(CODE),
            "packages": packages,
            "machine": [platform.machine(), torch.cuda.is_available(), precision()],
        }
    )[:16]


def _class_weights(settings: TrainSettings, processed: Path) -> Tensor | None:
    if settings.class_weights == "none":
        return None
    return median_frequency_weights(class_pixels(processed / "manifest.parquet", "train"))


def _origin(settings: EncoderSettings, checkpoint: Path | None) -> str:
    """Where the encoder's first weights come from, for the model card."""
    if checkpoint is not None:
        return f"{checkpoint.name} (sha256 {sha256_file(checkpoint)})" if checkpoint.is_file() else checkpoint.name
    return f"timm {settings.name}" if settings.pretrained else "random"
