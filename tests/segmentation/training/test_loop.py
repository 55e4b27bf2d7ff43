import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from segmentation import progress
from segmentation.data.images import mask_image, read_mask
from segmentation.data.preprocess import preprocess
from segmentation.data.sample import draw_sample
from segmentation.data.voc import CLASSES as VOC_CLASSES
from segmentation.errors import PipelineError
from segmentation.model import segmenter as model_files
from segmentation.model.features import encode
from segmentation.settings import Settings, load_settings
from segmentation.training.loop import TrainingTask, train

CLASSES = ["background", "cat", "dog"]


@pytest.fixture
def project(make_raw, tmp_path, monkeypatch, root):
    """A folder with processed pairs; `run(...)` trains there."""
    monkeypatch.chdir(tmp_path)
    preprocess(make_raw(6, 3).root, tmp_path / "data/processed", 56)
    return root / "params.yaml"


BASE = {
    "preprocess.image_size": 56, "encoder.name": "vit_small_patch14_dinov2", "encoder.pretrained": False,
    "decoder.channels": [16, 16, 8, 8], "train.epochs": 3, "train.workers": 0, "train.lr": 1e-3,
}  # fmt: skip


def settings(params, **train_changes) -> Settings:
    return load_settings(params, BASE | {f"train.{key}": value for key, value in train_changes.items()})


def run(tmp_path, settings: Settings, out: str = "out") -> tuple[dict[str, torch.Tensor], pd.DataFrame, dict]:
    folder = tmp_path / out
    encode(settings, tmp_path / "data/processed", tmp_path / "data/features", tmp_path / "scratch")
    train(
        settings,
        tmp_path / "data/processed",
        tmp_path / "data/features",
        CLASSES,
        folder / "models",
        folder / "reports",
        tmp_path / "scratch",
    )
    card = json.loads((folder / "models/segmenter.json").read_text())
    return load_file(folder / "models/segmenter.safetensors"), pd.read_csv(folder / "reports/history.csv"), card


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def forget_checkpoints(tmp_path):
    for path in (tmp_path / "scratch/checkpoints").glob("*/last.ckpt"):
        path.unlink()


def test_the_history_has_the_reports_columns_and_true_miou(project, tmp_path):
    _, history, card = run(tmp_path, settings(project))
    assert list(history.columns) == ["epoch", "train_loss", "val_accuracy", "val_report_miou", "val_miou", "lr"]
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert card["epoch"] == history.loc[history["val_miou"].idxmax(), "epoch"]
    assert card["encoder_weights"] == "random"


def test_one_seed_gives_the_same_weights_and_history(project, tmp_path):
    first = run(tmp_path, settings(project))
    forget_checkpoints(tmp_path)
    second = run(tmp_path, settings(project))
    forget_checkpoints(tmp_path)
    other = run(tmp_path, settings(project, seed=1))
    assert same(first[0], second[0])
    assert first[1].equals(second[1])
    assert not same(first[0], other[0])


def test_frozen_weights_do_not_move_and_trained_ones_do(project, tmp_path):
    one, _, _ = run(tmp_path, settings(project, epochs=1, keep="last"))
    two, _, _ = run(tmp_path, settings(project, epochs=2, keep="last"))
    moved = {key for key in one if not torch.equal(one[key], two[key])}
    assert "encoder.vit.blocks.11.attn.qkv.weight" in moved
    assert "decoder.head.weight" in moved
    assert not {key for key in moved if key.startswith("encoder.vit.") and not key.startswith("encoder.vit.blocks.11.")}


def test_keep_chooses_between_best_and_last(project, tmp_path):
    # A learning rate that wrecks the model after a good start makes the two differ.
    best, history, card = run(tmp_path, settings(project, epochs=4, lr=0.02, keep="best"))
    last, _, last_card = run(tmp_path, settings(project, epochs=4, lr=0.02, keep="last"), "last")
    assert last_card["epoch"] == 4
    assert card["epoch"] == history["val_miou"].idxmax() + 1
    assert same(best, last) == (card["epoch"] == 4)


