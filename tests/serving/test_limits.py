"""What happens when a limit is reached: in this process, with limits that are reached soon."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import torch
import uvicorn

from segmentation.prediction.predictor import Predictor
from serving import limits
from serving.app import create_app
from serving.champion import Served
from serving.http import configure
from serving.worker import Worker
from tests.serving.conftest import CARD, photo

PHOTO = photo(40, 30, 1)
HEAD = b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"


class Gate(torch.nn.Module):
    """A model that answers when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(patch=14)
        self.open = threading.Event()
        self.fault: Exception | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.open.wait(30)
        if self.fault:
            raise self.fault
        return images.float()


class Running:
    """The application under uvicorn, in a thread."""

    def __init__(self) -> None:
        self.gate = Gate()
        card = CARD.model_copy(update={"classes": ["background", "cat", "dog"]})
        entry = SimpleNamespace(version="7", aliases=[], tags={})
        served = Served(entry, Predictor(self.gate, card, torch.device("cpu")), {})
        self.worker = Worker()
        self.app = create_app(SimpleNamespace(served=served, trouble=None), self.worker)
        self.server = uvicorn.Server(configure(self.app))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.clients = ThreadPoolExecutor(20)

    def __enter__(self) -> "Running":
        self.thread.start()
        wait_for(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.open.set()
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def post(self) -> "Future[requests.Response]":
        headers = {"Content-Type": "image/jpeg"}
        return self.clients.submit(requests.post, f"{self.url}/segment", PHOTO, headers=headers, timeout=30)

    def connect(self, sent: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(sent)
        return connection

    def fill(self) -> "list[Future[requests.Response]]":
        """Take all places."""
        posts = [self.post() for _ in range(limits.PHOTOS)]
        wait_for(lambda: len(self.worker._tasks) == limits.PHOTOS)
        return posts


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def running(monkeypatch) -> Iterator[Running]:
    for name, value in {
        "PHOTOS": 2, "QUEUE": 3, "READ_SECONDS": 0.6, "CONNECTION_SECONDS": 1.2, "WORK_SECONDS": 30.0,
        "QUEUE_SECONDS": 30.0, "MAX_BODIES": 50_000,
    }.items():  # fmt: skip
        monkeypatch.setattr(limits, name, value)
    with Running() as running:
        yield running


def detail(answer: requests.Response) -> str:
    return answer.json()["detail"]


def test_a_full_queue_is_503_and_those_in_it_are_served(running):
    posts = running.fill() + [running.post() for _ in range(3)]
    wait_for(lambda: running.worker.waiting == 3)
    answer = running.post().result()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "waiting already" in detail(answer)
    assert requests.get(f"{running.url}/healthz", timeout=5).json()["waiting"] == 3
    running.gate.open.set()
    assert [post.result().status_code for post in posts] == [200] * 5
    assert running.worker.waiting == 0


def test_a_photo_that_waits_too_long_is_503(running, monkeypatch):
    monkeypatch.setattr(limits, "QUEUE_SECONDS", 0.3)
    posts = running.fill()
    answer = running.post().result()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "no place" in detail(answer)
    running.gate.open.set()
    assert [post.result().status_code for post in posts] == [200] * 2


def test_a_prediction_that_does_not_end_is_504_and_keeps_its_place(running, monkeypatch):
    monkeypatch.setattr(limits, "WORK_SECONDS", 0.3)
    answer = running.post().result()
    assert answer.status_code == 504

    def health() -> tuple[int, str]:
        health = requests.get(f"{running.url}/healthz", timeout=5)
        return health.status_code, health.json()["status"]

    wait_for(lambda: health() == (503, "stuck"))  # the answer's time began before the prediction's
    assert len(running.worker._tasks) == 1
    running.gate.open.set()
    wait_for(lambda: not running.worker._tasks)
    assert running.post().result().status_code == 200
    assert health() == (200, "ok")


def test_a_client_that_leaves_frees_its_place_in_the_queue(running):
    posts = running.fill()
    leaving = running.connect(HEAD % len(PHOTO) + PHOTO)
    wait_for(lambda: running.worker.waiting == 1)
    leaving.close()
    wait_for(lambda: running.worker.waiting == 0)
    running.gate.open.set()
    assert [post.result().status_code for post in posts] == [200] * 2


def test_clients_that_left_while_they_were_served_leave_nothing_behind(running):
    leaving = [running.connect(HEAD % len(PHOTO) + PHOTO) for _ in range(2)]
    wait_for(lambda: len(running.worker._tasks) == 2)
    for connection in leaving:
        connection.close()
    running.gate.open.set()
    assert running.post().result().status_code == 200
    wait_for(lambda: not running.worker._tasks)


def test_a_slow_body_is_408_and_holds_up_nobody(running):
    running.gate.open.set()
    declared = HEAD % 9999 + b"xx"
    chunked = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"2\r\nxx\r\n"
    slow = [running.connect(sent) for sent in (declared, chunked) * 5]
    assert running.post().result().status_code == 200
    for connection in slow:
        answer = connection.makefile("rb").read().decode()  # to the end: the server closes
        assert answer.startswith("HTTP/1.1 408 ")
        assert "did not come within" in answer


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_request_that_never_comes_ends_its_connection(running, sent):
    connection = running.connect(sent)
    started = time.monotonic()
    with connection, contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 0.8:  # now and then a byte does not help
            if sent:
                connection.sendall(b"a")
            time.sleep(0.2)
        assert connection.recv(100) == b""
    assert 1 < time.monotonic() - started < 5


def test_the_rest_of_a_refused_body_is_thrown_away_for_a_while_only(running):
    started = time.monotonic()
    sent = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked").replace(b"image/jpeg", b"text/plain")
    connection = running.connect(sent)
    assert connection.recv(10_000).startswith(b"HTTP/1.1 415 ")
    with pytest.raises(ConnectionError):
        while time.monotonic() - started < 10:
            connection.sendall(b"1\r\nx\r\n")
            time.sleep(0.05)
    assert 1 < time.monotonic() - started < 5


def test_all_bodies_together_are_bounded(running, monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 20.0)
    monkeypatch.setattr(limits, "CONNECTION_SECONDS", 20.0)
    first = running.connect(HEAD % 40_000 + bytes(39_999))
    time.sleep(0.2)
    second = running.connect(HEAD % 40_000 + bytes(39_999))
    assert second.recv(10_000).startswith(b"HTTP/1.1 503 ")
    first.sendall(b"\0")
    assert first.recv(10_000).startswith(b"HTTP/1.1 415 ")
    running.gate.open.set()
    for _ in range(3):
        assert running.post().result().status_code == 200  # what was held is free again


def test_a_fault_is_500_and_one_line_of_the_log(running, caplog):
    running.gate.open.set()
    running.gate.fault = RuntimeError("the device\nis away")
    with caplog.at_level(logging.INFO):
        answer = running.post().result()
    assert (answer.status_code, detail(answer)) == (500, "the server failed; its log says why")
    (record,) = [record for record in caplog.records if record.name == "serving"]
    assert record.getMessage().startswith("POST /segment: 500, RuntimeError: the device is away (")
    assert record.exc_info is None
    running.gate.fault = None
    assert running.post().result().status_code == 200


def test_more_connections_than_the_limit_are_503(monkeypatch):
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    with Running() as running:
        idle = [running.connect(b"") for _ in range(3)]
        answer = requests.get(f"{running.url}/healthz", timeout=5)
        assert answer.status_code == 503
        for connection in idle:
            connection.close()
        wait_for(lambda: requests.get(f"{running.url}/healthz", timeout=5).status_code == 200)


def test_a_stop_lets_requests_finish(running):
    post = running.post()
    wait_for(lambda: len(running.worker._tasks) == 1)
    running.server.should_exit = True
    time.sleep(0.3)
    running.gate.open.set()
    assert post.result().status_code == 200


def test_the_classes_are_those_of_the_model(running):
    running.gate.open.set()
    answer = requests.post(
        f"{running.url}/segment", PHOTO, timeout=30, headers={"Content-Type": "image/png", "Accept": "application/json"}
    )
    assert {found["name"] for found in json.loads(answer.text)["classes"]} <= {"background", "cat", "dog"}
