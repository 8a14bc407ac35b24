"""How faults of an S3 server are told: a small server that answers wrongly on purpose."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from artifacts import PART_SIZE, HashMismatch, S3Location
from artifacts.port import CHUNK_SIZE
from artifacts.s3 import S3Store
from servicekit.errors import Forbidden, HeadraceError, Internal, Invalid, NotFound, TooLarge, Unavailable

Answer = Callable[[str, str], bytes]
"""(method, path) -> the whole HTTP answer."""


def http(status: str, body: bytes = b"", length: int | None = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def failing(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>it said so</Message><Resource>/b/k</Resource></Error>".encode()
    return http(status, body, Content_Type="application/xml")


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[tuple[S3Store, list[str]]]:
    """A store on a server that gives these answers, and the requests that it got."""
    requests: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split("\r\n")[0].split(" ")
        for line in head.split("\r\n"):
            if line.lower().startswith("content-length:"):
                await reader.readexactly(int(line.partition(":")[2]))
        requests.append(f"{method} {path}")
        writer.write(answer(method, path))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = S3Store(S3Location(f"127.0.0.1:{port}", "key", "secret-key", "bucket"), pool_size=2)
    try:
        yield store, requests
    finally:
        await store.stop()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        ("404 Not Found", "NoSuchKey", NotFound),
        ("404 Not Found", "NoSuchUpload", NotFound),
        ("404 Not Found", "NoSuchBucket", Unavailable),
        ("403 Forbidden", "AccessDenied", Forbidden),
        ("403 Forbidden", "RequestTimeTooSkewed", Forbidden),
        ("400 Bad Request", "InvalidPart", Invalid),
        ("400 Bad Request", "EntityTooLarge", TooLarge),
        ("400 Bad Request", "RequestTimeout", Unavailable),
        ("503 Slow Down", "SlowDown", Unavailable),
        ("500 Internal Server Error", "SomethingNew", Unavailable),
        ("409 Conflict", "SomethingNew", Internal),
    ],
)
async def test_what_a_code_means(status: str, code: str, cls: type[HeadraceError]) -> None:
    async with answering(lambda method, path: failing(status, code)) as (store, _):
        with pytest.raises(HeadraceError) as caught:
            await store.put("k", b"x")
    assert type(caught.value) is cls
    assert "secret-key" not in str(caught.value)


async def test_what_passes_is_tried_again() -> None:
    answers = iter([failing("503 Slow Down", "SlowDown"), failing("503 Slow Down", "SlowDown"), http("200 OK", ETag='"x"')])
    async with answering(lambda method, path: next(answers)) as (store, requests):
        await store.put("k", b"x")
    assert requests == ["PUT /bucket/k"] * 3


async def test_a_page_of_a_proxy_is_no_answer_of_s3() -> None:
    async with answering(lambda method, path: http("502 Bad Gateway", b"<html>", Content_Type="text/html")) as (store, _):
        with pytest.raises(Unavailable):
            await store.put("k", b"x")


async def test_a_body_that_breaks_off_is_transient_and_not_another_hash() -> None:
    data = b"x" * (3 * CHUNK_SIZE)
    answer = http("200 OK", data[: 2 * CHUNK_SIZE + 5], length=len(data), x_amz_meta_sha256=hashlib.sha256(data).hexdigest())
    got = 0
    async with answering(lambda method, path: answer) as (store, _):

        async def read() -> None:
            nonlocal got
            async for chunk in store.get("k", sha256=None):
                got += len(chunk)

        with pytest.raises(Unavailable):
            await read()
    assert got < len(data)


async def test_a_body_that_changed_on_the_way_is_another_hash() -> None:
    answer = http("200 OK", b"changed", x_amz_meta_sha256=hashlib.sha256(b"original").hexdigest())
    async with answering(lambda method, path: answer) as (store, _):
        with pytest.raises(HashMismatch):
            await store.read("k", sha256=None, max_bytes=100)


async def test_an_abort_that_fails_does_not_hide_why(caplog: pytest.LogCaptureFixture) -> None:
    def answer(method: str, path: str) -> bytes:
        if method == "POST":
            body = b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
            return http("200 OK", body, Content_Type="application/xml")
        return http("200 OK", ETag='"x"') if method == "PUT" else failing("403 Forbidden", "AccessDenied")

    async def source() -> AsyncIterator[bytes]:
        yield b"x" * PART_SIZE
        raise OSError("the disk broke")

    async with answering(answer) as (store, requests):
        with pytest.raises(OSError, match="the disk broke"):
            await store.put("k", source())
    assert requests[-1].startswith("DELETE /bucket/k?uploadId=u1")
    assert "could not be aborted" in caplog.text


async def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(reader: Any, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    store = S3Store(S3Location(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "key", "secret-key", "bucket"))
    with pytest.raises(Unavailable):
        await store.stat("k")
    await store.stop()
    server.close()
    await server.wait_closed()