def _train_in_child(tmp_path, settings):
    os.chdir(tmp_path)
    train(
        settings,
        tmp_path / "data/processed",
        tmp_path / "data/features",
        CLASSES,
        tmp_path / "m",
        tmp_path / "r",
        tmp_path / "scratch",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_within_an_epoch_lines_say_how_far_it_is(project, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    run(tmp_path, settings(project, epochs=2, workers=workers))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    steps = [
        line for line in lines if re.fullmatch(r"epoch 1/2: [0-3] of 3 steps \(\d+%\), .+, loss (nan|\d\.\d+)", line)
    ]
    checks = [line for line in lines if re.fullmatch(r"epoch 1/2, validation: [0-2] of 2 steps \(\d+%\), .+", line)]
    assert steps
    assert checks
    first = next(number for number, line in enumerate(lines) if "train_loss" in line)
    assert lines.index(steps[0]) < lines.index(checks[0]) < first
    assert all(line.startswith("epoch 2/2") for line in lines[first + 1 :])
    assert not [thread for thread in threading.enumerate() if "_repeat" in thread.name]


def test_an_error_within_an_epoch_leaves_no_line_behind_it(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(TrainingTask, "training_step", lambda self, batch, index: torch.tensor(1 / 0))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, settings(project))
    assert not [thread for thread in threading.enumerate() if "_repeat" in thread.name]


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_goes_on_and_ends_the_same(project, tmp_path, capsys):
    wanted = settings(project, epochs=6)
    uninterrupted = run(tmp_path, wanted)
    forget_checkpoints(tmp_path)
    child = multiprocessing.get_context("spawn").Process(target=_train_in_child, args=(tmp_path, wanted))
    child.start()
    deadline = time.monotonic() + 240
    while not list((tmp_path / "scratch/checkpoints").glob("*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    capsys.readouterr()
    resumed = run(tmp_path, wanted, "resumed")
    printed = capsys.readouterr().out
    assert "going on from the last finished epoch" in printed
    assert "epoch 1/6" not in printed
    assert same(uninterrupted[0], resumed[0])
    assert uninterrupted[1].equals(resumed[1])


def test_a_finished_training_is_not_repeated(project, tmp_path, capsys):
    first = run(tmp_path, settings(project))
    capsys.readouterr()
    second = run(tmp_path, settings(project))
    assert "epoch" not in capsys.readouterr().out.replace("last finished epoch", "")
    assert same(first[0], second[0])


def test_a_damaged_checkpoint_is_put_aside_and_training_starts_over(project, tmp_path, capsys):
    first = run(tmp_path, settings(project, epochs=1))
    (last,) = (tmp_path / "scratch/checkpoints").glob("*/last.ckpt")
    last.write_bytes(last.read_bytes()[:-1000])
    second = run(tmp_path, settings(project, epochs=1))
    assert f"{last} is damaged" in capsys.readouterr().out
    assert last.with_suffix(".damaged").exists()
    assert same(first[0], second[0])


def test_other_settings_or_data_have_a_checkpoint_of_their_own(project, tmp_path):
    run(tmp_path, settings(project))
    run(tmp_path, settings(project, lr=2e-3))
    assert len(list((tmp_path / "scratch/checkpoints").iterdir())) == 2


def test_the_same_training_twice_at_once_is_refused(project, tmp_path):
    run(tmp_path, settings(project, epochs=1))
    (folder,) = (tmp_path / "scratch/checkpoints").iterdir()
    (folder / "owner.json").write_text('{"pid": 4321}')
    with FileLock(folder / "lock"), pytest.raises(PipelineError, match="4321 is training exactly this already"):
        run(tmp_path, settings(project, epochs=1))


LOSSES = ["lovasz_softmax", "cross_entropy", "dice", "focal"]


def poison(monkeypatch, at_step: int, value: float = math.nan):
    """From its `at_step`-th step on, counted from 0, a training has one weight of its head that is no number."""
    original = TrainingTask.training_step

    def step(task, batch, index):
        if task.global_step == at_step:
            with torch.no_grad():
                task.model.decoder.head.weight[0, 0] = value
        return original(task, batch, index)

    monkeypatch.setattr(TrainingTask, "training_step", step)


def nothing_is_written(tmp_path, out="out") -> dict:
    """What `not_finite.json` says, where neither a model nor a checkpoint is beside it."""
    assert not list((tmp_path / out).rglob("*.*"))
    assert not list((tmp_path / "scratch").rglob("*.ckpt"))
    (record,) = (tmp_path / "scratch/checkpoints").glob("*/not_finite.json")
    return json.loads(record.read_text())


@pytest.mark.parametrize(("loss", "value"), [*((loss, math.nan) for loss in LOSSES), (LOSSES[0], math.inf)])
def test_weights_that_are_not_finite_stop_every_loss_and_the_photos_are_named(
    project, tmp_path, monkeypatch, loss, value
):
    poison(monkeypatch, 1, value)
    chosen = dict.fromkeys(LOSSES, 0.0) | {loss: 1.0}
    with pytest.raises(PipelineError, match=r"train: the loss is (nan|inf) for train\d.*kept in .*not_finite\.json"):
        run(tmp_path, settings(project, **chosen))
    kept = nothing_is_written(tmp_path)
    assert (kept["loss"] in ("nan", "inf"), kept["epoch"], len(kept["ids"])) == (True, 1, 2)


def test_where_losses_are_looked_at_seldom_the_first_bad_step_is_named_all_the_same(project, tmp_path, monkeypatch):
    """As on a GPU: the ids of the steps between are kept."""
    seen = []
    original = TrainingTask.training_step

    def step(task, batch, index):
        seen.append(list(batch[2]))
        return original(task, batch, index)

    monkeypatch.setattr(TrainingTask, "training_step", step)
    monkeypatch.setattr(TrainingTask, "looks_after", lambda self: 50)
    poison(monkeypatch, 1)
    with pytest.raises(PipelineError, match="the loss is nan for train"):
        run(tmp_path, settings(project))
    assert len(seen) == 3
    assert nothing_is_written(tmp_path)["ids"] == seen[1]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_last_step_that_ruins_the_weights_leaves_no_checkpoint(project, tmp_path, monkeypatch, ema):
    """The loss of an epoch's last step is finite, and its gradient is not."""
    original = TrainingTask.configure_gradient_clipping

    def ruin(task, optimizer, **clipping):
        if task.global_step == 2:
            task.model.decoder.head.bias.grad[1] = math.inf
        return original(task, optimizer, **clipping)

    monkeypatch.setattr(TrainingTask, "configure_gradient_clipping", ruin)
    with pytest.raises(PipelineError, match=r"the weights are not finite after epoch 1 \(.*decoder\.head\.bias"):
        run(tmp_path, settings(project, ema_decay=ema))
    kept = nothing_is_written(tmp_path)
    assert "decoder.head.bias" in kept["weights"]
    assert len(kept["ids"]) == 2


def test_a_learning_rate_that_is_far_too_high_is_named_as_such(project, tmp_path):
    with pytest.raises(PipelineError, match=r"not_finite\.json\); lower train\.lr, or set train\.gradient_clip: 1\.0"):
        run(tmp_path, settings(project, lr=1e30))
    nothing_is_written(tmp_path)


def test_logits_that_overflow_in_validation_are_no_prediction(project, tmp_path, monkeypatch):
    """Weights are finite, and so is the loss; what validation computes from them is not."""
    original = TrainingTask._logits

    def logits(task, inputs, masks):
        found = original(task, inputs, masks)
        return found if task.training else found * 1e38 * 1e38

    monkeypatch.setattr(TrainingTask, "_logits", logits)
    with pytest.raises(PipelineError, match=r"the logits are not finite in validation for val0, val1"):
        run(tmp_path, settings(project))
    assert nothing_is_written(tmp_path)["ids"] == ["val0", "val1"]


def test_an_encoder_file_with_nan_is_refused_before_anything_is_computed(project, tmp_path):
    """At `encode` where a frozen block has it, at `train` where a trained one has."""
    for block, message in (
        (3, r"encode: the tokens are not finite"),
        (11, r"weights are not finite before the first step: enc"),
    ):
        weights = timm.create_model("vit_small_patch14_dinov2", img_size=56).state_dict()
        weights[f"blocks.{block}.mlp.fc1.weight"][0, 0] = math.nan
        file = tmp_path / f"block{block}.safetensors"
        save_file(weights, file)
        chosen = load_settings(project, BASE | {"encoder.checkpoint": str(file), "encoder.pretrained": True})
        with pytest.raises(PipelineError, match=message):
            run(tmp_path, chosen)
        assert not list((tmp_path / "out").rglob("*.*"))
        assert bool(list(tmp_path.rglob("train_0000.npy"))) == (block == 11)  # no tokens of NaN are kept


def test_a_val_split_without_a_labelled_pixel_is_no_score(project, tmp_path):
    for mask in (tmp_path / "data/processed/masks").glob("val*.png"):
        mask_image(np.full_like(read_mask(mask), 255)).save(mask)
    with pytest.raises(PipelineError, match="no mask of the val split has a labelled pixel"):
        run(tmp_path, settings(project))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_too_little_memory_says_what_to_lower(project, tmp_path, monkeypatch, error):
    def fail(logits, mask):
        raise error

    monkeypatch.setattr("segmentation.training.loop.lovasz_softmax", fail)
    with pytest.raises(PipelineError, match=r"out of memory.*lower train\.batch_size \(and raise train\.accumulate"):
        run(tmp_path, settings(project))


OPTIONS = [
    {"accumulate": 2}, {"weight_decay": 0.5}, {"encoder_lr_scale": 0.1}, {"schedule": "cosine"}, {"schedule": "poly"},
    {"schedule": "onecycle"}, {"schedule": "cosine", "warmup_epochs": 1}, {"gradient_clip": 0.01}, {"ema_decay": 0.9},
    {"lovasz_softmax": 0.0, "cross_entropy": 1.0}, {"dice": 1.0}, {"focal": 1.0},
    {"cross_entropy": 1.0, "class_weights": "median_frequency"}, {"cross_entropy": 1.0}, {"horizontal_flip": 0.5},
    {"scale": [0.5, 2.0]}, {"colour_jitter": 0.4},
]  # fmt: skip


@pytest.mark.slow
def test_every_option_of_train_changes_the_weights_and_no_two_alike(project, tmp_path):
    """From params.yaml to the weights, two epochs each; what an option does is tested where it is done."""
    runs = [run(tmp_path, settings(project, epochs=2, keep="last"), "default")[0]]
    for number, option in enumerate(OPTIONS):
        runs.append(run(tmp_path, settings(project, epochs=2, keep="last", **option), f"option{number}")[0])
    heads = {weights["decoder.head.weight"].numpy().tobytes() for weights in runs}
    assert len(heads) == len(OPTIONS) + 1


MODEL_OPTIONS = [
    {"encoder.trainable_blocks": 0}, {"encoder.trainable_blocks": 2}, {"encoder.trainable_blocks": "all"},
    {"encoder.name": "vit_small_patch14_reg4_dinov2"}, {"decoder.type": "linear"}, {"decoder.norm": "group"},
    {"decoder.norm": "layer"}, {"decoder.skip_connections": [8, 5, 2]},
]  # fmt: skip


@pytest.mark.slow
def test_every_option_of_encoder_and_decoder_trains_another_model_that_is_loaded_again(project, tmp_path):
    seen = set()
    for number, option in enumerate([{}, *MODEL_OPTIONS]):
        run(tmp_path, load_settings(project, BASE | {"train.epochs": 1} | option), f"model{number}")
        model, card = model_files.load(tmp_path / f"model{number}/models")
        with torch.no_grad():
            seen.add(model(torch.full((1, 3, 56, 56), 99, dtype=torch.uint8)).numpy().tobytes())
        assert card.classes == CLASSES
    assert len(seen) == len(MODEL_OPTIONS) + 1


def test_layer_decay_slows_the_earlier_of_the_trained_blocks(project, tmp_path):
    def moved(decay: float) -> list[float]:
        wanted = settings(project, epochs=1, keep="last", layer_decay=decay)
        two = wanted.model_copy(update={"encoder": wanted.encoder.model_copy(update={"trainable_blocks": 2})})
        torch.manual_seed(0)
        weights = run(tmp_path, two)[0]
        fresh = run(tmp_path, two.model_copy(update={"train": two.train.model_copy(update={"lr": 1e-12})}))[0]
        keys = [f"encoder.vit.blocks.{block}.mlp.fc1.weight" for block in (10, 11)]
        return [(weights[key] - fresh[key]).abs().mean().item() for key in keys]

    even, slowed = moved(1.0), moved(0.1)
    assert slowed[1] == pytest.approx(even[1], rel=0.2)
    assert slowed[0] < 0.2 * even[0]


@pytest.mark.slow
def test_with_everything_on_a_killed_run_ends_as_an_uninterrupted_one(project, tmp_path, monkeypatch):
    """Optimiser, schedule, averaged weights, random state, sampler and augmentation go on where they were."""
    wanted = settings(
        project, epochs=4, keep="last", schedule="onecycle", ema_decay=0.9, accumulate=2, horizontal_flip=0.5,
        scale=[0.5, 2.0], colour_jitter=0.4, gradient_clip=1.0, workers=1,
    )  # fmt: skip
    uninterrupted = run(tmp_path, wanted)
    forget_checkpoints(tmp_path)

    step = TrainingTask.training_step

    def stop(task, batch, index):
        if task.current_epoch == 2:
            raise RuntimeError("stopped in epoch 3")
        return step(task, batch, index)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="stopped in epoch 3"):
        broken.setattr(TrainingTask, "training_step", stop)
        run(tmp_path, wanted)
    resumed = run(tmp_path, wanted, "resumed")
    assert same(uninterrupted[0], resumed[0])
    assert uninterrupted[1].equals(resumed[1])


def test_averaged_weights_are_what_is_validated_and_kept(project, tmp_path):
    """A decay that keeps nothing but the start: the kept weights are almost those of the first step."""
    _, plain, _ = run(tmp_path, settings(project, epochs=3, keep="last"), "plain")
    _, averaged, _ = run(tmp_path, settings(project, epochs=3, keep="last", ema_decay=0.999), "averaged")
    assert averaged["train_loss"].tolist() == plain["train_loss"].tolist()  # training itself does not see them
    assert averaged["val_accuracy"].tolist() != plain["val_accuracy"].tolist()


def test_masks_are_kept_after_the_panel_epochs(project, tmp_path):
    run(tmp_path, settings(project, epochs=3, panel_epochs=[1, 3, 9]))
    panels = tmp_path / "out/reports/panels"
    assert sorted(path.name for path in panels.iterdir()) == ["epoch_01", "epoch_03"]
    masks = sorted((panels / "epoch_03").iterdir())
    assert [path.name for path in masks] == ["1.png", "2.png", "3.png"]  # ids may hold what MLflow refuses
    assert read_mask(masks[0]).shape == (56, 56)
    assert read_mask(masks[0]).max() < len(CLASSES)


def test_settings_without_effect_are_said(project, tmp_path, capsys):
    run(tmp_path, settings(project, epochs=1, class_weights="median_frequency", layer_decay=0.5))
    printed = capsys.readouterr().out
    assert "warning: train.class_weights: train.cross_entropy, which they weigh, is 0; it has no effect" in printed
    assert "warning: train.layer_decay: 1 encoder blocks are trained" in printed


# Recorded from a run of this test on a CPU with torch 2.14.1. Whoever changes it changed what training does.
GOLDEN = [3.825697, 3.627818, 3.55461, 3.555252]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 2e-3), ("bf16-mixed", 1e-2)])
def test_the_loss_curve_on_the_sample_is_the_golden_one(root, tmp_path, monkeypatch, precision, tolerance):
    """In bfloat16 as well, whatever this machine would choose."""
    monkeypatch.setattr("segmentation.training.loop.precision", lambda: precision)
    monkeypatch.chdir(tmp_path)
    draw_sample(tmp_path / "data/raw", 6)
    preprocess(tmp_path / "data/raw", tmp_path / "data/processed", 56)
    wanted = settings(root / "params.yaml", epochs=4, cross_entropy=1.0)
    encode(wanted, tmp_path / "data/processed", tmp_path / "data/features", tmp_path / "s")
    train(
        wanted,
        tmp_path / "data/processed",
        tmp_path / "data/features",
        list(VOC_CLASSES),
        tmp_path / "m",
        tmp_path / "r",
        tmp_path / "s",
    )
    history = pd.read_csv(tmp_path / "r/history.csv")
    assert history["train_loss"].tolist() == pytest.approx(GOLDEN, rel=tolerance)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "localhost:5000"])
def test_a_tracking_server_that_is_away_or_misspelled_costs_no_training(project, tmp_path, monkeypatch, capsys, uri):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    _, history, _ = run(tmp_path, settings(project, epochs=2))
    assert len(history) == 2
    assert capsys.readouterr().out.count("no live curves from here on") == 1
