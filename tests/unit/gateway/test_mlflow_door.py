"""The door to MLflow on real sockets, before a service that tells what it was asked: keys, paths, bodies of any size, and who goes away."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway import page
from gateway.access import KeySpec
from gateway.browser import Hosts
from gateway.listener import DataServer
from gateway.mlflow import DoorLimits, MlflowDoor
from gateway.plane import DataPlane, Limits
from gateway.sessions import Sessions
from servicekit import runtoken
from servicekit.access import GATEWAY, Caller, hash_secret
from servicekit.clock import SystemClock
from servicekit.errors import Unauthenticated
from servicekit.http import HttpServer

from tests.unit.gateway.conftest import ADMIN, KEY, Client, control_app, until

RUN_SECRET = "a secret for run tokens"
UPLOADS = "/api/2.0/mlflow-artifacts/artifacts/0/r/artifacts"


@dataclass
class Asked:
    """A request that the service got."""

    method: str
    target: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Service:
    """Stands for tracker and registry: remembers what it was asked, and behaves by path."""

    name: str
    asked: list[Asked] = field(default_factory=list)
    taken: int = 0
    sent: int = 0
    left: int = 0
    going_on: asyncio.Event = field(default_factory=asyncio.Event)
    stored_at: str = ""
    """What it says of where a model version is."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = scope["raw_path"].decode()
        target = f"{raw}?{scope['query_string'].decode()}" if scope["query_string"] else raw
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        asked = Asked(scope["method"], target, scope["path"], headers)
        self.asked.append(asked)
        what = scope["path"].rpartition("/")[2]
        if what == "early":
            await self._answer(send, 403, b'{"error_code":"PERMISSION_DENIED","message":"no"}')
            return
        if what == "get-download-uri":
            known = json.dumps({"artifact_uri": self.stored_at}).encode()
            await self._answer(send, 200 if self.stored_at else 404, known if self.stored_at else b'{"message":"no such version"}')
            return
        if what == "endless":
            await self._endless(send, receive)
            return
        if what == "broken":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise RuntimeError("dies in the middle of its answer")
        if what == "hangs":
            await self.going_on.wait()
        if what == "slow":
            await self.going_on.wait()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            self.taken += len(message["body"])
            if self.taken < 1 << 20:
                asked.body += message["body"]
            if not message["more_body"]:
                break
        told = {"service": self.name, "method": asked.method, "target": target, "headers": headers, "body": asked.body.decode("latin-1")}
        await self._answer(send, 200, json.dumps(told).encode())

    async def _answer(self, send: Any, status: int, body: bytes) -> None:
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
            (b"set-cookie", b"a=b"),
            (b"x-own", b"1"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _endless(self, send: Any, receive: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(_disconnected(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            self.sent += 65536
            await asyncio.sleep(0)
        self.left += 1


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class World:
    """A gateway with a door before two services."""

    def __init__(self, tracker: Service, registry: Service, plane: DataPlane, door: MlflowDoor, server: DataServer) -> None:
        self.tracker = tracker
        self.registry = registry
        self.plane = plane
        self.door = door
        self.server = server
        self.clients: list[Client] = []
        self.time = 1_000_000.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def http(self, **headers: str) -> httpx.AsyncClient:
        given = {"authorization": f"Bearer {KEY}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.AsyncClient(base_url=self.url, headers={k: v for k, v in given.items() if v}, trust_env=False, timeout=20)

    async def raw(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.server.port, limit=1 << 26))
        self.clients.append(client)
        return client


MakeWorld = Callable[..., Any]


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    closing: list[Any] = []

    async def make(limits: Limits | None = None, *, public_urls: str = "", upload_bytes: int = 5 * 1024**4, folder: str = "") -> World:
        limits = limits or Limits()
        tracker, registry = Service("tracker"), Service("registry")
        servers = [HttpServer(service, "127.0.0.1:0", service.name, grace_s=1) for service in (tracker, registry)]
        for server in servers:
            await server.start()
            closing.append(server.stop)
        plane = DataPlane([], limits)
        world: World

        def authenticate(token: str) -> Caller:
            if token.startswith(runtoken.PREFIX):
                claims = runtoken.verify(RUN_SECRET, token, SystemClock().now())
                return Caller(GATEWAY, f"run:{claims.run_id}", frozenset(), claims.run_id, claims.fencing_token)
            grant = plane.access.identify(None, token.encode())
            if grant is None:
                raise Unauthenticated("this API key is not known, or has expired")
            return Caller(GATEWAY, grant.subject, grant.roles)

        ports = [next(iter(server.listening().values())) for server in servers]
        door = MlflowDoor(
            authenticate,
            Sessions(plane.access, b"s", 3600, lambda: world.time),
            Hosts(public_urls),
            page.find(folder) if folder else None,
            DoorLimits(upload_bytes=upload_bytes, body_bytes=limits.max_body_bytes),
            tracker=f"127.0.0.1:{ports[0]}",
            registry=f"127.0.0.1:{ports[1]}",
            service_token="gateway.token",
        )
        plane.streamed_body = door.streamed_body
        for text, roles, key_id in ((KEY, frozenset({"editor"}), "user"), (ADMIN, frozenset({"admin"}), "admin")):
            plane.access.apply(KeySpec(key_id, 1, hash_secret(text), f"{key_id}@here", roles))
        gateway = DataServer(plane, door.before(control_app), "127.0.0.1", 0, grace_s=2)
        await gateway.start()
        world = World(tracker, registry, plane, door, gateway)
        closing.extend([door.close, gateway.stop])
        closing.append(lambda: _close(world))
        return world

    yield make
    for close in reversed(closing):
        await close()


async def _close(world: World) -> None:
    world.tracker.going_on.set()
    for client in world.clients:
        client.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    made: World = await make_world()
    return made


def head(line: str, *more: str, key: str = KEY) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: 127.0.0.1", *([f"Authorization: Bearer {key}"] if key else []), *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# Who is calling


async def test_keys_and_run_tokens_come_as_mlflows_clients_send_them(world: World) -> None:
    token = runtoken.issue(RUN_SECRET, "a" * 32, 3, SystemClock().now().replace(year=2999))
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    async with world.http(authorization="") as http:
        for headers, subject in (
            ({"authorization": f"Bearer {KEY}"}, "user@here"),
            ({"authorization": f"Basic {basic}"}, "user@here"),
            ({"x-api-key": ADMIN}, "admin@here"),
            ({"authorization": f"Bearer {token}"}, f"run:{'a' * 32}"),
        ):
            answer = await http.get("/api/2.0/mlflow/runs/get", headers=headers)
            assert answer.status_code == 200
            assert answer.json()["headers"]["headrace-subject"] == subject
        told = world.tracker.asked[-1].headers
        assert (told["headrace-run"], told["headrace-fencing"], told["headrace-roles"]) == ("a" * 32, "3", "")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer hr_no"},
        {"authorization": "Bearer hrr_no"},
        {"authorization": "Basic !!"},
        {"authorization": "Basic aHJfbm8="},
        {"authorization": "Digest x"},
        {"x-api-key": ""},
        {"cookie": "headrace_session=x.1.y"},
    ],
)
async def test_nobody_is_let_in_without_a_valid_key_and_told_so_as_mlflow_does(world: World, headers: dict[str, str]) -> None:
    async with world.http(authorization="") as http:
        for path in ("/api/2.0/mlflow/runs/get", "/ajax-api/3.0/mlflow/x", "/graphql", "/get-artifact", "/version", "/health"):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error_code"] == "UNAUTHENTICATED"
            assert answer.headers["www-authenticate"].split(" ")[0] == ("Bearer" if "cookie" in headers else "Basic")
    assert world.tracker.asked == world.registry.asked == []


async def test_what_a_client_says_of_itself_does_not_pass(world: World) -> None:
    client = await world.raw()
    client.send(
        head(
            "POST /api/2.0/mlflow/runs/create?a=b%20c&d=%2F",
            "Headrace-Subject: root",
            "headrace-subject: root",
            "HEADRACE-ROLES: admin",
            "Headrace-Run: x",
            "Headrace-Fencing: 9",
            "Connection: keep-alive, headrace-subject",
            "Keep-Alive: 5",
            "TE: trailers",
            "Proxy-Authorization: x",
            "X-Forwarded-For: 1.2.3.4",
            "Cookie: mlflow-request-header-Authorization=Bearer",
            "Content-Type: application/json",
            "Content-Length: 2",
        )
        + b"{}"
    )
    reply = await client.reply()
    assert reply.status == 200
    told = reply.json
    assert told["target"] == "/api/2.0/mlflow/runs/create?a=b%20c&d=%2F"
    assert told["body"] == "{}"
    assert told["headers"].pop("host").startswith("127.0.0.1:")
    told["headers"].pop("traceparent", None)
    assert told["headers"] == {
        "authorization": "Bearer gateway.token",
        "headrace-subject": "user@here",
        "headrace-roles": "editor",
        "content-type": "application/json",
        "content-length": "2",
    }
    assert not {"set-cookie", "x-own"} & set(reply.headers)


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key", "Cookie", "Origin", "Sec-Fetch-Site", "Transfer-Encoding"])
async def test_a_header_by_which_is_decided_comes_once(world: World, name: str) -> None:
    client = await world.raw()
    client.send(head("GET /api/2.0/mlflow/runs/get", f"{name}: chunked", f"{name}: chunked"))
    assert (await client.reply()).status == 400
    assert world.tracker.asked == []


# Paths


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/api/2.0/mlflow/runs/get", "tracker"),
        ("/api/2.0/mlflow/registered-models/get", "registry"),
        ("/api/2.0/mlflow/%72egistered-models/get", "registry"),
        ("/ajax-api/2.0/mlflow/model-versions/search", "registry"),
        ("/api/2.0/mlflow/webhooks", "registry"),
        ("/api/2.0/mlflow/registered-models-not/get", "tracker"),
        ("/api/2.0/mlflow/runs/registered-models/get", "tracker"),
        ("/api/2.0/mlflow-artifacts/artifacts/a%2Fb", "tracker"),
        ("/api/2.0/mlflow-artifacts/artifacts/a%252e%252e%252fb", "tracker"),
        ("/api/2.0/mlflow-artifacts/artifacts/%C3%A9 %25?x".replace(" ", "%20"), "tracker"),
        ("/api/2.0/mlflow-artifacts/artifacts/a;b=c&d", "tracker"),
        ("/api/2.0/mlflow-artifacts/artifacts/...", "tracker"),
        ("/%61pi/2.0/mlflow/runs/get", "tracker"),
        ("http://elsewhere/api/2.0/mlflow/runs/get", "tracker"),
        ("/api/2.0/mlflow//registered-models/get", "tracker"),
        ("/api/2.0/mlflow/runs/get%zz", "tracker"),
        ("/get-artifact?path=x", "tracker"),
        ("/graphql", "tracker"),
    ],
)
async def test_the_service_reads_the_path_by_which_it_was_chosen(world: World, path: str, service: str) -> None:
    client = await world.raw()
    client.send(head(f"GET {path}"))
    assert (await client.reply()).json["service"] == service
    (asked,) = world.tracker.asked + world.registry.asked
    plain = path.removeprefix("http://elsewhere").partition("?")[0]
    assert asked.path == httpx.URL(plain).path if "%zz" not in plain else asked.path.endswith("%zz")
    assert "%2F" not in asked.target


