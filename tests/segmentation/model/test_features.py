import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import namedtuple
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from segmentation import progress
from segmentation.data.pairs import FeaturePairs, PairDataset, augmentation, split_ids
from segmentation.data.preprocess import preprocess
from segmentation.errors import PipelineError
from segmentation.evaluation.evaluate import evaluate
from segmentation.model import features as module
from segmentation.model import segmenter as model_files
from segmentation.model.encoder import Encoder
from segmentation.model.features import encode, open_features
from segmentation.settings import load_settings
from segmentation.training.loop import train

CLASSES = ["background", "cat", "dog"]
BASE = {
    "preprocess.image_size": 56, "encoder.name": "vit_small_patch14_dinov2", "encoder.pretrained": False,
    "decoder.channels": [16, 16, 8, 8], "train.epochs": 2, "train.workers": 0, "train.lr": 1e-3,
}  # fmt: skip


@pytest.fixture
def project(make_raw, tmp_path, monkeypatch, root):
    """Processed pairs, five to a split, in shards of two; gives settings."""
    monkeypatch.setattr(module, "SHARD_PHOTOS", 2)
    preprocess(make_raw(5, 5).root, tmp_path / "processed", 56)
    return lambda changes=(): load_settings(root / "params.yaml", BASE | dict(changes))


def run(tmp_path, settings, out="features"):
    encode(settings, tmp_path / "processed", tmp_path / out, tmp_path / "scratch")
    return tmp_path / out


def encoder_of(settings) -> Encoder:
    torch.manual_seed(settings.train.seed)
    chosen = settings.encoder
    return Encoder(chosen.name, 56, chosen.trainable_blocks, settings.decoder.skip_connections)


SKIPS = {"decoder.skip_connections": [11, 5, 2], "encoder.trainable_blocks": 2, "train.horizontal_flip": 0.5}


@pytest.mark.parametrize("changes", [{}, SKIPS, {"encoder.trainable_blocks": 0}])
def test_what_is_kept_are_the_frozen_blocks_tokens_of_each_photo_and_view(project, tmp_path, changes):
    settings = project(changes)
    encoder = encoder_of(settings).eval()
    kept = open_features(run(tmp_path, settings), encoder, 56, tmp_path / "processed/manifest.parquet")
    mirrored = settings.train.horizontal_flip > 0
    for split in ("train", "val"):
        pairs = PairDataset(tmp_path / "processed", split_ids(tmp_path / "processed/manifest.parquet", split))
        for position, (image, _, _) in enumerate(pairs):
            for flipped in (False, True) if mirrored and split == "train" else (False,):
                view = image.flip(-1) if flipped else image
                with torch.no_grad():
                    wanted = encoder.frozen(encoder.normalise(view[None]))[0]
                found = kept.tokens(split, position, flipped)
                assert found.dtype == torch.float16
                assert torch.equal(found.float(), wanted)


def test_the_loss_curve_is_that_of_training_without_kept_features(project, tmp_path):
    curves = []
    for cache in (True, False):
        settings = project(SKIPS | {"encode.cache": cache, "train.epochs": 3})
        out = tmp_path / f"cache-{cache}"
        train(settings, tmp_path / "processed", run(tmp_path, settings), CLASSES, out / "m", out / "r", tmp_path / "s")
        curves.append(pd.read_csv(out / "r/history.csv"))
    assert np.allclose(curves[0]["train_loss"], curves[1]["train_loss"], rtol=1e-3)
    assert np.allclose(curves[0]["val_accuracy"], curves[1]["val_accuracy"], atol=0.01)


def test_mirroring_falls_on_the_same_photos_and_masks(project, tmp_path):
    settings = project({"train.horizontal_flip": 0.5})
    kept = open_features(run(tmp_path, settings), encoder_of(settings), 56, tmp_path / "processed/manifest.parquet")
    ids = split_ids(tmp_path / "processed/manifest.parquet", "train")
    changes = augmentation(56, 0.5, None, 0.0)
    photos, encoder, mirrored = PairDataset(tmp_path / "processed", ids, changes), encoder_of(settings).eval(), 0
    tokens = FeaturePairs(tmp_path / "processed", ids, changes, partial(kept.tokens, "train"))
    for index in [(position, seed) for position in range(5) for seed in range(4)]:
        (image, mask, _), (found, same_mask, _) = photos[index], tokens[index]
        with torch.no_grad():
            assert torch.equal(encoder.frozen(encoder.normalise(image[None]))[0], found.float())
        assert torch.equal(mask, same_mask)
        mirrored += not torch.equal(mask, PairDataset(tmp_path / "processed", ids)[index[0]][1])
    assert 0 < mirrored < 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encode.cache": False}, "encode.cache is false"),
        ({"encoder.trainable_blocks": "all"}, "nothing is frozen"),
        ({"train.scale": [0.5, 2.0]}, "another crop"),
        ({"train.colour_jitter": 0.4}, "other colours"),
    ],
)
def test_what_cannot_be_kept_is_said_and_trained_without(project, tmp_path, capsys, changes, reason):
    settings = project(changes)
    folder = run(tmp_path, settings)
    assert reason in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["features.json"]
    assert open_features(folder, encoder_of(settings), 56, tmp_path / "processed/manifest.parquet") is None


