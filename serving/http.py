"""HTTP beneath the addresses: bodies within bounds, refusals, clients that are slow, one log line a failure."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain

import h11
import uvicorn
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving import limits

log = logging.getLogger("serving")


class Refused(HTTPException):
    """A request that is answered with a status of 4xx or 5xx and a sentence.

    Args:
        status: the HTTP status.
        detail: what is wrong, for the client.
        reason: more of it, for the log alone.
    """

    def __init__(self, status: int, detail: str, reason: str = "") -> None:
        headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(status)
        super().__init__(status, detail, headers)
        self.reason = reason


async def answer_fault(request: Request, error: Exception) -> Response:
    """The answer to a refused request, and its line in the log."""
    assert isinstance(error, StarletteHTTPException)
    reason = getattr(error, "reason", "")
    level = logging.WARNING if error.status_code >= 500 else logging.INFO
    log.log(level, "%s: %d, %s", _named(request.scope), error.status_code, reason or error.detail)
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


class Guard:
    """Around the application: a client that leaves and a fault of ours are a line in the log, never a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"])))
            if size > limits.MAX_HEADERS:  # h11 has a limit for those that come in several reads
                refused = Refused(431, f"the headers are larger than {limits.MAX_HEADERS:,} bytes")
                response = await answer_fault(Request(scope), refused)
                return await response(scope, receive, guarded)
            await self.app(scope, receive, guarded)
        except ClientDisconnect:
            log.info("%s: the client left", _named(scope))
        except Exception as error:
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
            text = " ".join(f"{error}".split())
            log.error("%s: 500, %s: %s (%s)", _named(scope), type(error).__name__, text, where)
            if not started:
                fault = JSONResponse({"detail": "the server failed; its log says why"}, 500)
                await fault(scope, receive, guarded)


HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def _named(scope: Scope) -> str:
    # the path as it was sent, in percent-encoded ASCII: it cannot forge a line of the log
    return f"{scope['method']} {scope['raw_path'].decode('ascii', 'replace')[:200]}"


class Bodies:
    """Reads bodies into memory, each and all together within `limits`."""

    def __init__(self) -> None:
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; it counts as held until the block ends.

        Raises:
            Refused: it is too large, too slow, or too much together with the others.
            ClientDisconnect: the client left.
        """
        large = Refused(413, f"the body is larger than {limits.MAX_BYTES:,} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.MAX_BYTES:
            raise large
        body, size = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(limits.READ_SECONDS):
                    # what is left of a body that is refused, uvicorn throws away as it comes
                    async for chunk in request.stream():
                        if size + len(chunk) > limits.MAX_BYTES:
                            raise large
                        if self._held + len(chunk) > limits.MAX_BODIES:
                            raise Refused(503, "the server has as many photos as it takes; try again")
                        self._held += len(chunk)
                        size += len(chunk)
                        body += chunk
            except TimeoutError:
                raise Refused(408, f"the body did not come within {limits.READ_SECONDS:.0f} s") from None
            whole = bytes(body)
            body.clear()
            yield whole
        finally:
            self._held -= size


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """The media type of `offers` that an Accept header likes best, the first of equals; `None` if it excludes all."""
    wishes: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        try:
            wishes[name] = float(quality)
        except ValueError:
            continue

    def liking(offer: str) -> float:
        ranges = (offer, f"{offer.partition('/')[0]}/*", "*/*")  # the most specific one counts
        return next((wishes[name] for name in ranges if name in wishes), 0.0)

    best = max(offers, key=liking)
    return best if liking(best) > 0 else None


def configure(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn runs the application: this process, its own log lines, nothing about itself in answers."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=limits.CONNECTIONS,
        timeout_graceful_shutdown=int(limits.WORK_SECONDS),
    )  # fmt: skip


class Protocol(H11Protocol):
    """uvicorn's, but a connection ends when a request has not come, or a response not been taken, in time.

    uvicorn's own timer is for idle connections only.
    """

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: also counts while the client's window is closed
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.CONNECTION_SECONDS * 1000)
            )
        self._time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._untime()

    def _time(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._untime()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(limits.CONNECTION_SECONDS, self.transport.abort)

    def _untime(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
