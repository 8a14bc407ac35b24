"""A small service on a real database: a schema with eventing's tables, a counter per key to take sequences from, a table of effects.

The fixture `service` runs a test twice, on the memory broker and on Kafka; `local` on the memory broker alone.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from eventing import schema, topics
from eventing.broker import Broker
from eventing.consumer import Consumer, Handler
from eventing.envelope import Event, Received
from eventing.kafka import KafkaBroker
from eventing.memory import MemoryBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from servicekit.errors import Invalid
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

DEADLINE_S = 30.0


class Service:
    """One service of a test: what it writes through, and makers of its relays and consumers, which are stopped at the test's end."""

    def __init__(self, url: str, name: str, broker: Broker, prefix: str, stack: AsyncExitStack) -> None:
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
        # Only the topics of these tests: a broker takes a moment for each.
        wanted = {self.prefix + name for topic in (topics.RUNS, topics.MODELS, topics.DELIVERIES) for name in (topic, f"{topic}.dlq")}
        await self.broker.create_topics([spec for spec in topics.specs(self.prefix) if spec.name in wanted])

    async def emit(self, key: str, type: str = "run.finished", payload: bytes = b"x", topic: str = topics.RUNS, **attributes: Any) -> int:
        """One business transaction: count up the key under its lock, write the event. Returns the sequence."""
        async with self.engine.begin() as conn:
            sequence = await self.take(conn, key, topic)
            await self.outbox.append(conn, [self.event(key, sequence, type, payload, topic, **attributes)])
        self.outbox.committed()
        return sequence

    async def take(self, conn: AsyncConnection, key: str, topic: str = topics.RUNS) -> int:
        """The key's next sequence, under the lock of its row."""
        statement = (
            f"INSERT INTO {self.name}.counter AS held VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET sequence = held.sequence + 1"
            " RETURNING sequence"
        )
        return int((await conn.exec_driver_sql(statement, (f"{topic}/{key}",))).scalar_one())

    def event(
        self, key: str, sequence: int, type: str = "run.finished", payload: bytes = b"x", topic: str = topics.RUNS, **attributes: Any
    ) -> Event:
        return Event(type, topic, key, sequence, payload, uuid.uuid4(), datetime.now(UTC), **attributes)

    async def apply(self, conn: AsyncConnection, event: Received) -> None:
        """The handler of these tests: one row per event. A payload that begins with "broken" is invalid."""
        if event.payload.startswith(b"broken"):
            raise Invalid("the payload is broken")
        await conn.exec_driver_sql(
            f"INSERT INTO {self.name}.effect (key, sequence, type, payload) VALUES ($1, $2, $3, $4)",
            (event.key, event.sequence, event.type, event.payload),
        )

    async def relay(self, **options: Any) -> Relay:
        options = {"create_topics": False, "outbox": self.outbox, **options}
        relay = Relay(self.url, self.name, self.broker, f"/test/{self.name}", self.prefix, **options)
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
        options = {"create_topics": False, **options}
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


async def eventually(condition: Callable[[], Any], wanted: Any = True, deadline_s: float = DEADLINE_S) -> None:
    """Waits until a question, asynchronous or not, is answered as wanted; fails with the last answer at the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer == wanted:
            return
        if loop.time() > deadline:
            pytest.fail(f"after {deadline_s:g} s it is {answer!r}, not {wanted!r}")
        await asyncio.sleep(0.02)


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    return eventually


@pytest.fixture
async def cleanup() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def make_service(cleanup: AsyncExitStack) -> Callable[..., Awaitable[Service]]:
    """Makes a service on a given database and broker."""

    async def make(url: str, broker: Broker, prefix: str = "", name: str = "alpha") -> Service:
        service = Service(url, name, broker, prefix, cleanup)
        cleanup.push_async_callback(service.engine.dispose)
        cleanup.push_async_callback(broker.close)
        await service.create()
        return service

    return make


@pytest.fixture(params=["memory", "kafka"])
async def service(request: pytest.FixtureRequest, database: Any, make_service: Callable[..., Awaitable[Service]]) -> Service:
    """A service on both brokers, one after the other."""
    if request.param == "memory":
        return await make_service(database.sqlalchemy, MemoryBroker())
    prefix = request.getfixturevalue("topic_prefix")
    return await make_service(database.sqlalchemy, KafkaBroker(request.getfixturevalue("stack_servers").kafka, "test"), prefix)


@pytest.fixture
async def local(database: Any, make_service: Callable[..., Awaitable[Service]]) -> Service:
    """A service on the memory broker."""
    return await make_service(database.sqlalchemy, MemoryBroker())


class Counters:
    """Reads eventing's metrics as the SDK collected them."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def total(self, name: str, **attributes: Any) -> float:
        """The sum of a counter (or the value of a gauge) over the points that have these attributes."""
        data = self._reader.get_metrics_data()
        found = 0.0
        for resource in data.resource_metrics if data is not None else []:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name == name:
                        for point in metric.data.data_points:
                            if attributes.items() <= dict(point.attributes).items():
                                found += point.value
        return found


@pytest.fixture
def counters(collected: InMemoryMetricReader) -> Counters:
    return Counters(collected)
