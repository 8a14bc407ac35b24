"""A small runtime that tests tell what to answer, a gateway before it, and raw connections: nothing here leaves the test's process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from gateway.access import KeySpec
from gateway.listener import DataServer
from gateway.plane import DataPlane, Limits
from gateway.routes import WHOLE, ArmSpec, Assign, GuardKind, GuardSpec, Role, RouteSpec, ShadowSpec
from gateway.tracing import Spans

KEY = "hr_0123456789abcdef_" + "k" * 32
ADMIN = "hr_fedcba9876543210_" + "a" * 32
DEADLINE_S = 10.0


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Waits for a condition, with a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true"
        await asyncio.sleep(0.002)


@dataclass
class Seen:
    """A request that the runtime got."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def model(self) -> str:
        return self.path.split("/")[3]


@dataclass
class Answer:
    """What the runtime does with a request. `raw`: these bytes in place of an answer; `hang`: nothing until released."""

    status: int = 200
    body: bytes | None = None
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    close: bool = False
    hang: bool = False
    delay_s: float = 0.0


class Runtime:
    """An HTTP server that speaks as much V2 as the tests need. `behave` decides, by request; by default it answers like Triton."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.behave: Callable[[Seen], Answer] = lambda seen: Answer()
        self.connections = 0
        self.open = 0
        self.dropped = 0
        self.release = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def requests(self, model: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.model == model]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self.release.set()
        for writer in list(self._writers):
            writer.transport.abort()
        await until(lambda: not self._writers, "the end of the runtime's connections")
        self._server = None

    def close_connections(self) -> None:
        for writer in list(self._writers):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        self._writers.add(writer)
        try:
            while await self._one(reader, writer, number):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            self.dropped += 1
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(method, path, headers, body, number)
        self.seen.append(seen)
        answer = self.behave(seen)
        if answer.delay_s:
            await asyncio.sleep(answer.delay_s)
        if answer.hang:
            gone = asyncio.ensure_future(reader.read(1))
            released = asyncio.ensure_future(self.release.wait())
            await asyncio.wait({gone, released}, return_when=asyncio.FIRST_COMPLETED)
            released.cancel()
            if gone.done():
                self.dropped += 1
                return False
            gone.cancel()
        if answer.raw is not None:
            writer.write(answer.raw)
        else:
            content = _content(seen) if answer.body is None else answer.body
            lines = [f"HTTP/1.1 {answer.status} X", f"Content-Type: {answer.content_type}", f"Content-Length: {len(content)}"]
            lines += [f"{name}: {value}" for name, value in answer.headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
        return not answer.close


def _content(seen: Seen) -> bytes:
    if seen.path.endswith("/ready"):
        return b""
    if seen.method == "GET":
        return json.dumps({"name": seen.model, "versions": ["1"], "platform": "onnx"}).encode()
    return outputs(seen.model, [0.25])


def outputs(model: str, values: list[float]) -> bytes:
    """An answer as Triton writes it."""
    tensor = {"name": "p", "datatype": "FP32", "shape": [len(values)], "data": values}
    return json.dumps({"model_name": model, "model_version": "1", "outputs": [tensor]}, separators=(",", ":")).encode()


def infer_body(value: float = 1.0, **more: Any) -> bytes:
    """An inference request of one row."""
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [value]}], **more}).encode()


@dataclass
class Reply:
    """An answer as the client got it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A raw connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self) -> Reply:
        """The next answer."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split(" ")[1])
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            if status == 100:
                return Reply(status, headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                return Reply(status, headers, await self._chunks())
            return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))

    async def _chunks(self) -> bytes:
        whole = b""
        while size := int(await self.reader.readline(), 16):
            whole += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return whole

    async def rest(self) -> bytes:
        """Everything until the gateway closes."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def infer(self, body: bytes | None = None, endpoint: str = "flights", key: str = KEY, **headers: str) -> Reply:
        self.send(request(body, endpoint, key, **headers))
        return await self.reply()

    def close(self) -> None:
        self.writer.close()