M = "m-" + "a" * 32


@pytest.mark.parametrize(
    ("stored_at", "target"),
    [
        ("runs:/r1/model", "/get-artifact?run_uuid=r1&path=model%2Fa%2FMLmodel%26x"),
        (f"models:/{M}", f"/api/2.0/mlflow/logged-models/{M}/artifacts/files?artifact_file_path=a%2FMLmodel%26x"),
        ("mlflow-artifacts:/0/r1/artifacts/model", "/api/2.0/mlflow-artifacts/artifacts/0/r1/artifacts/model/a/MLmodel&x"),
    ],
)
async def test_a_file_of_a_version_comes_from_where_the_registry_says(world: World, stored_at: str, target: str) -> None:
    world.registry.stored_at = stored_at
    async with world.http() as http:
        told = (await http.get("/model-versions/get-artifact", params={"name": "a b", "version": "3", "path": "a/MLmodel&x"})).json()
    assert (told["service"], told["target"]) == ("tracker", target)
    [asked] = world.registry.asked
    assert asked.target == "/api/2.0/mlflow/model-versions/get-download-uri?name=a+b&version=3"
    assert asked.headers["headrace-subject"] == told["headers"]["headrace-subject"] == "user@here"


@pytest.mark.parametrize(
    ("stored_at", "query", "status"),
    [
        ("", {"name": "a", "version": "3", "path": "x"}, 404),
        ("dummy-source", {"name": "a", "version": "3", "path": "x"}, 404),
        ("https://elsewhere/x", {"name": "a", "version": "3", "path": "x"}, 404),
        ("mlflow-artifacts:/0/r/artifacts", {"name": "a", "version": "3", "path": "../../x"}, 400),
        ("mlflow-artifacts:/0/r/artifacts", {"name": "a", "version": "3", "path": "/x"}, 400),
        ("runs:/r/m", {"name": "a", "version": "3"}, 400),
        ("runs:/r/m", {"path": "x"}, 400),
    ],
)
async def test_a_version_without_that_file_is_told(world: World, stored_at: str, query: dict[str, str], status: int) -> None:
    world.registry.stored_at = stored_at
    async with world.http() as http:
        answer = await http.get("/model-versions/get-artifact", params=query)
    assert answer.status_code == status
    assert world.tracker.asked == []


