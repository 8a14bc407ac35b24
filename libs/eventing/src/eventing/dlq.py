"""Dead letters: the events that a consumer parked, seen and dealt with in the consumer's own service.

A replay applies the parked events of one key in order, one transaction each. The key is free again in the transaction that finds nothing
parked; until then the consumer goes on parking behind.
"""

# ruff: noqa: S608 - the one thing put into statements is the schema's name, which `schema.tables` has checked

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from servicekit.errors import NotFound
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from eventing.broker import Fetched, Partition
from eventing.consumer import Consumer
from eventing.envelope import Headers
from eventing.records import unpack_headers
from eventing.schema import tables


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One parked event. `payload` and `headers` are as they arrived."""

    consumer: str
    topic: str
    key: str
    sequence: int
    partition: int
    offset: int
    cluster_id: str
    event_id: str
    type: str
    headers: Headers
    payload: bytes
    reason: str
    attempts: int
    parked_at: datetime


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay came to: `reason` says why it stopped when events remain."""

    applied: int
    remaining: int
    reason: str = ""


class DeadLetters:
    """The dead letters of one service's consumers."""

    def __init__(self, engine: AsyncEngine, schema: str, consumers: Sequence[Consumer]) -> None:
        self._engine = engine
        self._consumers = {consumer.name: consumer for consumer in consumers}
        name = tables(schema).schema
        self._parked = f"{name}.parked_event"
        self._keys = f"{name}.consumer_key"
        self._columns = (
            'consumer, topic, key, sequence, partition, "offset", cluster_id, event_id, type, headers, payload, reason, attempts, parked_at'
        )

    async def list(self, consumer: str = "", limit: int = 1000) -> list[DeadLetter]:
        """Parked events, oldest first; of one consumer, or of all. Changes nothing."""
        statement = f"SELECT {self._columns} FROM {self._parked} WHERE ($1::text = '' OR consumer = $1) ORDER BY id LIMIT $2"
        async with self._engine.connect() as conn:
            rows = await conn.exec_driver_sql(statement, (consumer, limit))
            return [_letter(row) for row in rows]

    async def get(self, consumer: str, topic: str, key: str, sequence: int) -> DeadLetter:
        """One parked event. Raises NotFound. Changes nothing."""
        statement = f"SELECT {self._columns} FROM {self._parked} WHERE consumer = $1 AND topic = $2 AND key = $3 AND sequence = $4"
        async with self._engine.connect() as conn:
            row = (await conn.exec_driver_sql(statement, (consumer, topic, key, sequence))).first()
        if row is None:
            raise NotFound(f"consumer {consumer} has no parked event {sequence} of {topic} {key}")
        return _letter(row)

    async def replay(self, consumer: str, topic: str, key: str) -> Replayed:
        """Applies the parked events of a key in order, each in a transaction of its own; stops at the first that fails as Invalid again.

        Raises NotFound if this service has no such consumer, and whatever else a handler raises (that event stays parked). May be repeated.
        """
        applied = 0
        while True:
            step = await self._replay_one(self._consumer(consumer), topic, key)
            if step.applied == 0:
                return Replayed(applied, step.remaining, step.reason)
            applied += 1
            self._consumer(consumer).outbox.committed()
            if step.remaining == 0:
                return Replayed(applied, 0)

    async def drop(self, consumer: str, topic: str, key: str, sequence: int) -> DeadLetter:
        """Forgets one parked event, whose effect then never happens, and returns it. Raises NotFound."""
        self._consumer(consumer)
        letter = await self.get(consumer, topic, key, sequence)
        async with self._engine.begin() as conn:
            await self._lock(conn, consumer, topic, key)
            statement = f"DELETE FROM {self._parked} WHERE consumer = $1 AND topic = $2 AND key = $3 AND sequence = $4"
            await conn.exec_driver_sql(statement, (consumer, topic, key, sequence))
            await self._free(conn, consumer, topic, key)
        return letter

    def _consumer(self, name: str) -> Consumer:
        try:
            return self._consumers[name]
        except KeyError:
            raise NotFound(f"this service has no consumer {name!r}; it has {', '.join(sorted(self._consumers)) or 'none'}") from None

    async def _replay_one(self, consumer: Consumer, topic: str, key: str) -> Replayed:
        async with self._engine.begin() as conn:
            await self._lock(conn, consumer.name, topic, key)
            statement = (
                f"SELECT {self._columns} FROM {self._parked} WHERE consumer = $1 AND topic = $2 AND key = $3"
                " ORDER BY sequence LIMIT 1 FOR UPDATE"
            )
            row = (await conn.exec_driver_sql(statement, (consumer.name, topic, key))).first()
            if row is None:
                await self._free(conn, consumer.name, topic, key)
                return Replayed(0, 0)
            letter = _letter(row)
            reason = await consumer.inbox.replay(conn, _record(letter), topic, letter.cluster_id)
            where = (consumer.name, topic, key, letter.sequence)
            if reason is not None:
                statement = (
                    f"UPDATE {self._parked} SET reason = $5, attempts = attempts + 1"
                    " WHERE consumer = $1 AND topic = $2 AND key = $3 AND sequence = $4"
                )
                await conn.exec_driver_sql(statement, (*where, reason))
                return Replayed(0, await self._count(conn, consumer.name, topic, key), reason)
            statement = f"DELETE FROM {self._parked} WHERE consumer = $1 AND topic = $2 AND key = $3 AND sequence = $4"
            await conn.exec_driver_sql(statement, where)
            return Replayed(1, await self._free(conn, consumer.name, topic, key))

    async def _lock(self, conn: AsyncConnection, consumer: str, topic: str, key: str) -> None:
        """Keeps the consumer, and other replays, off this key until the transaction ends."""
        statement = f"SELECT FROM {self._keys} WHERE consumer = $1 AND topic = $2 AND key = $3 FOR UPDATE"
        await conn.exec_driver_sql(statement, (consumer, topic, key))

    async def _free(self, conn: AsyncConnection, consumer: str, topic: str, key: str) -> int:
        """Frees the key if nothing of it is parked; returns how many are."""
        remaining = await self._count(conn, consumer, topic, key)
        if remaining == 0:
            statement = f"UPDATE {self._keys} SET parked = false WHERE consumer = $1 AND topic = $2 AND key = $3"
            await conn.exec_driver_sql(statement, (consumer, topic, key))
        return remaining

    async def _count(self, conn: AsyncConnection, consumer: str, topic: str, key: str) -> int:
        statement = f"SELECT count(*) FROM {self._parked} WHERE consumer = $1 AND topic = $2 AND key = $3"
        return int((await conn.exec_driver_sql(statement, (consumer, topic, key))).scalar_one())


def _letter(row: Any) -> DeadLetter:
    values = dict(row._mapping)
    return DeadLetter(**{**values, "headers": unpack_headers(values["headers"])})


def _record(letter: DeadLetter) -> Fetched:
    return Fetched(Partition(letter.topic, letter.partition), letter.offset, letter.key.encode(), letter.payload, letter.headers, 0)