@pytest.mark.parametrize(
    "changes", [{"train.epochs": 9, "train.lr": 0.5, "train.dice": 1.0}, {"train.horizontal_flip": 0.3}]
)
def test_what_the_tokens_do_not_depend_on_computes_nothing(project, tmp_path, capsys, changes):
    run(tmp_path, project({"train.horizontal_flip": 0.5}))
    shutil.rmtree(tmp_path / "features")  # as DVC does before a stage runs
    capsys.readouterr()
    run(tmp_path, project({"train.horizontal_flip": 0.5} | changes))
    assert "0 of 6 shards new" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{"train.seed": 1}, {"encoder.trainable_blocks": 2}, {"decoder.skip_connections": [3]}, SKIPS]
)
def test_what_they_depend_on_computes_all_and_forgets_the_old(project, tmp_path, capsys, changes):
    run(tmp_path, project())
    capsys.readouterr()
    run(tmp_path, project(changes), "other")
    assert "6 of 6 shards new" in capsys.readouterr().out
    assert len(list((tmp_path / "scratch/features").iterdir())) == 1


def _encode_slowly(tmp_path, settings):
    module.SHARD_PHOTOS = 2
    frozen = Encoder.frozen

    def slow(self, images):
        time.sleep(0.3)
        return frozen(self, images)

    Encoder.frozen = slow
    run(tmp_path, settings)


