import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from benchmarks.serving import register_random
from segmentation.data.images import mask_image, read_photo
from segmentation.data.voc import CLASSES
from segmentation.model.segmenter import ModelCard
from segmentation.prediction.predictor import Augmentation, Predictor
from segmentation.registry.client import MODEL_NAME, connect
from tests.conftest import ROOT

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="linear", decoder_channels=[], decoder_norm="batch",
    skip_connections=[], image_size=56, classes=list(CLASSES), encoder_weights="random", epoch=1,
)  # fmt: skip


class Store:
    """An MLflow store with two versions, the first of them champion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.files: dict[str, Path] = {}
        self.predictors: dict[str, Predictor] = {}
        with self.here():
            self.client = connect()
            for seed in (1, 2):
                self.files[register_random(folder / f"run{seed}", CARD, seed, flip=True)] = folder / f"run{seed}/models"

    @contextmanager
    def here(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            yield

    def crown(self, version: str) -> None:
        self.client.set_registered_model_alias(MODEL_NAME, "champion", version)

    def predictor(self, version: str) -> Predictor:
        if version not in self.predictors:
            self.predictors[version] = Predictor.load(self.files[version], Augmentation(flip=True))
        return self.predictors[version]


class Server:
    """`python -m serving` as a user starts it."""

    def __init__(self, store: Store, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = store.folder / f"server{self.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--port", str(self.port), *arguments],
                cwd=ROOT, env=os.environ | {"MLFLOW_TRACKING_URI": store.uri}, stdout=log, stderr=log,
            )  # fmt: skip

    def await_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                return requests.get(f"{self.url}/healthz", timeout=5).raise_for_status()
            except requests.ConnectionError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.text()
                time.sleep(0.2)

    def await_version(self, version: str) -> None:
        deadline = time.monotonic() + 30
        while requests.get(f"{self.url}/model", timeout=5).json()["version"] != version:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)

    def segment(self, photo: bytes, **headers: str) -> requests.Response:
        return requests.post(
            f"{self.url}/segment", photo, headers={"Content-Type": "application/octet-stream"} | headers, timeout=60
        )

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def memory(self) -> float:
        """MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def photo(width: int, height: int, seed: int, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of a drawn photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, kind, **options)
    return stream.getvalue()


def mask_png(predictor: Predictor, body: bytes) -> bytes:
    """What a bare predictor makes of a photo."""
    stream = io.BytesIO()
    mask_image(predictor.mask(read_photo(body)[0])).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[Server]:
    """One for all tests of a file, serving version 1 at their start."""
    store.crown("1")
    server = Server(store)
    try:
        server.await_ready()
        yield server
    finally:
        server.stop()
