"""Photos to masks: a bounded number of them in memory, one at a time on the model."""

from __future__ import annotations

import asyncio
import io
import time
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from starlette.requests import ClientDisconnect

from segmentation.data.file_kinds import HEAD, kind_of
from segmentation.data.images import Pixels, read_photo
from segmentation.errors import PipelineError
from segmentation.prediction.predictor import Predictor, mask_at, mask_png
from serving import limits
from serving.champion import Champion, Served
from serving.http import Refused

SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}

# Pillow warns of large pictures at its own limit; `decode` has a lower one.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Result(NamedTuple):
    """What predicted, the mask `[H, W]`, and the mask as a palette PNG."""

    served: Served
    mask: Pixels
    png: bytes


class Worker:
    """A thread that predicts, with all cores or the GPU, as in any other process; two beside it decode and encode."""

    def __init__(self) -> None:
        self._predict = ThreadPoolExecutor(1, "predict")
        self._code = ThreadPoolExecutor(2, "code")
        self._places = asyncio.Semaphore(limits.PHOTOS)
        self._tasks: set[asyncio.Task[Result]] = set()  # asyncio itself keeps weak references only
        self._since: float | None = None
        self.waiting = 0

    @property
    def stuck(self) -> bool:
        """Whether one prediction has been running for longer than any request waits for it."""
        since = self._since
        return since is not None and time.monotonic() - since > limits.WORK_SECONDS

    def check(self, predictor: Predictor) -> None:
        """Predict a drawn photo, in turn with those of requests.

        Raises:
            PipelineError: as `Predictor.logits`.
        """
        ramp = np.linspace(0, 255, 96, dtype=np.uint8)
        photo = Image.fromarray(np.stack([*np.meshgrid(ramp, ramp[:64]), np.full((64, 96), 128, np.uint8)], 2))
        logits = self._predict.submit(predictor.logits, photo).result()
        mask_at(logits, photo.height, photo.width)

    async def segment(self, body: bytes, champion: Champion, disconnected: Callable[[], Awaitable[object]]) -> Result:
        """Wait for a place, then decode, predict with the champion of that moment, and encode.

        Args:
            body: the photo's bytes.
            champion: holds the model.
            disconnected: returns when the client has left; a photo that still waits is then dropped.

        Raises:
            Refused: no photo, too large, or the server is full or too slow.
            ClientDisconnect: the client left.
        """
        await self._place(disconnected)
        task = asyncio.create_task(self._work(body, champion.served))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        # Only waited for, never cancelled: the photo is in memory until its threads are through with it.
        await asyncio.wait({task}, timeout=limits.WORK_SECONDS)
        if not task.done():
            raise Refused(504, f"the mask was not ready within {limits.WORK_SECONDS:.0f} s")
        return task.result()

    async def _place(self, disconnected: Callable[[], Awaitable[object]]) -> None:
        if self.waiting >= limits.QUEUE:
            raise Refused(503, f"{self.waiting} photos are waiting already; try again")
        self.waiting += 1
        place = asyncio.create_task(self._places.acquire())
        gone = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait({place, gone}, timeout=limits.QUEUE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise (
                    ClientDisconnect
                    if gone.done()
                    else Refused(503, f"no place became free within {limits.QUEUE_SECONDS:.0f} s; try again")
                )
        finally:
            self.waiting -= 1
            gone.cancel()
            place.cancel()  # one that is done stays so

    def _done(self, task: asyncio.Task[Result]) -> None:
        self._tasks.discard(task)
        self._places.release()
        task.exception()  # seen, else asyncio prints those that nobody waited for any more

    async def _work(self, body: bytes, served: Served) -> Result:
        loop = asyncio.get_running_loop()
        photo = await loop.run_in_executor(self._code, decode, body)
        mask = await loop.run_in_executor(self._predict, self._timed, served.predictor, photo)
        return Result(served, mask, await loop.run_in_executor(self._code, mask_png, mask))

    def _timed(self, predictor: Predictor, photo: Image.Image) -> Pixels:
        self._since = time.monotonic()
        try:
            return predictor.mask(photo)
        finally:
            self._since = None


def decode(body: bytes) -> Image.Image:
    """The photo, upright RGB.

    Raises:
        Refused: no JPEG or PNG, damaged, or too large.
    """
    kind = next((kind for signature, kind in SIGNATURES.items() if body.startswith(signature)), None)
    if kind is None:
        found = kind_of(body[:HEAD])
        raise Refused(415, f"this is {f'{found}, ' if found else ''}neither a JPEG nor a PNG photo")
    damaged = f"this {kind} cannot be decoded: it is truncated or damaged"
    try:
        with Image.open(io.BytesIO(body), formats=(kind,)) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise Refused(413, f"this {kind} has far more than {limits.MAX_PIXELS:,} pixels", f"{error}") from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error and more
        raise Refused(422, damaged, f"{error}") from None
    size = f"this photo has {width}×{height} pixels"
    if width * height > limits.MAX_PIXELS:
        raise Refused(413, f"{size}; at most {limits.MAX_PIXELS:,} are taken")
    if max(width, height) > limits.MAX_PROPORTIONS * min(width, height):
        raise Refused(413, f"{size}; its longer side may be {limits.MAX_PROPORTIONS} times the shorter")
    if kind == "JPEG" and body.count(b"\xff\xda") > limits.MAX_SCANS:
        raise Refused(422, f"this JPEG has more than {limits.MAX_SCANS} scans")
    try:
        return read_photo(body)[0]
    except PipelineError as error:
        raise Refused(422, damaged, f"{error}") from None
