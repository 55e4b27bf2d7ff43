"""Real versions in a real store; the photos are drawn, and the models are fitted in a second or not at all."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segmentation.data.images import mask_image, read_mask, read_photo
from segmentation.errors import PipelineError
from segmentation.files import write_json
from segmentation.metrics.confusion import class_iou
from segmentation.model import segmenter as model
from segmentation.model.segmenter import ModelCard
from segmentation.prediction.predictor import Predictor
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.gate import compare, relative_checks
from segmentation.registry.promotion import Pair, Scored, contest, decide, score_in_turn
from segmentation.registry.register import register
from segmentation.registry.versions import find_version, load_predictor
from segmentation.settings import PromoteSettings

# a limit for two models of one size on a busy machine; the rule itself is tested with the gate
SETTINGS = PromoteSettings(min_gain=0.0, max_class_drop=0.05, max_latency_ratio=5.0)
CARD = ModelCard(
    encoder="test_vit", trainable_blocks="all", decoder="linear", decoder_channels=[8, 8, 8, 8], decoder_norm="batch",
    skip_connections=[], image_size=64, classes=["background", "patch"], encoder_weights="random", epoch=1,
)  # fmt: skip
TAGS = {"evaluation_set_sha256": "e" * 64, "data_hash": "d.dir", "data_checks": "passed", "experiment_commit": "c" * 40}
WEAK, GOOD, CHANGED = "1", "2", "3"


def draw() -> tuple[Tensor, Tensor]:
    """Photos `[24, 3, 64, 64]` of a bright patch on dark noise, and their masks."""
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 80, (24, 3, 64, 64), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(24, 64, 64, dtype=torch.uint8)
    for photo, mask in zip(photos, masks, strict=True):
        top, left = torch.randint(0, 35, (2,), generator=generator).tolist()
        mask[top : top + 28, left : left + 24] = 1
        photo[:, mask == 1] += 120
    return photos, masks


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    photos, masks = draw()
    return [
        (png(Image.fromarray(photo.permute(1, 2, 0).numpy())), png(mask_image(mask.numpy())))
        for photo, mask in zip(photos, masks, strict=True)
    ]


def unread() -> Iterator[Pair]:
    raise AssertionError("the photos were read")
    yield


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[MlflowClient]:
    """A store with a model that learned nothing, one that is good, and that one with other code stored beside it."""
    photos, masks = draw()
    torch.manual_seed(0)
    net = model.build(CARD)
    folder = tmp_path_factory.mktemp("store")
    (folder / "reports/training").mkdir(parents=True)
    (folder / "reports/training/history.csv").write_text("epoch,val_miou\n1,0.5\n")
    write_json(folder / "reports/evaluation/metrics.json", {"miou": 0.5})
    (folder / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    (folder / "dvc.lock").write_text("")

    def add(number: str) -> None:
        model.save(net.eval(), CARD, folder / "models")
        assert register(folder, TAGS | {"experiment": number, "dvc_lock_sha256": number}).version == number

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns/mlflow.db")
        add(WEAK)
        optimiser = torch.optim.AdamW(net.train().parameters(), 3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(net(photos), masks.long()).backward()
            optimiser.step()
        add(GOOD)
        add(CHANGED)
        change(code(CHANGED), "return mask.cpu().numpy()", "return mask.cpu().numpy()[::-1].copy()")
        yield connect()


def code(version: str) -> Path:
    stored = connect().get_model_version_download_uri(MODEL_NAME, version).removeprefix("file://")
    return Path(stored) / "code/segmentation/prediction/predictor.py"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


@pytest.fixture(autouse=True)
def held(client: MlflowClient) -> None:
    client.set_registered_model_alias(MODEL_NAME, "champion", WEAK)


def failed(decision: dict) -> list[str]:
    return [check["name"] for check in decision["checks"] if not check["passed"]]


def test_a_better_model_is_promoted_with_all_numbers_and_nothing_moves_yet(client, pairs):
    decision = decide(contest(GOOD), iter(pairs), SETTINGS, None)
    assert (decision["verdict"], decision["branch"], failed(decision)) == ("promote", "comparison", [])
    assert decision["reasons"] == ["every check passed"]
    assert decision["photos"] == 24
    assert decision["thresholds"] == SETTINGS.model_dump()
    assert (decision["champion"]["version"], decision["candidate"]["version"]) == (WEAK, GOOD)
    assert decision["candidate"]["experiment_commit"] == "c" * 40
    for role, version in (("champion", WEAK), ("candidate", GOOD)):
        predictor = load_predictor(find_version(client, version))
        confusion = torch.zeros(2, 2)
        for photo, mask in pairs:
            predicted, truth = predictor.mask(read_photo(photo)[0]).astype(int), read_mask(mask).astype(int)
            confusion += torch.from_numpy(np.bincount((2 * truth + predicted).ravel(), minlength=4)).view(2, 2)
        iou = class_iou(confusion).tolist()
        assert decision["scores"][role]["miou"] == decision["comparison"]["miou"][role] == pytest.approx(np.mean(iou))
        assert [one[role] for one in decision["comparison"]["classes"]] == pytest.approx(iou)
        assert decision["scores"][role]["seconds"] > 0
    assert decision["scores"]["candidate"]["miou"] > 0.8 > decision["scores"]["champion"]["miou"]
    assert contest(GOOD).aliases["champion"] == WEAK
    assert json.loads(json.dumps(decision, allow_nan=False))["scores"] == decision["scores"]


@pytest.mark.slow
def test_a_stored_model_that_gives_other_masks_is_refused_even_by_force(client, pairs):
    client.set_registered_model_alias(MODEL_NAME, "champion", GOOD)
    decision = decide(contest(CHANGED), pairs, SETTINGS, "the deadline")
    assert decision["verdict"] == "refuse"
    assert decision["force_reason"] == "the deadline"
    assert failed(decision) == ["gain", "reproduction"]
    assert "near-tie" in decision["reasons"][0]  # it is the champion's very weights
    assert "other masks of 4 of 4 photos" in decision["reasons"][1]


def test_a_first_champion_whose_stored_code_does_not_load_is_refused(client, pairs):
    client.delete_registered_model_alias(MODEL_NAME, "champion")
    change(code(CHANGED), "import numpy as np", "raise RuntimeError('no such luck')")
    decision = decide(contest(CHANGED), pairs[:2], SETTINGS, None)
    assert (decision["verdict"], decision["branch"], failed(decision)) == ("refuse", "first champion", ["reproduction"])
    assert [check["name"] for check in decision["checks"]] == ["data_checks", "reproduction"]
    assert decision["champion"] is decision["comparison"] is None
    assert list(decision["scores"]) == ["candidate"]
    assert "reloaded from the registry it fails: " in decision["reasons"][0]
    assert "no such luck" in decision["reasons"][0]


@pytest.mark.slow
def test_another_evaluation_set_is_refused_unread_and_by_force_judged_without_the_champion(client, pairs):
    found = contest(GOOD)
    found.champion.tags.update(evaluation_set_sha256="f" * 64)
    assert found.branch == "comparison"  # the same raw data at another training size
    found.champion.tags.update(data_hash="other.dir")
    found.candidate.tags.update(data_checks="failed")
    decision = decide(found, unread(), SETTINGS, None)
    assert (decision["verdict"], decision["branch"]) == ("refuse", "other evaluation set")
    assert "evaluation set" in decision["reasons"][0]
    decision = decide(found, pairs[:2], SETTINGS, "new data")
    assert (decision["verdict"], decision["branch"], failed(decision)) == (
        "promote", "other evaluation set", ["data_checks"],
    )  # fmt: skip
    assert decision["comparison"] is None
    assert decision["reasons"] == ["forced: new data", "data_checks: the checks of its data: failed"]


@pytest.mark.slow
def test_a_champion_that_cannot_be_loaded_is_replaced_by_force_only(client, pairs):
    (weights,) = code(WEAK).parents[3].rglob("segmenter.safetensors")
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1000])
        with pytest.raises(PipelineError, match=r"/1, the champion, cannot be loaded .*force a promotion"):
            decide(contest(GOOD), unread(), SETTINGS, None)
        decision = decide(contest(GOOD), pairs[:2], SETTINGS, "its file is damaged")
    finally:
        weights.write_bytes(whole)
    assert (decision["verdict"], decision["branch"]) == ("promote", "champion cannot be loaded")
    assert list(decision["scores"]) == ["candidate"]
    assert decision["champion"]["version"] == WEAK
    forced, champion = decision["reasons"]
    assert forced == "forced: its file is damaged"
    assert champion.startswith("champion: ") and "segmenter" in champion


def test_the_champion_itself_is_left_as_it_is(client):
    decision = decide(contest("champion"), unread(), SETTINGS, None)
    assert (decision["verdict"], decision["branch"]) == ("keep", "already champion")


def test_what_cannot_be_measured_is_one_message(client):
    with pytest.raises(PipelineError, match="no version or alias '77'"):
        contest("77")
    client.create_model_version(MODEL_NAME, "file:///by/hand")
    with pytest.raises(PipelineError, match=r"/4: lacks data_checks, data_hash, evaluation_set_sha256, experiment_com"):
        contest("4")


@pytest.mark.slow
def test_a_model_against_itself_is_not_refused_for_its_latency_under_load(pairs):
    """100 tries on 8 photos, while as many processes as there are cores do nothing but work."""
    predictor = Predictor(model.build(CARD).eval(), CARD, torch.device("cpu"))
    limits = SETTINGS.model_copy(update={"max_latency_ratio": 1.2})
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        says = []
        for _ in range(100):
            models = Scored(predictor), Scored(predictor)
            score_in_turn(models, pairs[:8], lambda: None)
            champion, candidate = (torch.stack(one.confusions) for one in models)
            comparison = compare(champion, candidate, CARD.classes)
            says.append(relative_checks(comparison, models[0].seconds, models[1].seconds, limits)[2])
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert sum(not check.passed for check in says) <= 1, [check.says for check in says if not check.passed]
