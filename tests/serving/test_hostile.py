"""Fifty-odd requests that mean no good, to one server: each gets its 4xx, and the server stays as it was."""

import contextlib
import gzip
import io
import json
import socket
import struct
import zlib

import pytest
import requests
from PIL import Image

from serving import limits
from serving.http import Refused
from serving.worker import decode
from tests.conftest import png_declaring
from tests.serving.conftest import mask_png, photo

JPEG, PNG = photo(91, 64, 1), photo(91, 64, 1, "PNG")
PIECE = bytes(2**20)
GIGABYTE = 2**30


def image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, kind)
    return stream.getvalue()


def jpeg_declaring(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def png_with_text(length: int) -> bytes:
    """A PNG with a comment that unpacks to so many bytes."""
    data = b"Comment\0\0" + zlib.compress(bytes(length), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return PNG[:33] + chunk + PNG[33:]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(JPEG)).save(stream, "JPEG", progressive=True)
    body = stream.getvalue()
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * count + body[-2:]


BODIES = {
    "nothing": (b"", 415),
    "text": (b"a photo of a dog", 415),
    "JSON": (b'{"photo": "dog.jpg"}', 415),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 415),
    "SVG that includes a file": (b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>', 415),
    "PDF": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", 415),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n", 415),
    "zip": (b"PK\x03\x04" + bytes(100), 415),
    "gzip of a photo": (gzip.compress(JPEG), 415),
    "GIF": (image("GIF"), 415),
    "BMP": (image("BMP"), 415),
    "WebP": (image("WEBP"), 415),
    "TIFF": (image("TIFF"), 415),
    "null bytes": (bytes(100_000), 415),
    "a photo behind a null byte": (b"\0" + JPEG, 415),
    "a pickle": (b"\x80\x04cposix\nsystem\n(S'id'\ntR.", 415),
    "a JPEG's first bytes": (JPEG[:3], 422),
    "a PNG's first bytes": (PNG[:8], 422),
    "half a JPEG": (JPEG[: len(JPEG) // 2], 422),
    "half a PNG": (PNG[: len(PNG) // 2], 422),
    "a PNG with a flipped bit": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], 422),
    "a PNG's head on a JPEG": (PNG[:8] + JPEG, 422),
    "a PNG without pixels": (png_declaring(0, 0), 422),
    "a PNG that lacks its pixels": (png_declaring(4000, 4000), 422),
    "a PNG of 3.6 gigapixels": (png_declaring(60000, 60000), 413),
    "a PNG as large as can be": (png_declaring(2**31 - 1, 2**31 - 1), 413),
    "a PNG a little too large": (png_declaring(5001, 5000), 413),
    "a PNG too long for its height": (png_declaring(20_000, 1), 413),
    "a PNG too high for its width": (png_declaring(40, 401), 413),
    "a JPEG of 4.3 gigapixels": (jpeg_declaring(65535, 65535), 413),
    "a PNG that unpacks to more than it is": (png_declaring(10, 10, rows=bytes([9]) + bytes(50_000_000)), 422),
    "a PNG with a comment of 100 MB": (png_with_text(100_000_000), 422),
    "a JPEG of a thousand scans": (jpeg_with_scans(1000), 422),
    "a byte more than the limit": (JPEG + bytes(limits.MAX_BYTES), 413),
}


def request(
    *headers: bytes, line: bytes = b"POST /segment HTTP/1.1", kind: bytes = b"image/jpeg", body: bytes = b""
) -> bytes:
    lines = [line, b"Host: here", b"Content-Type: " + kind, b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d" % len(body)


REQUESTS = {
    "a declared gigabyte": (request(b"Content-Length: %d" % GIGABYTE), 413),
    "a declared gigabyte, politely": (request(b"Content-Length: %d" % GIGABYTE, b"Expect: 100-continue"), 413),
    "more digits than a number has": (request(b"Content-Length: " + b"9" * 5000), 400),
    "a length that is too short": (request(b"Content-Length: 10", body=JPEG), 422),
    "a negative length": (request(b"Content-Length: -1"), 400),
    "a length that is no number": (request(b"Content-Length: many"), 400),
    "two lengths": (request(b"Content-Length: 1", b"Content-Length: 2", body=b"xx"), 400),
    "a chunk of no size": (request(b"Transfer-Encoding: chunked", body=b"many\r\n"), 400),
    "an unknown transfer encoding": (request(b"Transfer-Encoding: gzip"), 400),
    "a form": (request(sized(JPEG), kind=b"multipart/form-data; boundary=x", body=JPEG), 415),
    "a photo said to be text": (request(sized(JPEG), kind=b"text/plain", body=JPEG), 415),
    "an answer that is not on offer": (request(sized(JPEG), b"Accept: text/html", body=JPEG), 406),
    "no answer at all": (request(sized(JPEG), b"Accept: ;q=\xff,,", body=JPEG), 406),
    "a huge header": (request(b"X-Much: " + b"x" * 70_000, sized(JPEG), body=JPEG), 431),
    "a thousand headers": (request(*(b"X-%d: much of it, and more" % at for at in range(1000))), 431),
    "a null byte in a header": (request(b"X-Null: \0"), 400),
    "a header split in two": (request(b"X-Split"), 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "an address without end": (request(line=b"GET /" + b"x" * 100_000 + b" HTTP/1.1"), 431),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n", 400),
    "a protocol that is not spoken": (request(line=b"GET / QUIC/1.0"), 400),
    "another program's greeting": (b"EHLO here\r\n\r\n", 400),
}
REQUESTS |= {
    f"{method} {path}": (request(line=f"{method} {path} HTTP/1.1".encode()), 405)
    for method, path in (
        ("GET", "/segment"), ("PUT", "/segment"), ("TRACE", "/segment"), ("HACK", "/segment"), ("DELETE", "/model"),
        ("POST", "/"), ("OPTIONS", "/healthz"),
    )
}  # fmt: skip
REQUESTS |= {
    f"GET {path}": (request(line=f"GET {path} HTTP/1.1".encode()), 404)
    for path in (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/segment/..%2f..%2fetc%2fpasswd", "/segment%00",
        "//etc/passwd", "/page.html", "/.env", "/docs", "/segment%0d%0aX-Forged:%20yes",
    )
}  # fmt: skip


def ask(server, sent: bytes) -> tuple[int, str]:
    """Status and text of the answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # an answer may come before all is sent
            connection.sendall(sent)
        return answered(connection)


def answered(connection: socket.socket) -> tuple[int, str]:
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if lengths and len(body) >= int(lengths[0].split(b":")[1]):
                break
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body.decode()


@pytest.fixture(scope="module")
def before(server) -> tuple[bytes, float]:
    """A mask and the server's memory, when it has done some work."""
    for _ in range(5):
        mask = server.segment(JPEG).content
    return mask, server.memory()


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused(server, before, name):
    body, status = BODIES[name]
    answer = ask(server, request(sized(body), kind=b"application/octet-stream", body=body))
    assert answer[0] == status, answer
    detail = json.loads(answer[1])["detail"]
    assert 10 < len(detail) < 120
    assert "0x" not in detail


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused(server, before, name):
    sent, status = REQUESTS[name]
    answer = ask(server, sent)
    assert answer[0] == status, answer
    assert len(answer[1]) < 200


@pytest.mark.parametrize("declared", [b"Transfer-Encoding: chunked", b"Content-Length: %d" % limits.MAX_BYTES])
def test_a_gigabyte_is_refused_as_it_comes(server, before, declared):
    """Chunked, or beyond the length that it declares: then what follows is no request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request(declared).replace(b"Connection: close\r\n", b""))
        piece = b"%x\r\n" % len(PIECE) + PIECE + b"\r\n" if b"chunked" in declared else PIECE
        sent, most = 0, 0.0
        try:
            while sent < GIGABYTE:
                sent += connection.send(piece[sent % len(piece) :])
                most = max(most, server.memory())
        except ConnectionError:
            assert b"chunked" not in declared
        if b"chunked" in declared:
            assert answered(connection)[0] == 413
    assert most - before[1] < 3 * limits.MAX_BYTES / 2**20


def test_afterwards_the_server_is_as_it_was(store, server, before):
    mask, memory = before
    health = requests.get(f"{server.url}/healthz", timeout=5).json()
    assert (health["status"], health["waiting"]) == ("ok", 0)
    assert server.segment(JPEG).content == mask == mask_png(store.predictor("1"), JPEG)
    assert server.memory() - memory < 64
    log = server.text()
    assert "Traceback" not in log
    assert "\nX-Forged" not in log
    refused = [line for line in log.splitlines() if "POST /segment: 4" in line]
    assert len(refused) >= len(BODIES)
    assert len(max(log.splitlines(), key=len)) < 400


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (image("WEBP"), "this is a WebP picture, neither a JPEG nor a PNG photo"),
        (image("TIFF"), "this is a TIFF picture, neither a JPEG nor a PNG photo"),
        (b"", "this is an empty file, neither a JPEG nor a PNG photo"),
        (b"a photo of a dog", "this is neither a JPEG nor a PNG photo"),
    ],
)
def test_a_body_that_is_no_photo_is_called_what_it_is(body, says):
    with pytest.raises(Refused) as refusal:
        decode(body)
    assert (refusal.value.status_code, refusal.value.detail) == (415, says)
