"""What the crash test runs and kills: one process per role, each as a service would be composed, of nothing but eventing's own parts.

Service `alpha` writes events to its outbox (writer) and publishes them (relay). Service `beta` applies them (consumer): one effect row per
event, and one event of its own in the same transaction, which its relay publishes. `alpha` applies those in turn (echo). So every promise
is at stake twice: events of the outbox, and events made by handlers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eventing import topics
from eventing.background import Background
from eventing.consumer import Consumer
from eventing.envelope import Event, Received
from eventing.faults import passes
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from eventing.schema import tables
from servicekit import db
from servicekit.errors import Invalid, Transient
from sqlalchemy.ext.asyncio import AsyncConnection

KEYS = 40
WRITERS = 6
PAUSE_S = 0.02
BREAKING_KEYS = 8
"""So many of the keys have broken payloads now and then; they end parked. The others are delivered however long the test lasts."""

BROKEN_ONE_IN = 300
TRANSIENT_ONE_IN = 400
SETUP = """
CREATE TABLE alpha.counter (key text PRIMARY KEY, sequence bigint NOT NULL);
CREATE TABLE alpha.echo (id bigserial PRIMARY KEY, key text NOT NULL, sequence bigint NOT NULL, payload text NOT NULL);
CREATE TABLE beta.counter (key text PRIMARY KEY, sequence bigint NOT NULL);
CREATE TABLE beta.effect (id bigserial PRIMARY KEY, key text NOT NULL, sequence bigint NOT NULL);
"""
"""Tables of the two services, beside eventing's. Nothing in them forbids a doubled or disordered row: the test is to see it."""

_NEXT = (
    "INSERT INTO {schema}.counter AS held VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET sequence = held.sequence + $2 RETURNING sequence"
)


async def take(conn: AsyncConnection, schema: str, key: str, count: int = 1) -> int:
    """The key's next sequences, under the lock of its row; returns the last of `count`."""
    return int((await conn.exec_driver_sql(_NEXT.format(schema=schema), (key, count))).scalar_one())


class Effects:
    """The handler of `beta`: an effect row, and an event that says so. `strict` refuses broken payloads, as a buggy version would."""

    def __init__(self, outbox: Outbox, strict: bool = True) -> None:
        self._outbox = outbox
        self._strict = strict
        self._random = random.Random()

    async def apply(self, conn: AsyncConnection, event: Received) -> None:
        await conn.exec_driver_sql("INSERT INTO beta.effect (key, sequence) VALUES ($1, $2)", (event.key, event.sequence))
        if self._strict and self._random.randrange(TRANSIENT_ONE_IN) == 0:
            raise Transient("a passing trouble")
        if self._strict and event.payload == b"broken":
            raise Invalid("the payload is broken")
        sequence = await take(conn, "beta", event.key)
        text = str(event.sequence).encode()
        await self._outbox.append(
            conn, [Event("model.promoted", topics.MODELS, event.key, sequence, text, uuid.uuid4(), datetime.now(UTC))]
        )


async def apply_echo(conn: AsyncConnection, event: Received) -> None:
    """The handler of `alpha`."""
    await conn.exec_driver_sql(
        "INSERT INTO alpha.echo (key, sequence, payload) VALUES ($1, $2, $3)", (event.key, event.sequence, event.payload.decode())
    )


class Writer(Background):
    """Business transactions of `alpha`, as many as the machine bears and whatever happens to the database."""

    def __init__(self, url: str) -> None:
        super().__init__("writer")
        self._engine = db.create_engine(url, pool_size=WRITERS)
        self._outbox = Outbox(tables("alpha"))
        self._random = random.Random()

    async def _run(self) -> None:
        await asyncio.gather(*(self._write() for _ in range(WRITERS)))
        await self._engine.dispose()

    async def _write(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._transaction()
            except Exception as exc:
                if not passes(exc):
                    raise
                await self._pause(0.1)
            await self._pause(self._random.uniform(0, 2 * PAUSE_S))

    async def _transaction(self) -> None:
        which = self._random.randrange(KEYS)
        key = f"key-{which}"
        count = self._random.choice((1, 1, 1, 3))
        async with self._engine.begin() as conn:
            last = await take(conn, "alpha", key, count)
            breaks = which < BREAKING_KEYS
            payloads = [b"broken" if breaks and self._random.randrange(BROKEN_ONE_IN) == 0 else b"fine" for _ in range(count)]
            numbers = range(last - count + 1, last + 1)
            await self._outbox.append(
                conn,
                [
                    Event("run.finished", topics.RUNS, key, number, payload, uuid.uuid4(), datetime.now(UTC))
                    for number, payload in zip(numbers, payloads, strict=True)
                ],
            )


def compose(role: str, url: str, bootstrap: str) -> list[Background]:
    """The components of one process."""
    broker = KafkaBroker(bootstrap, role, session_timeout_s=2.0, request_timeout_s=5.0)
    if role == "writer":
        return [Writer(url)]
    if role == "relay":
        return [Relay(url, "alpha", broker, "/test/alpha")]
    engine = db.create_engine(url, pool_size=3)
    if role == "consumer":
        outbox = Outbox(tables("beta"))
        effects = Effects(outbox)
        consumer = Consumer(
            engine, "beta", broker, "beta", [topics.RUNS], {"run.finished": effects.apply}, outbox=outbox, max_backoff_s=1.0
        )
        return [consumer, Relay(url, "beta", broker, "/test/beta", outbox=outbox)]
    if role == "echo":
        return [Consumer(engine, "alpha", broker, "echo", [topics.MODELS], {"model.promoted": apply_echo}, max_backoff_s=1.0)]
    raise ValueError(f"no role {role}")


def say_up(path: str) -> None:
    """Tells the test that this process listens to signals."""
    Path(path).write_text(str(os.getpid()))


async def main(job: dict[str, Any]) -> None:
    """Runs one role until SIGTERM, or until a component fails: then the process ends with an error."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    say_up(job["up"])
    components = compose(job["role"], job["url"], job["bootstrap"])
    for component in components:
        await component.start()
    ends = {asyncio.create_task(told.wait()), *(asyncio.create_task(component.wait()) for component in components)}
    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for component in reversed(components):
        await component.stop()
    for task in done:
        task.result()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    asyncio.run(main(json.loads(sys.argv[1])))
