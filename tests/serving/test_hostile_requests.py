"""Hostile requests, over real connections: each is answered with a 4xx and a sentence, and the service goes on."""

import concurrent.futures
import contextlib
import gzip
import io
import itertools
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterable

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.serving.service import ColourPredictor, draw_regions, encoded, running

IMAGE = draw_regions()
PNG, JPEG = encoded(IMAGE), encoded(IMAGE, ".jpg")
TIMEOUT = 1.0  # seconds, of the service


@pytest.fixture(scope="module")
def service():
    with running(ColourPredictor(), max_bytes=100_000, max_pixels=1_000_000, timeout=TIMEOUT) as service:
        yield service
        assert service.predict(PNG)[0] == 200, "the service no longer answers"
        metrics = service.ask("GET", "/metrics")[1].decode()
        assert 'code="500"' not in metrics
        assert "maskrcnn_requests_in_work 0\n" in metrics


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pillow(form: str, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(IMAGE).save(content, form, **options)
    return content.getvalue()


def bombs() -> list[bytes]:
    """Small files of images that would be large."""
    gif, bmp, tiff = bytearray(pillow("GIF")), bytearray(pillow("BMP")), bytearray(pillow("TIFF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp[18:26] = struct.pack("<ii", 100_000, -100_000)
    place = tiff.index(struct.pack("<HHII", 256, 4, 1, 64)) if struct.pack("<HHII", 256, 4, 1, 64) in tiff else None
    files = [bytes(gif), bytes(bmp), png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(1001, 1000, bytes(3_100_000))]
    if place is not None:
        tiff[place + 8 : place + 12] = struct.pack("<I", 2**31)
        files.append(bytes(tiff))
    frame = JPEG.index(b"\xff\xc0")
    files.append(JPEG[: frame + 5] + b"\xff\xff\xff\xff" + JPEG[frame + 9 :])
    files.append(b"P6 99999 99999 255\n" + bytes(100))
    files.append(b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\xff\x07\x10\xfd\x8f\xfe\x07\x22\xa2\xff\x01\0")
    return files


def not_images() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = [rng.bytes(int(size)) for size in rng.integers(1, 5000, 40)]
    files += [
        magic + rng.bytes(200) for magic in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0")
    ]
    files += [
        b"RIFF\xff\xff\xff\xffWEBP" + rng.bytes(90),
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\0\0\0\x1cftypavif" + bytes(40),
    ]
    files += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!doctype html><script>alert(1)</script>", b"%PDF-1.7\n"]
    files += [b"PK\x03\x04" + bytes(99), gzip.compress(PNG), b"\x80\x04\x95cos\nsystem\n", b"#!/bin/sh\nrm -rf /\n"]
    files += [b'{"image": "file:///etc/passwd"}', b"http://127.0.0.1/", b"/etc/passwd", b"\0", b" ", b"\xff" * 999]
    files += [b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>"]
    return files


def truncated() -> list[bytes]:
    return [file[:size] for file in (PNG, JPEG) for size in range(1, len(file) - 2, len(file) // 25)]


FILES = [*bombs(), *not_images(), *truncated(), b"", bytes(200_000)]


def assert_refused(code: int, answer: dict) -> None:
    assert 400 <= code < 500, (code, answer)
    assert set(answer) == {"error"} and len(answer["error"]) > 20 and "\n" not in answer["error"]
    assert "Error" not in answer["error"], "the name of an exception"


def test_files_that_are_no_images_are_refused(service):
    assert len(FILES) > 120
    for file in FILES:
        assert_refused(*service.predict(file))


def test_damaged_images_are_answered_or_refused(service):
    rng = np.random.default_rng(0)
    originals = [PNG, JPEG, *(pillow(form) for form in ("GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"))]
    codes = []
    for original, _ in itertools.product(originals, range(12)):
        damaged = bytearray(original)
        for place in rng.integers(0, min(len(damaged), 200), 3):
            damaged[place] = rng.integers(256)
        code, answer = service.predict(bytes(damaged))
        codes.append(code)
        if code != 200:
            assert_refused(code, answer)
    assert 200 in codes and 422 in codes


def test_wrong_methods_paths_and_queries_are_refused(service):
    requests = [(method, "/predict") for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X")]
    requests += [("POST", path) for path in ("/", "/health", "/metrics", "//predict", "/predict/", "/predict/..")]
    paths = ["/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c..%5cwindows", "/%00", "/predict%00", "/*"]
    paths += ["/" + "a" * 8000, "/templates/serve.html.j2", "/.git/config", "/%ff%fe", "/predict;x=1", "/PREDICT"]
    requests += [(method, path) for method in ("GET", "POST") for path in paths]
    requests += [
        ("POST", f"/predict?{query}") for query in ("min_score=1e999", "min_score[]=1", "format=../x", "a" * 9000)
    ]
    for method, path in requests:
        response, content = service.ask(method, path, PNG if method == "POST" else None)
        if method != "HEAD":
            assert_refused(response.status, json.loads(content))
        assert response.status in (400, 404, 405)


# Connections


def talk(service, parts: Iterable[bytes], pause: float = 0.0) -> list[tuple[int, dict]]:
    """Send bytes, with a pause after each part; returns the answers before the connection ends."""
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                received += part
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))[15:])
        answers.append((int(head.split()[1]), json.loads(received[:length])))
        received = received[length:]
    return answers


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
BROKEN = {
    "noise": bytes(range(256)),
    "tls": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http09": b"GET /\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": POST + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
    "null in a header": POST + b"X: a\0b\r\n\r\n",
    "folded header": POST + b"X y: z\r\n\r\n",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "no number": POST + b"Content-Length: many\r\n\r\n",
    "astronomic length": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "long number": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "two lengths": POST + b"Content-Length: 4\r\nContent-Length: 9\r\n\r\nabcd",
    "broken chunks": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "huge chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n",
    "unknown encoding": POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "shorter than said": POST + b"Content-Length: 5\r\nConnection: close\r\n\r\n" + PNG,
    "an upgrade": POST + b"Upgrade: websocket\r\nConnection: upgrade, close\r\nContent-Length: 1\r\n\r\nx",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_http_is_refused(service, name):
    answers = talk(service, [BROKEN[name]])
    assert answers, "closed without an answer"
    assert_refused(*answers[0])


def test_slow_clients_are_refused_in_time_and_meanwhile_others_are_served(service):
    def begin(content: bytes, drop: bytes):
        return itertools.chain([content], itertools.repeat(drop, 600))

    slow = {
        "nothing": lambda: [b""],
        "half of the headers": lambda: [POST],
        "headers, drop by drop": lambda: begin(POST, b"X: y\r\n"),
        "less than said": lambda: [POST + b"Content-Length: 5000\r\n\r\n" + PNG],
        "a body, drop by drop": lambda: begin(POST + b"Content-Length: 50000\r\n\r\n", b"x"),
        "endless chunks": lambda: begin(POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    }
    clients = [make() for make in list(slow.values()) * 4]
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(talk, service, parts, pause=0.1) for parts in clients]
        time.sleep(0.2)
        assert service.predict(PNG)[0] == 200
        for future, parts in zip(waiting, clients, strict=True):
            ((code, answer),) = future.result()
            assert code == 408
            assert_refused(code, answer)
            assert isinstance(parts, list) or next(parts, None), "it could send all, though slowly"


def test_clients_that_leave_or_do_not_read_take_nothing_with_them(service):
    for parts in (
        [POST + b"Content-Length: 5000\r\n\r\n" + PNG],
        [POST],
        [b""],
        [POST + b"Content-Length: 3\r\n\r\nabc"],
    ):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(b"".join(parts))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    assert service.predict(PNG)[0] == 200


def test_a_refused_upload_that_never_ends_is_cut_off(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(POST + b"Content-Length: 99999999999\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(ConnectionError):
            for _ in range(600):
                connection.sendall(bytes(1000))
                time.sleep(0.05)


def test_images_of_too_few_channels_are_refused():
    with running(ColourPredictor(channels=4)) as service:
        code, answer = service.predict(PNG)
        assert code == 422 and "has 3 channels" in answer["error"]
        assert service.predict(encoded(cv2.cvtColor(IMAGE, cv2.COLOR_RGB2RGBA)))[0] == 200