def request(body: bytes | None = None, endpoint: str = "flights", key: str = KEY, **headers: str) -> bytes:
    """An inference request. Keyword headers: x_headrace_arm="canary"."""
    content = infer_body() if body is None else body
    lines = [f"POST /v2/models/{endpoint}/infer HTTP/1.1", "Host: gateway", f"Content-Length: {len(content)}"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


async def control_app(scope: Any, receive: Any, send: Any) -> None:
    """Stands for the control plane: answers with what it was asked, once the body is there."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    told = {
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [name.decode() for name, _ in scope["headers"]],
        "size": size,
    }
    content = json.dumps(told).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(content)).encode())]})
    await send({"type": "http.response.body", "body": content})


class Gateway:
    """A gateway on a port of its own, with one runtime."""

    def __init__(self, runtime: Runtime, limits: Limits | None, spans: Spans | None, sample_ratio: float) -> None:
        self.runtime = runtime
        self.plane = DataPlane([runtime.address], limits, spans, sample_ratio)
        self.held = 0
        self.let_go = asyncio.Event()

        async def control(scope: Any, receive: Any, send: Any) -> None:
            if scope.get("path") == "/held":
                self.held += 1
                await self.let_go.wait()
            await control_app(scope, receive, send)

        self.server = DataServer(self.plane, control, "127.0.0.1", 0, grace_s=5)
        self.revision = 0
        for text, roles, key_id in ((KEY, frozenset[str](), "user"), (ADMIN, frozenset({"admin"}), "admin")):
            self.grant(text, key_id, roles)
        self._clients: list[Client] = []

    def grant(self, text: str, key_id: str, roles: frozenset[str]) -> None:
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.plane.access.apply(KeySpec(key_id, 1, digest, key_id, roles, frozenset({"flights", "other"})))

    def route(
        self,
        *,
        canary: int = 0,
        shadow: ShadowSpec | None = None,
        guards: tuple[GuardSpec, ...] | None = None,
        assign: Assign = Assign.REQUEST,
        endpoint: str = "flights",
        timeout_s: float = 5.0,
        in_rollout: bool = True,
        window_s: float = 0.25,
        rollout_id: str = "rollout-1",
    ) -> RouteSpec:
        """Publishes a route with v1 as baseline, v2 as canary (its weight in basis points), and v3 as shadow when there is one."""
        arms = [ArmSpec("v1-g1", Role.BASELINE, "triton", self.runtime.address, "m-v1-g1", "m", 1, WHOLE - canary, WHOLE)]
        if canary:
            arms.append(ArmSpec("v2-g1", Role.CANARY, "triton", self.runtime.address, "m-v2-g1", "m", 2, canary, 0))
        if shadow is not None:
            arms.append(ArmSpec(shadow.arm, Role.SHADOW, "triton", self.runtime.address, "m-v3-g1", "m", 3, 0, 0))
        self.revision += 1
        spec = RouteSpec(
            endpoint,
            self.revision,
            publication=self.revision,
            arms=tuple(arms),
            shadow=shadow,
            assign=assign,
            guards=(GuardSpec("error", GuardKind.ERROR), GuardSpec("latency_ms>50", GuardKind.LATENCY, 0.05)) if guards is None else guards,
            rollout_id=rollout_id,
            in_rollout=in_rollout,
            window_s=window_s,
            timeout_s=timeout_s,
        )
        assert self.plane.routes.apply(spec, time.monotonic())
        return spec

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.server.port, limit=1 << 26))
        self._clients.append(client)
        return client

    def totals(self) -> dict[str, dict[str, Any]]:
        """All that the windows say of every arm, to the end: finishes them."""
        sums: dict[str, dict[str, Any]] = {}
        for report in [*self.plane.windows.tick(time.monotonic()), *self.plane.windows.finish(time.monotonic())]:
            for endpoint in report.endpoints:
                for arm in endpoint.arms:
                    total = sums.setdefault(arm.arm, {"bad": {}})
                    for name in (
                        "requests",
                        "errors",
                        "fallbacks",
                        "shadow_sent",
                        "shadow_compared",
                        "shadow_different",
                        "shadow_shed",
                        "shadow_errors",
                    ):
                        total[name] = total.get(name, 0) + getattr(arm, name)
                    for guard, count in arm.bad.items():
                        total["bad"][guard] = total["bad"].get(guard, 0) + count
        return sums

    async def stop(self) -> None:
        for client in self._clients:
            client.close()
        await self.server.stop()


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the gateway runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    one = Runtime()
    await one.start()
    yield one
    await one.stop()


MakeGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def make_gateway(runtime: Runtime) -> AsyncIterator[MakeGateway]:
    made: list[Gateway] = []

    async def make(limits: Limits | None = None, *, spans: Spans | None = None, sample_ratio: float = 0.0) -> Gateway:
        gateway = Gateway(runtime, limits, spans, sample_ratio)
        await gateway.server.start()
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        await gateway.stop()


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> Gateway:
    """A gateway with the endpoint `flights` on v1 alone."""
    one = await make_gateway()
    one.route()
    return one
