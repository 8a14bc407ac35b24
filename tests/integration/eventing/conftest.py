"""A small service on real servers: a schema with eventing's tables, a counter per key to take sequences from, and a table of effects."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from eventing import schema, topics
from eventing.consumer import Consumer, Handler
from eventing.envelope import Event, Received
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from servicekit.errors import Invalid
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

DEADLINE_S = 30.0


class Service:
    """One service of a test: what it writes through, and makers of its relays and consumers, which are stopped at the test's end."""

    def __init__(self, url: str, name: str, broker: KafkaBroker, prefix: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.name = name
        self.broker = broker
        self.prefix = prefix
        self.engine: AsyncEngine = create_async_engine(url, pool_size=5)
        self.tables = schema.tables(name)
        self.outbox = Outbox(self.tables)
        self._stack = stack

    async def create(self) -> None:
        async with self.engine.begin() as conn:
            await conn.execute(text(f"CREATE SCHEMA {self.name}"))
            await conn.run_sync(lambda sync: schema.create(sync, self.name))
            await conn.execute(text(f"CREATE TABLE {self.name}.counter (key text PRIMARY KEY, sequence bigint NOT NULL)"))
            await conn.execute(text(f"CREATE TABLE {self.name}.effect (id bigserial, key text, sequence bigint, type text, payload bytea)"))

    async def emit(
        self, key: str, type: str = "run.finished", payload: bytes = b"x", topic: str = topics.RUNS, must_understand: bool = False
    ) -> int:
        """One business transaction: count up the key under its lock, write the event. Returns the sequence."""
        async with self.engine.begin() as conn:
            statement = (
                f"INSERT INTO {self.name}.counter VALUES (:key, 1) ON CONFLICT (key) DO UPDATE SET sequence = counter.sequence + 1"
                " RETURNING sequence"
            )
            sequence = (await conn.execute(text(statement), {"key": f"{topic}/{key}"})).scalar_one()
            event = Event(type, topic, key, sequence, payload, uuid.uuid4(), datetime.now(UTC), must_understand=must_understand)
            await self.outbox.append(conn, [event])
        self.outbox.committed()
        return int(sequence)

    async def apply(self, conn: AsyncConnection, event: Received) -> None:
        """The handler of these tests: one row per event. A payload that begins with "broken" is invalid."""
        if event.payload.startswith(b"broken"):
            raise Invalid("the payload is broken")
        await conn.exec_driver_sql(
            f"INSERT INTO {self.name}.effect (key, sequence, type, payload) VALUES ($1, $2, $3, $4)",
            (event.key, event.sequence, event.type, event.payload),
        )

    async def relay(self, **options: Any) -> Relay:
        relay = Relay(self.url, self.name, self.broker, f"/test/{self.name}", self.prefix, outbox=self.outbox, **options)
        await relay.start()
        self._stack.push_async_callback(relay.stop)
        return relay

    def consumer(
        self,
        handlers: Mapping[str, Handler] | None = None,
        name: str = "reader",
        consumes: Sequence[str] = (topics.RUNS,),
        **options: Any,
    ) -> Consumer:
        """A consumer that is not started yet."""
        handlers = {"run.finished": self.apply} if handlers is None else handlers
        broker = options.pop("broker", self.broker)
        consumer = Consumer(self.engine, self.name, broker, name, consumes, handlers, self.prefix, self.outbox, **options)
        self._stack.push_async_callback(consumer.stop)
        return consumer

    async def consume(self, *args: Any, **options: Any) -> Consumer:
        """A consumer that runs."""
        consumer = self.consumer(*args, **options)
        await consumer.start()
        return consumer

    async def rows(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        async with self.engine.connect() as conn:
            return [tuple(row) for row in await conn.execute(text(statement.format(s=self.name)), values)]

    async def scalar(self, statement: str, **values: Any) -> Any:
        return (await self.rows(statement, **values))[0][0]

    async def effects(self, key: str) -> list[int]:
        """The sequences applied to a key, in the order in which they were applied."""
        return [row[0] for row in await self.rows("SELECT sequence FROM {s}.effect WHERE key = :key ORDER BY id", key=key)]


async def eventually(condition: Callable[[], Awaitable[Any]], wanted: Any = True, deadline_s: float = DEADLINE_S) -> None:
    """Waits until an asynchronous question is answered as wanted; fails with the last answer at the deadline."""
    answer = None
    try:
        async with asyncio.timeout(deadline_s):
            while (answer := await condition()) != wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"after {deadline_s:g} s it is {answer!r}, not {wanted!r}")


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    return eventually


@pytest.fixture
async def cleanup() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def make_service(cleanup: AsyncExitStack) -> Callable[..., Awaitable[Service]]:
    """Makes a service on given servers."""

    async def make(url: str, bootstrap: str, prefix: str = "", name: str = "alpha", **options: Any) -> Service:
        broker = KafkaBroker(bootstrap, f"test-{name}", **options)
        service = Service(url, name, broker, prefix, cleanup)
        cleanup.push_async_callback(service.engine.dispose)
        cleanup.push_async_callback(broker.close)
        await service.create()
        return service

    return make


@pytest.fixture
async def service(database: Any, stack_servers: Any, topic_prefix: str, make_service: Callable[..., Awaitable[Service]]) -> Service:
    """A service on the servers of this run."""
    return await make_service(database.sqlalchemy, stack_servers.kafka, topic_prefix)