@pytest.mark.slow
def test_killed_it_goes_on_with_the_next_shard(project, tmp_path, capsys):
    wanted = {path.name: path.read_bytes() for path in run(tmp_path, project(), "whole").glob("*.npy")}
    shutil.rmtree(tmp_path / "scratch")
    child = multiprocessing.get_context("spawn").Process(target=_encode_slowly, args=(tmp_path, project()))
    child.start()
    deadline = time.monotonic() + 240
    while not list((tmp_path / "scratch").glob("features/*/*_0001.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "features").exists()
    capsys.readouterr()
    found = {path.name: path.read_bytes() for path in run(tmp_path, project()).glob("*.npy")}
    assert int(capsys.readouterr().out.split("photos, ")[1].split(" of 6")[0]) in range(1, 5)
    assert found == wanted


def test_lines_count_views_and_what_an_earlier_run_had_done(project, tmp_path, monkeypatch, capsys):
    settings = project({"train.horizontal_flip": 0.5})
    run(tmp_path, settings, "whole")
    for shard in (tmp_path / "scratch").glob("features/*/*_0000.npy"):  # two train photos, twice, and two val photos
        shard.unlink()
    frozen = Encoder.frozen
    monkeypatch.setattr(Encoder, "frozen", lambda self, images: (time.sleep(0.2), frozen(self, images))[1])
    monkeypatch.setattr(progress, "EVERY", 0.1)
    capsys.readouterr()
    run(tmp_path, settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("encode: ") and " of 15 " in line]
    done = [int(re.match(r"encode: (\d+) of 15 views \(", line)[1]) for line in lines]
    assert done == sorted(done)
    assert 9 <= done[0] < 13
    rates = [found for line in lines if (found := re.search(r"([\d.]+) (s a view|a second)", line))]
    assert rates
    assert all(float(found[1]) <= 5 for found in rates)  # a view takes 0.2 s; with the nine of before it would be more


def test_too_little_room_is_said_before_anything_is_computed(project, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(PipelineError, match=r"GB are needed for the features of 10 views.*encode\.cache: false"):
        run(tmp_path, project())
    assert not list((tmp_path / "scratch").glob("features/*/*.npy"))


def test_features_of_other_weights_photos_or_damage_are_refused(project, tmp_path):
    settings, manifest = project(), tmp_path / "processed/manifest.parquet"
    folder = run(tmp_path, settings)
    with pytest.raises(PipelineError, match="another weights_sha256; make it anew: dvc repro --force encode"):
        open_features(folder, encoder_of(project({"train.seed": 1})), 56, manifest)
    rows = pd.read_parquet(manifest)
    rows["image_sha256"] = rows["image_sha256"].iloc[::-1].to_list()
    rows.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(PipelineError, match="another photos_sha256"):
        open_features(folder, encoder_of(settings), 56, tmp_path / "other.parquet")
    shard = folder / "val_0000.npy"
    shard.unlink()
    shard.write_bytes(b"\x93NUMPY")
    with pytest.raises(PipelineError, match=r"val_0000\.npy: cannot be read"):
        open_features(folder, encoder_of(settings), 56, manifest).tokens("val", 0)
    (folder / "features.json").write_text("{")
    with pytest.raises(PipelineError, match="damaged"):
        open_features(folder, encoder_of(settings), 56, manifest)
    with pytest.raises(PipelineError, match=r"run encode \(`dvc repro`\) first"):
        open_features(tmp_path / "nowhere", encoder_of(settings), 56, manifest)


@pytest.mark.slow
def test_two_at_once_the_second_waits_and_computes_nothing(project, tmp_path):
    run(tmp_path, project())
    (store,) = (tmp_path / "scratch/features").iterdir()
    with FileLock(store / "lock"):
        child = multiprocessing.get_context("spawn").Process(target=_encode_slowly, args=(tmp_path, project()))
        child.start()
        child.join(timeout=8)
        assert child.is_alive()
    child.join(timeout=240)
    assert child.exitcode == 0


def test_evaluation_from_kept_features_is_that_of_the_photos_to_the_bit(project, tmp_path):
    settings = project()
    folder = run(tmp_path, settings)
    train(settings, tmp_path / "processed", folder, CLASSES, tmp_path / "m", tmp_path / "r", tmp_path / "scratch")
    model, _ = model_files.load(tmp_path / "m")
    assert open_features(folder, model.encoder, 56, tmp_path / "processed/manifest.parquet") is not None
    (tmp_path / "none").mkdir()
    (tmp_path / "none/features.json").write_text(json.dumps({"not_cached": "a test"}))
    for features in (folder, tmp_path / "none"):
        evaluate(
            tmp_path / "m", tmp_path / "data/raw", features, tmp_path / "processed/manifest.parquet",
            tmp_path / f"reports-{features.name}", settings.evaluate,
        )  # fmt: skip
    kept, computed = (np.load(tmp_path / f"reports-{n}/per_image_confusion.npz") for n in ("features", "none"))
    assert all(np.array_equal(kept[key], computed[key]) for key in kept)


def test_the_number_of_photos_in_a_shard_is_kept_and_another_is_refused_and_made_anew(
    project, tmp_path, monkeypatch, capsys
):
    settings, manifest = project(), tmp_path / "processed/manifest.parquet"
    folder, encoder = run(tmp_path, settings), encoder_of(settings)
    wanted = [open_features(folder, encoder, 56, manifest).tokens("val", position) for position in range(5)]
    assert json.loads((folder / "features.json").read_text())["shard_photos"] == 2
    monkeypatch.setattr(module, "SHARD_PHOTOS", 3)
    with pytest.raises(PipelineError, match=r"made with another shard_photos; make it anew: dvc repro --force encode"):
        open_features(folder, encoder, 56, manifest)
    capsys.readouterr()
    kept = open_features(run(tmp_path, settings, "anew"), encoder, 56, manifest)
    assert "4 of 4 shards new" in capsys.readouterr().out
    for position, tokens in enumerate(wanted):
        assert torch.equal(kept.tokens("val", position), tokens)


def test_a_shard_that_is_not_laid_out_as_the_card_says_is_refused(project, tmp_path):
    settings, manifest = project(), tmp_path / "processed/manifest.parquet"
    folder = run(tmp_path, settings)
    kept, shard = open_features(folder, encoder_of(settings), 56, manifest), folder / "val_0001.npy"
    whole = np.load(shard)
    for other in (
        whole.astype(np.float32),
        whole[:, :, :, 1:],
        whole[..., :-1],
        np.concatenate([whole, whole], axis=1),
        np.concatenate([whole, whole]),
        whole[:0],
    ):
        shard.unlink()  # it is linked to the store
        np.save(shard, other)
        with pytest.raises(PipelineError, match=r"val_0001\.npy: .*; make it anew: dvc repro --force encode"):
            kept.tokens("val", 2)
    with pytest.raises(PipelineError, match=r"lacks photo 0, view 1"):
        kept.tokens("train", 0, mirrored=True)  # nothing was mirrored
