"""The proxy of a training against real sockets: what it lets through, what it refuses, and that a connection gets one request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import uvloop
from pydantic import ValidationError
from trainer.runner.egress import MAX_CONNECTIONS, Destination, Egress, Proxy, destination, destination_of, destinations, environment
from trainer.settings import TrainerSettings

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Origin:
    """A server that keeps every byte that it gets, and answers each connection once the bytes `until` have come."""

    until: bytes = b"\r\n\r\n"
    answer: bytes = ANSWER
    got: list[bytearray] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = bytearray()
        self.got.append(mine)
        try:
            while self.until not in mine:
                if not (data := await reader.read(65_536)):
                    return
                mine += data
            writer.write(self.answer)
            writer.write_eof()
            while await reader.read(65_536):  # as servers do, else their kernel takes the answer back
                pass
        except ConnectionError:
            return
        finally:
            writer.close()
            self.ended.set()


async def served(serve: Callable[..., object]) -> tuple[asyncio.Server, int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)  # type: ignore[arg-type]  # a coroutine function
    return server, server.sockets[0].getsockname()[1]


@dataclass
class Scene:
    """A proxy, the origin that it may reach, and one that it may not."""

    proxy: Proxy
    port: int
    allowed: Origin
    other: Origin
    notes: list[str]

    async def connect(self) -> Stream:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, request: bytes) -> bytes:
        """Everything that is answered to these bytes."""
        reader, writer = await self.connect()
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(30):
            answer = await reader.read()
        writer.close()
        return answer

    def get(self, port: int, rest: str = "", method: str = "GET") -> bytes:
        return f"{method} http://127.0.0.1:{port}/path?q=1 HTTP/1.1\r\nHost: elsewhere\r\n{rest}\r\n".encode()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    allowed, other = Origin(), Origin()
    first, allowed.port = await served(allowed.serve)
    second, other.port = await served(other.serve)
    listener = socket.create_server(("127.0.0.1", 0))
    notes: list[str] = []
    proxy = Proxy(listener, Egress(frozenset({Destination("127.0.0.1", allowed.port)}), notes.append))
    port = listener.getsockname()[1]
    await proxy.start()
    async with first, second:
        yield Scene(proxy, port, allowed, other, notes)
        await proxy.stop()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("Example.ORG:443", "example.org", 443),
        ("example.org.:443", "example.org", 443),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("[::1]:80", "::1", 80),
        ("[0:0::1]:80", "::1", 80),
        ("s3_store:9000", "s3_store", 9000),
    ],
)
def test_destinations_are_read_in_one_form(text: str, host: str, port: int) -> None:
    assert destination(text) == Destination(host, port)
    assert destination(str(destination(text))) == destination(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:8 0", "a b:80", "*.example.org:443", "::1:80", "[::1]"),
        *("[10.0.0.1]:80", "user@host:80", "http://host:80", "host:80/path", "h\u00f6st:80", "-h:80", "host:\u0661", "h" * 300 + ":80"),
    ],
)
def test_what_is_no_destination(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        destination(text)


def test_a_name_an_address_and_other_spellings_of_it_are_different_things() -> None:
    allowed = destinations("127.0.0.1:80, localhost:80 ,")
    assert allowed == {Destination("127.0.0.1", 80), Destination("localhost", 80)}
    for text in ("127.1:80", "2130706433:80", "0x7f.0.0.1:80", "[::ffff:127.0.0.1]:80", "127.0.0.1:81", "localhost.evil.example:80"):
        assert destination(text) not in allowed


def test_urls_lead_somewhere() -> None:
    assert destination_of("https://Gateway.example/x") == Destination("gateway.example", 443)
    assert destination_of("http://127.0.0.1:8080") == Destination("127.0.0.1", 8080)
    for url in ("ftp://host/", "host:80", "http://user@host/", ""):
        with pytest.raises(ValueError, match="is not"):
            destination_of(url)


@pytest.mark.parametrize(
    "wrong", [{"training_egress": "example.org"}, {"git_hosts": "https://example.org"}, {"public_url": "gateway:8080"}]
)
def test_settings_that_name_no_destination_stop_the_trainer_at_its_start(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="is not"):
        TrainerSettings.model_validate(wrong)


def test_only_names_of_the_loopback_that_mean_nothing_outside_are_reached_without_the_proxy() -> None:
    found = environment([Destination("127.0.0.1", 80), Destination("example.org", 80)])
    assert found["no_proxy"] == found["NO_PROXY"] == "localhost,::1"
    assert {found[name] for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")} == {
        "http://127.0.0.1:3128"
    }


async def test_a_request_arrives_as_one_to_the_server_itself(scene: Scene) -> None:
    hop = "Proxy-Authorization: secret\r\nProxy-Connection: keep-alive\r\nConnection: keep-alive, X-Drop, Content-Length\r\nX-Drop: 1\r\n"
    scene.allowed.until = b"body"
    answer = await scene.send(scene.get(scene.allowed.port, f"{hop}X-Keep: 2\r\nContent-Length: 4\r\n", "PUT") + b"body")
    assert answer == ANSWER
    head, _, body = bytes(scene.allowed.got[0]).partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "PUT /path?q=1 HTTP/1.1",
        f"Host: 127.0.0.1:{scene.allowed.port}",
        "X-Keep: 2",
        "Content-Length: 4",
        "Connection: close",
    ]
    assert body == b"body"
    assert scene.notes == []


async def test_a_second_request_on_a_connection_reaches_nobody(scene: Scene) -> None:
    """Neither the other destination, nor the allowed one, which would take it for its own."""
    scene.allowed.until = b"first"
    first = scene.get(scene.allowed.port, "Content-Length: 5\r\n", "POST") + b"first"
    for second in (scene.get(scene.other.port), scene.get(scene.allowed.port), b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n"):
        assert await scene.send(first + second) == ANSWER
    chunked = scene.get(scene.allowed.port, "Transfer-Encoding: chunked\r\n", "POST") + b"5;x=y\r\nfirst\r\n0\r\nTrailer: 1\r\n\r\n"
    scene.allowed.until = b"0\r\n\r\n"
    assert await scene.send(chunked + scene.get(scene.other.port)) == ANSWER
    assert scene.other.got == []
    assert [bytes(got.partition(b"\r\n\r\n")[2]) for got in scene.allowed.got] == [b"first"] * 3 + [b"5\r\nfirst\r\n0\r\n\r\n"]


@pytest.mark.parametrize(
    "rest",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -1\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        " folded: 1\r\n",
        "X: a\r\n b\r\n",
        "X: a\nY: b\r\n",
        "X: a\x00\r\n",
        "no colon\r\n",
        ": no name\r\n",
    ],
)
async def test_a_head_that_two_readers_could_read_in_two_ways_is_refused(scene: Scene, rest: str) -> None:
    assert (await scene.send(scene.get(scene.allowed.port, rest, "POST"))).startswith(b"HTTP/1.1 400 ")
    assert scene.allowed.got == []


@pytest.mark.parametrize(
    "request_line",
    [
        "GET / HTTP/1.1",
        "GET https://127.0.0.1:PORT/ HTTP/1.1",
        "GET http://user@127.0.0.1:PORT/ HTTP/1.1",
        "GET http://127.0.0.1:PORT/a b HTTP/1.1",
        "GET http://127.0.0.1:PORT/#x HTTP/1.1",
        "GET http://127.0.0.1:PORT HTTP/2.0",
        "GET  http://127.0.0.1:PORT/ HTTP/1.1",
        "CONNECT 127.0.0.1 HTTP/1.1",
        "CONNECT http://127.0.0.1:PORT HTTP/1.1",
        "nonsense",
    ],
)
async def test_what_is_no_request_to_a_proxy_is_refused(scene: Scene, request_line: str) -> None:
    request = request_line.replace("PORT", str(scene.allowed.port)).encode() + b"\r\n\r\n"
    assert (await scene.send(request)).startswith(b"HTTP/1.1 400 ")
    assert scene.allowed.got == []


async def test_a_head_without_end_is_refused(scene: Scene) -> None:
    assert (await scene.send(b"GET http://127.0.0.1/ HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("chunks", [b"x\r\n", b"-1\r\n", b"2\r\nabc\r\n", b"1" * 17 + b"\r\n", b"\r\n", b"1;" + b"x" * 2_000 + b"\r\n"])
async def test_chunks_that_are_none_end_the_connection(scene: Scene, chunks: bytes) -> None:
    scene.allowed.until = b"never"
    assert await scene.send(scene.get(scene.allowed.port, "Transfer-Encoding: chunked\r\n", "POST") + chunks) == b""
    await asyncio.wait_for(scene.allowed.ended.wait(), 30)


async def test_what_is_not_allowed_is_refused_with_the_settings_name_and_noted_once(scene: Scene) -> None:
    other = scene.other.port
    connect = f"CONNECT 127.0.0.1:{other} HTTP/1.1\r\n\r\n".encode()
    for request in (scene.get(other), connect, connect, scene.get(other, "Content-Length: 3\r\n", "POST") + b"abc"):
        answer = await scene.send(request)
        assert answer.startswith(b"HTTP/1.1 403 Not allowed by HEADRACE_TRAINING_EGRESS\r\n")
        assert f"may not reach 127.0.0.1:{other}: HEADRACE_TRAINING_EGRESS".encode() in answer
    assert (await scene.send(b"CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 403 ")
    for port in range(1, 100):
        assert (await scene.send(f"CONNECT 127.0.0.2:{port} HTTP/1.1\r\n\r\n".encode())).startswith(b"HTTP/1.1 403 ")
    assert scene.other.got == []
    assert scene.notes[:2] == [
        f"refused to connect to 127.0.0.1:{other}: HEADRACE_TRAINING_EGRESS of the trainer does not name it",
        "refused to connect to 169.254.169.254:80: HEADRACE_TRAINING_EGRESS of the trainer does not name it",
    ]
    assert len(scene.notes) == 20  # a training cannot fill the trainer's disk by asking


async def test_a_tunnel_goes_both_ways_and_ends_in_each_direction_alone(scene: Scene) -> None:
    scene.allowed.until, scene.allowed.answer = b"last", b"answer to all"
    reader, writer = await scene.connect()
    writer.write(f"CONNECT 127.0.0.1:{scene.allowed.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
    writer.write(b"\x00first, ")
    writer.write(b"last")
    writer.write_eof()
    assert await reader.read() == b"answer to all"
    assert scene.allowed.got == [b"\x00first, last"]
    writer.close()


async def test_a_server_that_is_not_there_is_a_bad_gateway(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(listener, Egress(frozenset({Destination("127.0.0.1", port)}), scene.notes.append))
    scene.port = listener.getsockname()[1]
    await proxy.start()
    try:
        answer = await scene.send(scene.get(port))
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert f"127.0.0.1:{port} cannot be reached".encode() in answer
    finally:
        await proxy.stop()


async def test_an_answer_that_comes_before_the_end_of_the_body_arrives(scene: Scene) -> None:
    scene.allowed.answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    size = 8 * 2**20
    reader, writer = await scene.connect()
    writer.write(scene.get(scene.allowed.port, f"Content-Length: {size}\r\n", "PUT") + bytes(size))
    assert await reader.readuntil(b"\r\n\r\n") == scene.allowed.answer
    writer.close()


@pytest.mark.parametrize("tunnel", [True, False])
async def test_memory_does_not_grow_with_what_goes_through(scene: Scene, tunnel: bool) -> None:
    size, block = 96 * 2**20, bytes(2**18)
    arrived = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        if not tunnel:
            await reader.readuntil(b"\r\n\r\n")
        while arrived < size:
            arrived += len(await reader.read(2**18))
        for _ in range(size // len(block)):
            writer.write(block)
            await writer.drain()
        writer.close()

    server, port = await served(count)
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(listener, Egress(frozenset({Destination("127.0.0.1", port)}), scene.notes.append))
    scene.port = listener.getsockname()[1]
    await proxy.start()
    reader, writer = await scene.connect()
    tracemalloc.start()
    try:
        if tunnel:
            writer.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
        else:
            writer.write(scene.get(port, f"Content-Length: {size}\r\n", "PUT"))
        for _ in range(size // len(block)):
            writer.write(block)
            await writer.drain()
        returned = 0
        while data := await reader.read(2**18):
            returned += len(data)
        assert (arrived, returned) == (size, size)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
        writer.close()
        await proxy.stop()
        server.close()


async def test_when_it_stops_every_connection_ends_and_nobody_listens(scene: Scene) -> None:
    scene.allowed.until = b"never"
    tunnels = []
    for _ in range(3):
        reader, writer = await scene.connect()
        writer.write(f"CONNECT 127.0.0.1:{scene.allowed.port} HTTP/1.1\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        tunnels.append((reader, writer))
    await scene.proxy.stop()
    for reader, writer in tunnels:
        with contextlib.suppress(ConnectionResetError):  # an end as good as any
            assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
    await asyncio.wait_for(scene.allowed.ended.wait(), 30)
    with pytest.raises(ConnectionRefusedError):
        await scene.connect()
    await scene.proxy.stop()


async def test_connections_are_limited_in_number(scene: Scene) -> None:
    scene.allowed.until = b"never"
    held = []
    for _ in range(MAX_CONNECTIONS):
        reader, writer = await scene.connect()
        writer.write(f"CONNECT 127.0.0.1:{scene.allowed.port} HTTP/1.1\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        held.append(writer)
    assert (await scene.send(scene.get(scene.allowed.port))).startswith(b"HTTP/1.1 503 ")
    for writer in held:
        writer.close()
    async with asyncio.timeout(30):
        while (await scene.send(scene.get(scene.other.port))).startswith(b"HTTP/1.1 503 "):  # noqa: ASYNC110 - the proxy tells nobody
            await asyncio.sleep(0.01)


def test_it_serves_in_the_event_loop_that_attempts_run_in() -> None:
    async def main() -> bytes:
        origin = Origin()
        server, origin.port = await served(origin.serve)
        listener = socket.create_server(("127.0.0.1", 0))
        proxy = Proxy(listener, Egress(frozenset({Destination("127.0.0.1", origin.port)}), lambda text: None))
        one = Scene(proxy, listener.getsockname()[1], origin, origin, [])
        await proxy.start()
        async with server:
            answer = await one.send(one.get(origin.port))
            await proxy.stop()
        return answer

    assert uvloop.run(main()) == ANSWER
