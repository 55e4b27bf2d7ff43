"""The HTTP interface: what each address takes and answers."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from segmentation.data.images import Pixels
from segmentation.data.voc import palette
from segmentation.prediction.predictor import class_shares
from segmentation.registry.client import MODEL_NAME
from serving import limits
from serving.champion import Champion, Served
from serving.http import Bodies, Guard, Refused, answer_fault, preferred
from serving.schemas import ClassShare, Fault, Health, Model, Segmentation, SegmentationClass
from serving.worker import Worker

PAGE = Path(__file__).with_name("page.html")
PHOTO_TYPES = ("image/jpeg", "image/png")
# taken, too; but not every such body is a photo, so OpenAPI has them in words only
BYTES_TYPES = ("application/octet-stream", "binary/octet-stream")
ANSWER_TYPES = ("image/png", "application/json")
VERSION_HEADER = "Model-Version"
BINARY = {"schema": {"type": "string", "format": "binary"}}
VERSION = {
    VERSION_HEADER: {"description": "the version that predicted", "required": True, "schema": {"type": "string"}}
}
RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
EVERYWHERE: dict[int | str, dict[str, Any]] = {
    431: {"description": f"more than {limits.MAX_HEADERS:,} bytes of headers"},
    500: {"description": "a fault of the server; its log says which"},
}
FAULTS: dict[int, dict[str, Any]] = {
    406: {"description": "`Accept` allows neither of the two answers"},
    408: {"description": f"the body did not come within {limits.READ_SECONDS:.0f} s"},
    413: {
        "description": f"more than {limits.MAX_BYTES:,} bytes or {limits.MAX_PIXELS:,} pixels, or a side more than "
        f"{limits.MAX_PROPORTIONS} times the other"
    },
    415: {"description": "neither a JPEG nor a PNG, by `Content-Type` or by its bytes"},
    422: {"description": "a JPEG or PNG that cannot be decoded"},
    503: {"description": "the server is full", "headers": RETRY},
    504: {"description": f"the mask was not ready within {limits.WORK_SECONDS:.0f} s"},
}


def create_app(champion: Champion, worker: Worker) -> FastAPI:
    """The application around a champion and a worker."""
    app = FastAPI(
        title="Segmentation",
        description="Photos to masks.",
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": Fault, **fault} for status, fault in EVERYWHERE.items()},
    )
    app.add_middleware(Guard)
    app.add_exception_handler(HTTPException, answer_fault)
    bodies, page = Bodies(), PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(page)

    # not `response_class=HTMLResponse`: faults would be documented as HTML, too
    @app.get(
        "/",
        response_class=Response,
        responses={200: {"description": "the page", "content": {"text/html": {"schema": {"type": "string"}}}}},
    )
    async def index() -> HTMLResponse:
        """The page that shows the mask over a photo."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.post(
        "/segment",
        response_class=Response,
        responses={
            200: {
                "description": "the mask, or what is in the photo",
                "model": Segmentation,
                "content": {"image/png": BINARY},
                "headers": VERSION,
            },
            **{status: {"model": Fault, **fault} for status, fault in FAULTS.items()},
        },
        openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(PHOTO_TYPES, BINARY)}},
    )
    async def segment(request: Request) -> Response:
        """The mask of a photo, or what is in it.

        The body is a JPEG or PNG photo; which of them, its bytes say, so every `image/…` and `application/octet-stream`
        will do as well.
        The mask is a palette PNG of class ids, of the upright photo's size. With `Accept: application/json` the answer
        is the classes and their shares instead.
        """
        wanted = preferred(request.headers.get("accept", "*/*"), ANSWER_TYPES)
        if wanted is None:
            raise Refused(406, f"Accept: the answer is {' or '.join(ANSWER_TYPES)}")
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # the types that a page of another site may send unasked are not among those taken
        if sent and not sent.startswith("image/") and sent not in BYTES_TYPES:
            raise Refused(
                415,
                f"Content-Type: {sent[:80]!r} was sent; send the photo alone, as {', '.join(PHOTO_TYPES)} or "
                f"{BYTES_TYPES[0]}",
            )
        async with bodies.read(request) as body:
            served, mask, png = await worker.segment(body, champion, request.receive)
        headers = {VERSION_HEADER: served.version}
        if wanted == "image/png":
            return Response(png, media_type=wanted, headers=headers)
        return JSONResponse(describe(served, mask).model_dump(), headers=headers)

    @app.get("/model")
    async def model() -> Model:
        """The model that is served, and where it comes from."""
        served = champion.served
        card, entry = served.predictor.card, served.entry
        lineage = {key: value for key, value in entry.tags.items() if key not in served.metrics}
        return Model(
            name=MODEL_NAME, version=served.version, aliases=sorted(entry.aliases), encoder=card.encoder,
            image_size=card.image_size, classes=classes(served), metrics=served.metrics, tags=lineage,
        )  # fmt: skip

    @app.get("/healthz", responses={503: {"model": Health, "description": "no photo is predicted any more"}})
    async def healthz(response: Response) -> Health:
        """Whether photos are being predicted.

        `degraded`: they are, but the champion cannot be looked up or loaded, so it may be another version by now.
        """
        state = Health(
            status="degraded" if champion.trouble else "ok", model_version=champion.served.version,
            waiting=worker.waiting, detail=champion.trouble,
        )  # fmt: skip
        if worker.stuck:
            response.status_code = 503
            return state.model_copy(
                update={"status": "stuck", "detail": "a prediction does not end: restart the server"}
            )
        return state

    return app


def classes(served: Served) -> list[SegmentationClass]:
    """The model's classes with their colours in a mask."""
    colours = np.array(palette(), np.uint8).reshape(-1, 3)
    names = served.predictor.card.classes
    return [SegmentationClass(id=i, name=name, colour=f"#{colours[i].tobytes().hex()}") for i, name in enumerate(names)]


def describe(served: Served, mask: Pixels) -> Segmentation:
    """The classes of a mask `[H, W]` and their shares, the largest first."""
    height, width = mask.shape
    named = classes(served)
    present = [ClassShare(**named[label].model_dump(), share=share) for label, share in class_shares(mask).items()]
    return Segmentation(model_version=served.version, width=width, height=height, classes=present)


def content_security_policy(page: str) -> str:
    """What the page may do: run its own style and script, known by their hashes, and talk to this server."""

    def digest(tag: str) -> str:
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
