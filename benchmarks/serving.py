"""The server under load: every mask checked, the champion moved meanwhile, throughput against the plain predictor's.

    python -m benchmarks.serving --clients 16 --seconds 60 --json serving.json

A store with two versions of random weights is made in a temporary folder and `python -m serving` started on it. The
seconds are split into rounds; in every fourth one the champion moves. Before, between and after the rounds one process
alone does the same work (bytes of a photo to bytes of a mask), so that each round is measured against its
neighbours on a machine that may slow down. CPU seconds a mask tell more than the clock where other work goes on.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

# read when torch is imported: the plain predictor's threads are to wait as the server's do
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import psutil
import torch

from segmentation.data.images import read_photo
from segmentation.data.sample import draw_sample
from segmentation.data.voc import CLASSES, VocFolder
from segmentation.files import write_json
from segmentation.model.segmenter import ModelCard, build, save
from segmentation.prediction.predictor import Augmentation, Predictor, mask_png
from segmentation.registry.client import MODEL_NAME, connect
from segmentation.registry.register import register

ROUNDS = 12
PHOTOS = 16
CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="unet", decoder_channels=[128, 96, 64, 48],
    decoder_norm="batch", skip_connections=[], image_size=224, classes=list(CLASSES), encoder_weights="random", epoch=1,
)  # fmt: skip


def register_random(folder: Path, card: ModelCard, seed: int, flip: bool = False, scale: float = 1.0) -> str:
    """Register a model of random weights from a run's files; returns its version.

    Args:
        folder: where the files are written.
        card: what the model is.
        seed: of the weights.
        flip: whether it is to predict with test-time augmentation.
        scale: what the decoder's weights are multiplied by.
    """
    torch.manual_seed(seed)
    model = build(card).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(scale)
    save(model, card, folder / "models")
    evaluate = {"flip": flip, "scales": [1.0], "sliding_window": False}
    (folder / "params.yaml").write_text(json.dumps({"evaluate": evaluate}))
    (folder / "dvc.lock").write_text(f"schema: '{seed}'\n")
    (folder / "reports/training").mkdir(parents=True)
    (folder / "reports/training/history.csv").write_text("epoch,train_loss\n1,0.5\n")
    write_json(folder / "reports/evaluation/metrics.json", {"miou": 0.25, "photos": 4})
    return register(folder, {"experiment": f"seed-{seed}", "dvc_lock_sha256": f"{seed:064x}"}).version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help="at once (default: 16)")
    parser.add_argument("--seconds", type=float, default=60, help="under load, in all (default: 60)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    arguments = parser.parse_args()
    result = arguments.json.absolute() if arguments.json else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the store's lock and artifacts go there
        measured = measure(Path(folder), arguments.clients, arguments.seconds)
    if result:
        write_json(result, measured)
    if measured["wrong_masks"] or set(measured["statuses"]) - {"200", "429", "503"}:
        sys.exit("error: wrong masks or unexpected statuses, see above")


def measure(folder: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Run it all in `folder`; prints and returns the numbers."""
    checkout = Path(__file__).resolve().parents[1]
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    registry = connect()
    versions = [register_random(folder / f"run{seed}", CARD, seed) for seed in (1, 2)]
    draw_sample(folder / "photos", PHOTOS)
    photos = [VocFolder(folder / "photos").photo(name).read_bytes() for name in VocFolder(folder / "photos").ids("val")]
    predictors = {
        version: Predictor.load(folder / f"run{seed}" / "models", Augmentation())
        for seed, version in enumerate(versions, 1)
    }
    masks = {version: [predicted(predictor, photo) for photo in photos] for version, predictor in predictors.items()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "serving", "--port", str(port)],
            env=os.environ | {"PYTHONPATH": str(checkout)}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while not listens(port):
            if server.poll() is not None:
                sys.exit((folder / "server.log").read_text())
            time.sleep(0.2)
        load = Load(port, photos, masks, psutil.Process(server.pid))
        alone = [plain(predictors[versions[0]], photos, seconds / ROUNDS)]
        rounds: list[dict[str, Any]] = []
        for number in range(ROUNDS):
            moves = number % 4 == 3
            mover = threading.Timer(
                seconds / ROUNDS / 4,
                registry.set_registered_model_alias, (MODEL_NAME, "champion", versions[(number + 1) // 4 % 2]),
            )  # fmt: skip
            if moves:
                mover.start()
            served = load.run(clients, seconds / ROUNDS)
            alone.append(plain(predictors[versions[0]], photos, seconds / ROUNDS))
            beside = {key: statistics.mean(rate[key] for rate in alone[-2:]) for key in served}
            rounds.append({
                "champion_moves": moves, "server": served, "plain": beside,
                "throughput": served["masks_a_second"] / beside["masks_a_second"],
                "cpu": served["cpu_seconds_a_mask"] / beside["cpu_seconds_a_mask"],
            })  # fmt: skip
            print("round {}: {:.2f} masks/s, {:.1%} of the plain predictor's; CPU a mask {:.3f} s, {:.1%}{}".format(
                number + 1, served["masks_a_second"], rounds[-1]["throughput"], served["cpu_seconds_a_mask"],
                rounds[-1]["cpu"], "; the champion moved" if moves else "",
            ), flush=True)  # fmt: skip
    finally:
        server.terminate()
        server.wait(timeout=60)
        print((folder / "server.log").read_text(), end="")
    measured = {
        "encoder": CARD.encoder, "image_size": CARD.image_size, "device": str(predictors[versions[0]].device),
        "clients": clients, "seconds": seconds, "rounds": rounds, "wrong_masks": load.wrong,
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "versions": dict(load.versions), "seconds_a_request": load.latencies(), "rss_mib": load.memory,
    }  # fmt: skip
    for key in ("throughput", "cpu"):
        ratios = [entry[key] for entry in rounds]
        median, mean = statistics.median(ratios), statistics.mean(ratios)
        print(f"{key} against the plain predictor's: median {median:.1%}, mean {mean:.1%}")
    print(f"statuses {measured['statuses']}, versions {measured['versions']}, wrong masks {load.wrong}")
    print(f"seconds a request {measured['seconds_a_request']}")
    print(f"RSS in MiB, round by round (lowest, highest): {load.memory}")
    return measured


def predicted(predictor: Predictor, photo: bytes) -> bytes:
    """The plain predictor's way from a photo's bytes to a mask's."""
    return mask_png(predictor.mask(read_photo(photo)[0]))


def plain(predictor: Predictor, photos: list[bytes], seconds: float) -> dict[str, float]:
    """Speed of a loop in this process alone."""
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        predicted(predictor, photos[done % len(photos)])
        done += 1
    return {
        "masks_a_second": done / (time.perf_counter() - started),
        "cpu_seconds_a_mask": (time.process_time() - cpu) / done,
    }


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Load:
    """Clients that send photos and compare what comes back with the masks of the version that it names."""

    def __init__(self, port: int, photos: list[bytes], masks: dict[str, list[bytes]], server: psutil.Process) -> None:
        self.port, self.photos, self.masks, self.server = port, photos, masks, server
        self.lock = threading.Lock()
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.wrong = 0
        self.seconds: list[float] = []
        self.memory: list[list[float]] = []

    def run(self, clients: int, seconds: float) -> dict[str, float]:
        """The server's speed, until the last of the requests begun within `seconds` is answered."""
        started, cpu = time.perf_counter(), sum(self.server.cpu_times()[:2])
        before, sizes = self.statuses[200], []
        threads = [threading.Thread(target=self._client, args=(number, started + seconds)) for number in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            sizes.append(round(self.server.memory_info().rss / 2**20, 1))
            time.sleep(0.5)
        self.memory.append([min(sizes), max(sizes)])
        done = self.statuses[200] - before
        return {
            "masks_a_second": done / (time.perf_counter() - started),
            "cpu_seconds_a_mask": (sum(self.server.cpu_times()[:2]) - cpu) / done,
        }

    def latencies(self) -> dict[str, float]:
        """Of requests that were served."""
        ordered = sorted(self.seconds)
        return {name: round(ordered[int(share * (len(ordered) - 1))], 2) for name, share in
                (("median", 0.5), ("p95", 0.95), ("longest", 1.0))}  # fmt: skip

    def _client(self, number: int, until: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        at = number
        while (began := time.perf_counter()) < until:
            at = (at + 1) % len(self.photos)
            connection.request("POST", "/segment", self.photos[at], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            body, version = answer.read(), answer.getheader("Model-Version", "")
            with self.lock:
                self.statuses[answer.status] += 1
                if answer.status == 200:
                    self.seconds.append(time.perf_counter() - began)
                    self.versions[version] += 1
                    self.wrong += body != self.masks[version][at]
            if answer.status != 200:
                time.sleep(float(answer.getheader("Retry-After", "1")))
        connection.close()


if __name__ == "__main__":
    main()
