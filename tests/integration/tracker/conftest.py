"""A tracker's store and use cases on a fresh database, and the whole tracker in this process behind its ports and the gateway's door."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from contracts.tracker.v1 import service_pb2_grpc
from eventing import schema as eventing_schema
from eventing.outbox import Outbox
from gateway.access import AccessTable
from gateway.browser import Hosts
from gateway.mlflow import DoorLimits, MlflowDoor
from gateway.sessions import Sessions
from pydantic import SecretStr
from servicekit import access, db, migrate, rpc, runtoken
from servicekit.access import Caller
from servicekit.clock import SystemClock, SystemIds
from servicekit.errors import Unauthenticated
from servicekit.http import HttpServer
from servicekit.rest import Endpoint
from servicekit.settings import ServiceSettings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from tracker import bootstrap
from tracker.adapters.store import SqlStore
from tracker.adapters.tables import SCHEMA
from tracker.amendments import Amendments
from tracker.entrypoints.translate import EventEncoder
from tracker.experiments import Experiments
from tracker.handlers import Tracker
from tracker.settings import TrackerSettings

SECRET = "a secret of the tests"


@dataclass(frozen=True)
class Stored:
    """The use cases on a real database, without Kafka or an object store."""

    experiments: Experiments
    tracker: Tracker
    amendments: Amendments
    store: SqlStore
    engine: AsyncEngine

    async def rows(self, statement: str, **values: Any) -> list[Any]:
        async with self.engine.begin() as conn:
            return list(await conn.execute(text(statement), values))

    async def events(self, run_id: str) -> list[Any]:
        """What the outbox holds for a run, in order."""
        return await self.rows("SELECT type, sequence, payload FROM tracker.outbox WHERE key = :run_id ORDER BY id", run_id=run_id)


@pytest.fixture
async def stored(database: Any) -> AsyncIterator[Stored]:
    await migrate.upgrade(database.sqlalchemy, SCHEMA, bootstrap.MIGRATIONS)
    engine = db.create_engine(database.sqlalchemy)
    clock, ids = SystemClock(), SystemIds()
    store = SqlStore(engine, Outbox(eventing_schema.tables(SCHEMA)), EventEncoder(clock, ids))
    tracker = Tracker(store, clock, ids, token_secret=SECRET, token_ttl=timedelta(hours=1))
    yield Stored(Experiments(store, clock), tracker, Amendments(store, clock), store, engine)
    await engine.dispose()


@dataclass(frozen=True)
class Running:
    """A tracker that serves; `stub(service)` calls it as that service. `http` is its HTTP address, `endpoints` what is served there,
    `tokens` are those of services."""

    stub: Callable[[str], service_pb2_grpc.TrackerServiceStub]
    http: str
    endpoints: Sequence[Endpoint]
    tokens: dict[str, str]
    settings: TrackerSettings
    database: Any
    topic_prefix: str


@pytest.fixture
async def running(database: Any, stack_servers: Any, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Running]:
    start, stop = _starter(database, stack_servers, topic_prefix, tmp_path / "state")
    try:
        yield await start()
    finally:
        await stop()


def _starter(
    database: Any, stack_servers: Any, topic_prefix: str, state_dir: Path
) -> tuple[Callable[[], Awaitable[Running]], Callable[[], Awaitable[None]]]:
    stack = contextlib.AsyncExitStack()
    tokens = {name: access.new_service_token(name) for name in ("gateway", "trainer", "evaluator", "mallory")}
    hashes = ",".join(f"{name}={tokens[name][1]}" for name in ("gateway", "trainer", "evaluator"))
    s3 = stack_servers.s3
    settings = TrackerSettings(
        database_url=database.sqlalchemy,
        kafka_bootstrap=stack_servers.kafka,
        topic_prefix=topic_prefix,
        service_token_hashes=hashes,
        s3_endpoint=s3.endpoint,
        s3_access_key=s3.access_key,
        s3_secret_key=s3.secret_key,
        s3_bucket=s3.bucket,
        run_token_secret=SecretStr(SECRET),
        lease_check_s=0.1,
        lease_grace_s=0,
        state_dir=state_dir,
    )

    async def start() -> Running:
        await migrate.upgrade(settings.database_url, SCHEMA, bootstrap.MIGRATIONS)
        ports: dict[str, int] = {}
        endpoints: list[Endpoint] = []
        for component in bootstrap.build(settings):
            await component.start()
            stack.push_async_callback(component.stop)
            ports.update(getattr(component, "listening", dict)())
            if hasattr(component, "http"):
                server = HttpServer(component.http, "127.0.0.1:0")
                await server.start()
                stack.push_async_callback(server.stop)
                ports.update(server.listening())
                endpoints.extend(component.http.endpoints)

        def stub(service: str) -> service_pb2_grpc.TrackerServiceStub:
            channel = rpc.channel(f"127.0.0.1:{ports['grpc']}", ServiceSettings(service_token=SecretStr(tokens[service][0])))
            stack.push_async_callback(channel.close)
            return service_pb2_grpc.TrackerServiceStub(channel)

        secrets = {name: secret for name, (secret, _) in tokens.items()}
        return Running(stub, f"127.0.0.1:{ports['http']}", endpoints, secrets, settings, database, topic_prefix)

    return start, stack.aclose


PEOPLE = {
    "key-of-ada": Caller("gateway", "ada", frozenset({"editor"})),
    "key-of-bob": Caller("gateway", "bob", frozenset({"editor"})),
    "key-of-vic": Caller("gateway", "vic", frozenset({"viewer"})),
    "key-of-nobody": Caller("gateway", "nobody", frozenset()),
}


def caller_of(key: str) -> Caller:
    """What the gateway makes of an API key or a run token."""
    if key.startswith(runtoken.PREFIX):
        told = runtoken.verify(SECRET, key, SystemClock().now())
        return Caller("gateway", f"run:{told.run_id}", frozenset(), told.run_id, told.fencing_token)
    if key not in PEOPLE:
        raise Unauthenticated("this API key is not known")
    return PEOPLE[key]


@dataclass(frozen=True)
class Door:
    """The gateway's door to MLflow's API with a tracker behind it. Keys are `key-of-ada` and `-bob` (editors), `-vic` (viewer)."""

    url: str
    running: Running
    client: httpx.AsyncClient

    async def call(self, method: str, path: str, body: Any = None, key: str = "key-of-ada", **query: Any) -> httpx.Response:
        """`path` below /api/2.0/mlflow; a `body` of bytes goes as it is."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {key}"} | ({"content-type": "application/json"} if body is not None else {})
        return await self.client.request(method, f"/api/2.0/mlflow{path}", content=content, params=query, headers=headers)

    async def post(self, path: str, body: Any, key: str = "key-of-ada") -> Any:
        """The answer to a request that succeeds."""
        answer = await self.call("POST", path, body, key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def run(self, run_id: str) -> Any:
        answer = await self.call("GET", "/runs/get", run_id=run_id)
        assert answer.status_code == 200, answer.text
        return answer.json()["run"]

    async def refused(self, path: str, body: Any, key: str = "key-of-ada") -> tuple[int, str, str]:
        """Status, code and message of the answer to a request that fails."""
        answer = await self.call("POST", path, body, key)
        assert answer.status_code >= 400, answer.text
        told = answer.json()
        assert set(told) == {"error_code", "message"}
        return answer.status_code, told["error_code"], told["message"]


@pytest.fixture
async def door(running: Running) -> AsyncIterator[Door]:
    sessions = Sessions(AccessTable(), b"a secret of sessions", 60)
    limits = DoorLimits(upload_bytes=1 << 40, body_bytes=64 * 1024 * 1024)
    entrance = MlflowDoor(
        caller_of,
        sessions,
        Hosts(""),
        None,
        limits,
        tracker=running.http,
        registry="127.0.0.1:9",
        service_token=running.tokens["gateway"],
    )
    server = HttpServer(entrance, "127.0.0.1:0")
    await server.start()
    url = f"http://127.0.0.1:{server.listening()['http']}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield Door(url, running, client)
    await server.stop()
    await entrance.close()


@pytest.fixture
def editor() -> Caller:
    return Caller("gateway", "ada", frozenset({"editor"}))


@pytest.fixture
def trainer() -> Caller:
    return Caller("trainer")
