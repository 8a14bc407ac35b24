"""A tracker's store and use cases on a fresh database, and the whole tracker in this process behind its gRPC port."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from contracts.tracker.v1 import service_pb2_grpc
from eventing import schema as eventing_schema
from eventing.outbox import Outbox
from pydantic import SecretStr
from servicekit import access, db, migrate, rpc
from servicekit.access import Caller
from servicekit.clock import SystemClock, SystemIds
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
    """A tracker that serves; `stub(service)` calls it as that service."""

    stub: Callable[[str], service_pb2_grpc.TrackerServiceStub]
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
        for component in bootstrap.build(settings):
            await component.start()
            stack.push_async_callback(component.stop)
            ports.update(getattr(component, "listening", dict)())

        def stub(service: str) -> service_pb2_grpc.TrackerServiceStub:
            channel = rpc.channel(f"127.0.0.1:{ports['grpc']}", ServiceSettings(service_token=SecretStr(tokens[service][0])))
            stack.push_async_callback(channel.close)
            return service_pb2_grpc.TrackerServiceStub(channel)

        return Running(stub, settings, database, topic_prefix)

    return start, stack.aclose


@pytest.fixture
def editor() -> Caller:
    return Caller("gateway", "ada", frozenset({"editor"}))


@pytest.fixture
def trainer() -> Caller:
    return Caller("trainer")
