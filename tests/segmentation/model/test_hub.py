"""Pretrained weights, asked of hubs on loopback that answer as the Hugging Face hub does, or as broken ones do."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from segmentation.errors import PipelineError
from segmentation.model import hub
from segmentation.model.encoder import Encoder, check_encoder, create_encoder, load_weights
from segmentation.settings import load_settings
from tests.conftest import environment

NAME = "test_vit"  # timm's smallest: 370,000 parameters
PATH = "/timm/test_vit.r160_in1k/resolve/main/model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def weights() -> bytes:
    torch.manual_seed(7)
    return save(timm.create_model(NAME).state_dict())


class Hub(ThreadingHTTPServer):
    """Has one file; `requests` are those that it was asked."""

    daemon_threads = True

    def __init__(self, content: bytes, status: int = 200, pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.status, self.pause = content, status, pause
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.answer():
            half = len(self.server.content) // 2
            self.wfile.write(self.server.content[:half])
            time.sleep(self.server.pause)
            self.wfile.write(self.server.content[half:])

    def answer(self) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        found = self.server.status == 200 and self.path == PATH
        self.send_response(200 if found else 404 if self.server.status == 200 else self.server.status)
        self.send_header("X-Repo-Commit", COMMIT)
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(self.server.content).hexdigest()}"')
        elif self.server.status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.server.content) if found else 0))
        self.end_headers()
        return found

    def log_message(self, *_):
        pass


@contextmanager
def running(server: Hub):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def at(monkeypatch, url: str) -> None:
    """What `HF_ENDPOINT` sets when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def loaded() -> Encoder:
    encoder = Encoder(NAME, 64, 1)
    load_weights(encoder, True, None)
    return encoder


def test_weights_come_from_the_hub_once_and_then_from_the_cache(weights, cache, monkeypatch, capsys):
    with running(Hub(weights)) as server:
        at(monkeypatch, server.url)
        first = loaded()
        assert f"downloading timm/test_vit.r160_in1k/model.safetensors from {server.url[7:]}" in capsys.readouterr().out
        asked = len(server.requests)
        again = loaded()
        assert len(server.requests) == asked
    at(monkeypatch, closed_port())
    offline = loaded()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told_to_be_offline = loaded()
    torch.manual_seed(7)
    wanted = timm.create_model(NAME).blocks[0].attn.qkv.weight
    for encoder in (first, again, offline, told_to_be_offline):
        assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, wanted)


def test_a_slow_download_is_not_cut_off(weights, cache, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)
    with running(Hub(weights, pause=2.5)) as server:
        at(monkeypatch, server.url)
        assert loaded()


REMEDIES = ("HTTPS_PROXY", "HF_ENDPOINT", "encoder.checkpoint", "encoder.pretrained: false")


def refusal() -> str:
    encoder, start = Encoder(NAME, 64, 1), time.monotonic()
    with pytest.raises(PipelineError) as failure:
        load_weights(encoder, True, None)
    assert time.monotonic() - start < 15  # huggingface_hub alone tries for a minute
    for words in REMEDIES:
        assert words in str(failure.value)
    return str(failure.value)


def test_a_host_that_does_not_answer_is_named_at_once(cache, monkeypatch):
    url = closed_port()
    at(monkeypatch, url)
    assert f"{url[7:]} does not answer: [Errno 111] Connection refused" in refusal()


def test_a_host_that_accepts_and_says_nothing_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        at(monkeypatch, f"http://{host}")
        assert f"{host} does not answer within 2 s" in refusal()


@pytest.mark.parametrize(
    ("status", "says"), [(404, "has neither of model.safetensors, pytorch_model.bin"), (503, "503"), (401, "401")]
)
def test_a_hub_that_refuses_is_quoted(weights, cache, monkeypatch, status, says):
    with running(Hub(weights, status)) as server:
        at(monkeypatch, server.url)
        assert says in refusal()


def test_a_cache_that_cannot_be_written_is_named(weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    with running(Hub(weights)) as server:
        at(monkeypatch, server.url)
        assert str(tmp_path / "file") in refusal()


@pytest.mark.slow
def test_the_environment_decides_on_the_hub_and_on_being_offline(tmp_path, root):
    """In a process of its own, because huggingface_hub reads it at import."""
    code = (
        "from segmentation.model.encoder import Encoder, load_weights\n"
        "from segmentation.errors import PipelineError\n"
        "try: load_weights(Encoder('test_vit', 64, 1), True, None)\n"
        "except PipelineError as error: print(error)"
    )
    url = closed_port()
    for changes, says in (
        ({"HF_ENDPOINT": url}, f"{url[7:]} does not answer"),
        ({"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": url}, f"hub.invalid (through the proxy {url[7:]})"),
        ({"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ):
        env = environment() | {"HF_HOME": str(tmp_path), "NO_PROXY": ""} | changes
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=env, text=True, capture_output=True, check=True
        )
        assert says in done.stdout
        assert "Traceback" not in done.stderr


def settings_of(root, **changes):
    return load_settings(root / "params.yaml", {f"encoder.{key}": value for key, value in changes.items()}).encoder


def test_what_can_be_known_without_a_hub_is_refused_without_one(root, monkeypatch, cache):
    at(monkeypatch, closed_port())
    check_encoder(settings_of(root), 518, [])  # weights that nobody asked for yet
    for changes, size, skips, says in (
        ({"name": "vit_smal_patch14_dinov2"}, 518, [], "the nearest is vit_small_patch14_dinov2"),
        ({"checkpoint": "nowhere.pth"}, 518, [], "nowhere.pth: not found"),
        ({"trainable_blocks": 13}, 518, [], "has 12 blocks"),
        ({}, 518, [12], "blocks of vit_base_patch14_dinov2 are 0 to 11"),
        ({"name": "vit_giant_patch14_224"}, 224, [], "timm has no weights of vit_giant_patch14_224"),
    ):
        with pytest.raises(PipelineError, match=says):
            check_encoder(settings_of(root, **changes), size, skips)


def test_a_check_allocates_no_model(root):
    start = time.process_time()
    settings = settings_of(root, name="vit_giant_patch14_dinov2", pretrained=False)  # 4.5 GB of float32
    check_encoder(settings, 518, [])
    assert time.process_time() - start < 10


def test_encode_and_train_ask_for_weights(root, monkeypatch, cache):
    at(monkeypatch, closed_port())
    with pytest.raises(PipelineError, match="does not answer"):
        create_encoder(settings_of(root, name="vit_small_patch14_dinov2"), 56, [])
