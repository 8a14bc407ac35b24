"""The door to MLflow in a real gateway process: no route without credentials, and a gigabyte in each direction in the memory of a piece."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import registry.bootstrap
import tracker.bootstrap
from contracts.registry.v1 import events_pb2 as registry_pb
from gateway.state import StateFile
from registry.settings import RegistrySettings
from servicekit.http import HttpServer
from servicekit.rest import Endpoint
from tracker.settings import TrackerSettings

from tests.integration.gateway.test_gateway_process import KEY, Running, World

SIZE = 1 << 30
PIECE = b"x" * (1 << 18)


def endpoints(tmp_path: Path) -> list[Endpoint]:
    """All that tracker and registry serve of MLflow's API, from the tables by which they serve it."""
    common: dict[str, Any] = {"database_url": "postgresql+asyncpg://nobody:x@127.0.0.1:9/none", "kafka_bootstrap": "127.0.0.1:9"}
    components = [
        *tracker.bootstrap.build(TrackerSettings(run_token_secret="0123456789abcdef", state_dir=tmp_path / "t", **common)),  # type: ignore[arg-type]  # pydantic makes it a secret
        *registry.bootstrap.build(RegistrySettings(**common)),
    ]
    return [endpoint for component in components if hasattr(component, "http") for endpoint in component.http.endpoints]


class Store:
    """Stands for the tracker: takes and gives a gigabyte, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.taken = 0
        self.digest = hashlib.sha256()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        more = True
        while more:
            message = await receive()
            piece = message.get("body", b"")
            self.taken += len(piece)
            self.digest.update(piece)
            more = message.get("more_body", False)
        given = SIZE if scope["method"] == "GET" else 0
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % given)]})
        for _ in range(given // len(PIECE)):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def store() -> AsyncIterator[tuple[Store, str]]:
    one = Store()
    server = HttpServer(one, "127.0.0.1:0", grace_s=1)
    await server.start()
    yield one, f"127.0.0.1:{next(iter(server.listening().values()))}"
    await server.stop()


@pytest.fixture
async def running(store: tuple[Store, str], tmp_path: Path) -> AsyncIterator[Running]:
    """A gateway without Kafka, which knows one key by its file of the last start."""
    key = registry_pb.AccessChanged(key_id="k", revision=1, hash=hashlib.sha256(KEY.encode()).hexdigest(), subject="s")
    state = StateFile(tmp_path / "state", "0")
    state.put("key", "k", key.SerializeToString())
    state.write(state.snapshot())
    world = World("127.0.0.1:9", "", "127.0.0.1:9", tmp_path)
    async with world.gateway(TRACKER_HTTP=store[1], REGISTRY_HTTP=store[1]) as gateway:
        yield gateway
    await world.broker.close()


async def test_no_route_answers_without_credentials(running: Running, store: tuple[Store, str], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{running.port}"
    routes = endpoints(tmp_path)
    assert len({endpoint.path for endpoint in routes}) > 50
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        for endpoint in routes:
            path = endpoint.path.replace("{", "").replace("}", "").replace(":path", "")
            for method in endpoint.methods:
                for place in (path, f"/mlflow{path}"):
                    for headers in ({}, {"authorization": "Bearer hr_unknown"}, {"cookie": "headrace_session=a.9999999999.b"}):
                        answer = await http.request(method, f"{url}{place}", headers=headers)
                        assert (answer.status_code, answer.json()["error_code"]) == (401, "UNAUTHENTICATED"), (method, place, headers)
    assert store[0].asked == 0


async def test_every_route_passes_with_a_key(running: Running, store: tuple[Store, str], tmp_path: Path) -> None:
    """Else the test above would hold for a door that lets nobody in."""
    paths = sorted({endpoint.path for endpoint in endpoints(tmp_path)})
    for path in paths:
        plain = path.replace("{", "").replace("}", "").replace(":path", "")
        answer = await running.client.post(f"http://127.0.0.1:{running.port}{plain}", content=b"{}")
        assert answer.status_code == 200, path
    assert store[0].asked == len(paths)


def peak(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024


async def test_a_gigabyte_each_way_takes_the_memory_of_a_piece(running: Running, store: tuple[Store, str]) -> None:
    url = f"http://127.0.0.1:{running.port}/api/2.0/mlflow-artifacts/artifacts/0/r/artifacts/a"

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(SIZE // len(PIECE)):
            yield PIECE

    assert (await running.client.put(url, content=b"small")).status_code == 200
    store[0].taken, store[0].digest = 0, hashlib.sha256()
    before = peak(running.process.pid)
    answer = await running.client.put(url, content=pieces(), headers={"content-length": str(SIZE)})
    assert answer.status_code == 200
    whole = hashlib.sha256()
    for _ in range(SIZE // len(PIECE)):
        whole.update(PIECE)
    assert (store[0].taken, store[0].digest.hexdigest()) == (SIZE, whole.hexdigest())
    got = 0
    async with running.client.stream("GET", url) as stream:
        async for piece in stream.aiter_raw():
            got += len(piece)
    assert got == SIZE
    assert peak(running.process.pid) - before < 32 << 20
