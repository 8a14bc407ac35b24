"""The outbox: events are written in the transaction that makes them true, and published after it has committed.

Take the key's next sequence from the aggregate's row while that row is locked, and append before the transaction ends: then the
order of the rows is the order of the key.
"""

# ruff: noqa: S608 - the one thing put into statements is the schema's name, which `schema.tables` has checked

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from servicekit.errors import Invalid, TooLarge
from sqlalchemy.ext.asyncio import AsyncConnection

from eventing import topics, tracing
from eventing.envelope import Event
from eventing.schema import Tables

_MAX_NAMES = 4000
"""Keeps the headers small beside the payload: a record that the broker refuses would hold up the whole outbox."""

_COLUMNS = "shard, topic, key, sequence, event_id, type, subject, traceparent, must_understand, time, payload"


class Outbox:
    """Appends events to the outbox table of one schema. One object per process and schema, shared by all who write."""

    def __init__(self, tables: Tables, max_payload: int = 900_000, shards: int = 1) -> None:
        """`max_payload` in bytes: below the broker's limit for a record, with room for headers. `shards` is the number of relay
        shards of the schema, and may only be changed while the outbox is empty."""
        self._max_payload = max_payload
        self._shards = shards
        self._wakers: list[Callable[[], None]] = []
        one = ", ".join(f"${n}" for n in range(1, 12))
        self._insert_one = f"INSERT INTO {tables.schema}.outbox ({_COLUMNS}) VALUES ({one})"
        arrays = "$1::int2[], $2::text[], $3::text[], $4::int8[], $5::uuid[], $6::text[], $7::text[], $8::text[], $9::bool[], "
        arrays += "$10::timestamptz[], $11::bytea[]"
        # ORDER BY keeps the ids in the order of the list.
        self._insert_many = (
            f"INSERT INTO {tables.schema}.outbox ({_COLUMNS}) SELECT {_COLUMNS} FROM unnest({arrays})"
            f" WITH ORDINALITY AS new ({_COLUMNS}, position) ORDER BY position"
        )

    async def append(self, conn: AsyncConnection, events: Sequence[Event]) -> None:
        """Writes events in the caller's transaction, in their order. Call `committed` when it has committed.

        Raises Invalid for an unknown or best-effort topic, an empty key or a sequence below 1, TooLarge for a payload over the limit
        or names of more than 4,000 characters, and what the database raises: a sequence that was used before is an IntegrityError,
        a bug of the caller.
        """
        if not events:
            return
        rows = [self._row(event) for event in events]
        if len(rows) == 1:
            await conn.exec_driver_sql(self._insert_one, rows[0])
        else:
            await conn.exec_driver_sql(self._insert_many, tuple(list(column) for column in zip(*rows, strict=True)))

    def committed(self) -> None:
        """Wakes the relay of this process, after a transaction with events has committed. Costs nothing; forgetting it costs
        latency (up to the relay's poll), never an event."""
        for wake in self._wakers:
            wake()

    def on_committed(self, wake: Callable[[], None]) -> None:
        """Registers a relay to be woken."""
        self._wakers.append(wake)

    def _row(self, event: Event) -> tuple[object, ...]:
        notice = topics.is_dead_letters(event.topic)
        if not notice:
            topics.durable(event.topic)
        if not event.key:
            raise Invalid(f"an event of {event.topic} needs a key")
        if len(event.key) + len(event.subject) + len(event.type) > _MAX_NAMES:
            raise TooLarge(f"key, subject and type of an event of {event.topic} have more than {_MAX_NAMES} characters together")
        if event.sequence < 1 and not notice:
            raise Invalid(f"sequence {event.sequence} of {event.type} {event.key}: a key counts from 1")
        if len(event.payload) > self._max_payload:
            raise TooLarge(f"the payload of {event.type} {event.key} has {len(event.payload)} bytes, the limit is {self._max_payload}")
        shard = zlib.crc32(event.key.encode()) % self._shards
        return (
            shard,
            event.topic,
            event.key,
            event.sequence,
            event.id,
            event.type,
            event.subject,
            event.traceparent or tracing.current_traceparent(),
            event.must_understand,
            event.time,
            event.payload,
        )