@pytest.mark.parametrize(
    "path",
    [
        "/api/2.0/mlflow/../../v2",
        "/api/2.0/mlflow/%2e%2e/x",
        "/api/2.0/mlflow/%2E./x",
        "/api/2.0/mlflow/..%2fx",
        "/api/2.0/mlflow/./x",
        "/api/2.0/mlflow/runs/..",
        "/api/2.0/mlflow-artifacts/artifacts/a/%2e%2e%2fb",
        "/api/2.0/mlflow-artifacts/artifacts/a%5c..%5cb",
        "/api/2.0/mlflow-artifacts/artifacts/a%00b",
        "/api/2.0/mlflow-artifacts/artifacts/a%0d%0aX-Evil:%201",
        "/api/2.0/mlflow-artifacts/artifacts/%ff",
        "/mlflow/../v2",
        "/mlflow/ajax-api/2.0/%2e%2e/x",
        "/mlflow/static-files/%2e%2e/%2e%2e/etc/passwd",
    ],
)
async def test_a_path_that_could_be_read_differently_is_refused(world: World, path: str) -> None:
    client = await world.raw()
    client.send(head(f"GET {path}"))
    reply = await client.reply()
    assert (reply.status, reply.json["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert world.tracker.asked == world.registry.asked == []


@pytest.mark.parametrize("target", [b"/\xff", b"http://[::1/", b"/api/2.0/\x80"])
async def test_a_target_that_is_no_url_is_a_bad_request(world: World, target: bytes) -> None:
    client = await world.raw()
    client.send(b"GET " + target + b" HTTP/1.1\r\nHost: g\r\n\r\n")
    assert b"HTTP/1.1 400 " in await client.rest()


async def test_other_methods_and_paths_are_not_mlflows(world: World) -> None:
    async with world.http() as http:
        assert (await http.options("/api/2.0/mlflow/runs/get")).status_code == 404
        assert (await http.get("/mlflow/api/2.0/mlflow/runs/get")).status_code == 404
        assert (await http.get("/mlflowx")).json()["path"] == "/mlflowx"
        assert (await http.get("/api/4.0/mlflow")).json()["path"] == "/api/4.0/mlflow"
    assert world.tracker.asked == []


# Bodies


async def test_an_artifact_may_be_larger_than_any_other_body(make_world: MakeWorld) -> None:
    world: World = await make_world(Limits(max_body_bytes=100_000))
    size = 3_000_000

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            yield b"x" * 1000

    async with world.http() as http:
        assert (await http.put(f"{UPLOADS}/a", content=b"x" * size)).status_code == 200
        assert world.tracker.taken == size
        assert (await http.put(f"/ajax-api{UPLOADS.removeprefix('/api')}/b", content=pieces())).status_code == 200
        assert world.tracker.taken == 2 * size
        too_large = await http.post("/api/2.0/mlflow/runs/log-batch", content=b"x" * size)
        assert (too_large.status_code, too_large.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        assert (await http.post("/elsewhere", content=b"x" * size)).status_code == 413
    token = runtoken.issue(RUN_SECRET, "a" * 32, 3, SystemClock().now().replace(year=2999))
    async with world.http(authorization=f"Bearer {token}") as http:
        assert (await http.put(f"{UPLOADS}/c", content=b"x" * size)).status_code == 200
    assert len(world.tracker.asked) == 3


async def test_without_a_key_nothing_large_is_taken(make_world: MakeWorld) -> None:
    world: World = await make_world(Limits(max_body_bytes=100_000))
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", f"Content-Length: {1 << 40}", key="hr_no") + b"x" * 50_000)
    reply = await client.reply()
    assert (reply.status, reply.json["error_code"]) == (401, "UNAUTHENTICATED")
    assert await client.rest() == b""
    chunked = await world.raw()
    chunked.send(head(f"PUT {UPLOADS}/a", "Transfer-Encoding: chunked", key="") + b"5\r\nhello\r\n")
    assert (await chunked.reply()).status == 401
    assert await chunked.rest() == b""
    assert world.tracker.asked == []


async def test_an_upload_beyond_its_limit_is_refused(make_world: MakeWorld) -> None:
    world: World = await make_world(Limits(max_body_bytes=100_000), upload_bytes=1_000_000)
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", "Content-Length: 1000001"))
    assert (await client.reply()).json["message"] == "the body is larger than 1000000 bytes"
    assert world.tracker.asked == []
    chunked = await world.raw()
    chunked.send(head(f"PUT {UPLOADS}/a", "Transfer-Encoding: chunked") + b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
    assert await chunked.rest() == b""
    await until(lambda: world.tracker.left == 1, "the service learns that the rest will not come")


async def test_the_time_of_an_upload_is_not_limited_but_its_silence_is(make_world: MakeWorld) -> None:
    world: World = await make_world(Limits(body_timeout_s=1.5))
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", "Content-Length: 80000"))
    for _ in range(8):
        client.send(b"x" * 10_000)
        await asyncio.sleep(0.6)
    assert (await client.reply()).status == 200
    client.send(head(f"PUT {UPLOADS}/b", "Content-Length: 80000") + b"x")
    assert await client.rest() == b""
    await until(lambda: world.tracker.left == 1, "the service learns of it")


async def test_a_service_that_takes_nothing_makes_the_client_wait_and_not_the_gateway_remember(world: World) -> None:
    client = await world.raw()
    size = 64 << 20
    client.send(head(f"PUT {UPLOADS}/slow", f"Content-Length: {size}"))
    for _ in range(size >> 16):
        client.writer.write(b"x" * 65536)
    await until(lambda: bool(world.tracker.asked), "the request")
    unsent = []
    for _ in range(20):
        await asyncio.sleep(0.02)
        unsent.append(client.writer.transport.get_write_buffer_size())
    # What is not here any more is in buffers of sockets and pieces, in both directions.
    assert unsent[-1] == unsent[-5] > size // 2
    world.tracker.going_on.set()
    assert (await client.reply()).status == 200
    assert world.tracker.taken == size


async def test_an_answer_that_nobody_reads_is_not_gathered(world: World) -> None:
    client = await world.raw()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport reads
    client.send(head("GET /api/2.0/mlflow/endless"))
    await until(lambda: world.tracker.sent > 0, "the answer")
    sent = -1
    while sent != world.tracker.sent:
        sent = world.tracker.sent
        await asyncio.sleep(0.3)
    assert sent < 64 << 20
    client.writer.transport.abort()
    await until(lambda: world.tracker.left == 1, "the service learns that the client has gone")


async def test_an_answer_before_the_body_is_whole_reaches_the_client_and_ends_the_connection(world: World) -> None:
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/early", "Content-Length: 100000000") + b"x" * 1000)
    reply = await client.reply()
    assert (reply.status, reply.json["error_code"]) == (403, "PERMISSION_DENIED")
    assert await client.rest() == b""
    # What the client sent on is not the beginning of somebody's next request.
    other = await world.raw()
    for _ in range(3):
        other.send(head("GET /api/2.0/mlflow/runs/get"))
        assert (await other.reply()).status == 200


async def test_a_client_that_waits_to_be_told_sends_its_body_then(world: World) -> None:
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", "Content-Length: 5", "Expect: 100-continue"))
    assert (await client.reply()).status == 100
    client.send(b"hello")
    assert (await client.reply()).json["body"] == "hello"
    refused = await world.raw()
    refused.send(head(f"PUT {UPLOADS}/a", "Content-Length: 5", "Expect: 100-continue", key="hr_no"))
    assert (await refused.reply()).status == 401


async def test_a_client_that_closes_with_its_request_gets_its_answer(world: World) -> None:
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", "Content-Length: 5", "Connection: close") + b"hello")
    assert b'"body": "hello"' in await client.rest()


# Who goes away


@pytest.mark.parametrize("path", ["/api/2.0/mlflow/endless", "/api/2.0/mlflow/hangs"])
async def test_a_client_that_leaves_ends_what_is_done_for_it(world: World, path: str) -> None:
    client = await world.raw()
    client.send(head(f"GET {path}"))
    await until(lambda: bool(world.tracker.asked), "the request")
    if path.endswith("endless"):
        await client.reader.readexactly(100_000)
    client.writer.transport.abort()
    await until(lambda: not world.server._server.server_state.tasks, "the end of the door's work")  # type: ignore[union-attr]
    world.tracker.going_on.set()
    await until(lambda: world.tracker.left == 1, "the service learns of it")


async def test_a_client_that_leaves_in_the_middle_of_its_upload_ends_it(world: World) -> None:
    client = await world.raw()
    client.send(head(f"PUT {UPLOADS}/a", "Content-Length: 1000000") + b"x" * 100_000)
    await until(lambda: world.tracker.taken == 100_000, "the first of it")
    client.writer.transport.abort()
    await until(lambda: world.tracker.left == 1, "the service learns of it")
    assert not world.tracker.going_on.is_set()


async def test_a_service_that_dies_in_the_middle_of_its_answer_cuts_the_connection(world: World, caplog: pytest.LogCaptureFixture) -> None:
    client = await world.raw()
    client.send(head("GET /api/2.0/mlflow/broken"))
    got = await client.rest()
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.endswith(b"half")
    assert b"content-length: 100" in got


async def test_a_service_that_is_away_is_told_so_that_clients_try_again(world: World) -> None:
    world.door._tracker = "http://127.0.0.1:9"
    async with world.http() as http:
        answer = await http.get("/api/2.0/mlflow/runs/get")
    assert (answer.status_code, answer.json()["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
