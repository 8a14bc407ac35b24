"""The inbox: applies a batch of events to the database exactly once, in one transaction.

In that transaction: compare-and-set of the consumer's own offset rows (a process that lost its partition, and does not know yet, fails
here); compare-and-set of the last sequence of every key (drops what was applied before, shows a gap); the handlers' effects and the
events they make; events that cannot be applied are parked, and later ones of their key behind them.
"""

# ruff: noqa: S608 - the one thing put into statements is the schema's name, which `schema.tables` has checked

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from contracts.eventing.v1 import events_pb2
from google.protobuf.message import DecodeError
from servicekit.clock import Clock, Ids
from servicekit.errors import Invalid
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from eventing import topics
from eventing.broker import Fetched, Partition, WrongCluster
from eventing.envelope import Event, Received
from eventing.outbox import Outbox
from eventing.records import pack_headers, receive
from eventing.schema import tables
from eventing.tracing import BatchTracing, Tracing

Handler = Callable[[AsyncConnection, Received], Awaitable[None]]
"""Applies one event: all effects and new outbox rows go through the connection, whose transaction is not the handler's to end.

Raises Invalid (or protobuf's DecodeError) for an event that cannot be applied: it is parked. Raises Transient for what passes: it is
tried again. May run several times for one event, but only one run commits. Anything else it raises stops the consumer."""

NOTICE_TYPE = "event.parked"

_NOT_UNDERSTOOD = "type {} must be understood, and this version does not know it"


class SequenceGap(Exception):
    """An event of a key never arrived: an earlier one is lost, or its producer counts wrongly."""


class LostRace(Exception):
    """Another process has advanced: what this one holds is out of date."""


class HandlerFailed(Exception):
    """A handler raised; the transaction was rolled back."""

    def __init__(self, index: int, cause: Exception) -> None:
        super().__init__(f"event {index} of the batch: {cause!r}")
        self.index = index
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Item:
    """One record of a batch: the event in it, or why it is none."""

    fetched: Fetched
    topic: str
    event: Received | None
    reason: str = ""

    @property
    def key(self) -> str:
        """The event's key. A record that is no event has one of its own, so that it holds up nothing."""
        return self.event.key if self.event is not None else f"!{self.fetched.partition.number}:{self.fetched.offset}"

    @property
    def sequence(self) -> int:
        return self.event.sequence if self.event is not None else self.fetched.offset


@dataclass(slots=True)
class Outcome:
    """What a committed batch came to."""

    applied: int = 0
    duplicates: int = 0
    parked: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Key:
    sequence: int
    parked: bool


def read(fetched: Fetched, topic: str, cluster_id: str) -> Item:
    """Makes an Item of a record: reads its key and envelope. `topic` is without the prefix. Does not raise."""
    try:
        return Item(fetched, topic, receive(fetched, topic, cluster_id))
    except Invalid as exc:
        return Item(fetched, topic, None, f"{exc} (key {fetched.key!r})")


def is_invalid(exc: BaseException) -> bool:
    """Whether an event whose handler raised this is parked."""
    return isinstance(exc, Invalid | DecodeError)


def describe(exc: BaseException) -> str:
    """The reason under which an event is parked: class and message, cut to a readable length."""
    return f"{type(exc).__name__}: {exc}"[:500]


class Inbox:
    """The transactional half of one consumer."""

    def __init__(
        self,
        engine: AsyncEngine,
        schema: str,
        consumer: str,
        prefix: str,
        handlers: Mapping[str, Handler],
        outbox: Outbox,
        clock: Clock,
        ids: Ids,
        tracing: Tracing,
    ) -> None:
        self._engine = engine
        self._consumer = consumer
        self._prefix = prefix
        self.handlers = handlers
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._tracing = tracing
        name = tables(schema).schema
        offset, key, parked = (f"{name}.{table}" for table in ("consumer_offset", "consumer_key", "parked_event"))
        self._add_offsets = (
            f"INSERT INTO {offset} (consumer, topic, partition, next_offset, cluster_id)"
            " SELECT $1, topic, partition, 0, $4 FROM unnest($2::text[], $3::int[]) AS new (topic, partition) ON CONFLICT DO NOTHING"
        )
        self._get_offsets = f"SELECT topic, partition, next_offset, cluster_id FROM {offset} WHERE consumer = $1"
        self._set_offsets = (
            f"UPDATE {offset} AS held SET next_offset = new.next_offset, updated_at = clock_timestamp()"
            " FROM unnest($2::text[], $3::int[], $4::int8[], $5::int8[]) AS new (topic, partition, expected, next_offset)"
            " WHERE held.consumer = $1 AND held.topic = new.topic AND held.partition = new.partition AND held.next_offset = new.expected"
        )
        self._get_keys = (
            f"SELECT topic, key, sequence, parked FROM {key} WHERE consumer = $1"
            " AND (topic, key) IN (SELECT * FROM unnest($2::text[], $3::text[])) ORDER BY topic, key FOR UPDATE"
        )
        arrays = "unnest($2::text[], $3::text[], $4::int8[], $5::int8[], $6::bool[]) AS new (topic, key, expected, sequence, parked)"
        self._set_keys = (
            f"UPDATE {key} AS held SET sequence = new.sequence, parked = new.parked FROM {arrays}"
            " WHERE held.consumer = $1 AND held.topic = new.topic AND held.key = new.key AND held.sequence = new.expected"
        )
        self._add_keys = (
            f"INSERT INTO {key} (consumer, topic, key, sequence, parked) SELECT $1, topic, key, sequence, parked FROM {arrays}"
            " WHERE expected = 0 ON CONFLICT DO NOTHING"
        )
        self._park = (
            f"INSERT INTO {parked}"
            ' (consumer, topic, key, sequence, partition, "offset", cluster_id, event_id, type, headers, payload, reason)'
            " SELECT $1, * FROM unnest($2::text[], $3::text[], $4::int8[], $5::int[], $6::int8[], $7::text[], $8::text[], $9::text[],"
            " $10::bytea[], $11::bytea[], $12::text[])"
        )

    async def positions(self, partitions: Sequence[Partition], cluster_id: str) -> dict[Partition, int]:
        """Where each partition is to be read from; a partition seen for the first time gets its row, at 0.

        Raises WrongCluster if offsets are held that were counted in another cluster.
        """
        names = sorted((partition.topic.removeprefix(self._prefix), partition.number) for partition in partitions)
        async with self._engine.begin() as conn:
            rows = (await conn.exec_driver_sql(self._get_offsets, (self._consumer,))).fetchall()
            for topic, number, _, held in rows:
                if held != cluster_id:
                    raise WrongCluster(
                        f"consumer {self._consumer} stands in cluster {held} ({topic}[{number}]), but the broker is cluster {cluster_id}:"
                        " Kafka was replaced or wiped under a database that was kept"
                    )
            found = {Partition(self._prefix + topic, number): offset for topic, number, offset, _ in rows}
            if any(partition not in found for partition in partitions):
                columns = ([topic for topic, _ in names], [number for _, number in names])
                await conn.exec_driver_sql(self._add_offsets, (self._consumer, *columns, cluster_id))
        return {partition: found.get(partition, 0) for partition in partitions}

    async def held(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Where partitions stand, whoever reads them. Changes nothing."""
        async with self._engine.connect() as conn:
            rows = (await conn.exec_driver_sql(self._get_offsets, (self._consumer,))).fetchall()
        found = {Partition(self._prefix + topic, number): offset for topic, number, offset, _ in rows}
        return {partition: found.get(partition, 0) for partition in partitions}

    async def apply(self, batch: Sequence[Item], positions: Mapping[Partition, int], *, savepoints: bool, cluster_id: str) -> Outcome:
        """Applies a batch in one transaction; `positions` says where each of its partitions stands before it.

        Without savepoints an invalid event raises HandlerFailed like every other failure of a handler; with them it is parked at the
        price of two statements per event. Raises LostRace, SequenceGap, and what the database raises. Nothing happened if it raises,
        except when the connection was lost while committing: then the offsets in the database tell.
        """
        spans = self._tracing.batch([item.event.traceparent for item in batch if item.event is not None])
        with spans.whole(self._consumer):
            async with self._engine.begin() as conn:
                await self._advance(conn, batch, positions)
                keys = await self._keys(conn, batch)
                before = {name: state.sequence for name, state in keys.items()}
                outcome = Outcome()
                parked: list[tuple[Item, str]] = []
                for index, item in enumerate(batch):
                    reason = await self._one(conn, index, item, keys, outcome, savepoints, spans)
                    if reason is not None:
                        parked.append((item, reason))
                changed = {name: state for name, state in keys.items() if state.sequence != before[name]}
                if changed:
                    await self._keep(conn, changed, before)
                if parked:
                    outcome.parked = len(parked)
                    await self._put_away(conn, parked, cluster_id)
        return outcome

    async def replay(self, conn: AsyncConnection, record: Fetched, topic: str, cluster_id: str) -> str | None:
        """Applies one parked event in the caller's transaction; returns the reason if it is invalid still, and None when it is done.

        Touches neither offset nor sequence: the event passed both when it was parked. An event without a handler is done.
        """
        try:
            event = receive(record, topic, cluster_id)
        except Invalid as exc:
            return describe(exc)
        handler = self.handlers.get(event.type)
        if handler is None:
            return _NOT_UNDERSTOOD.format(event.type) if event.must_understand else None
        spans = self._tracing.batch([event.traceparent])
        try:
            with spans.event(self._consumer, event.topic, event.key, str(event.id), event.traceparent):
                async with conn.begin_nested():
                    await handler(conn, event)
        except Exception as exc:
            if not is_invalid(exc):
                raise
            return describe(exc)
        return None

    async def _advance(self, conn: AsyncConnection, batch: Sequence[Item], positions: Mapping[Partition, int]) -> None:
        ends: dict[Partition, int] = {}
        for item in batch:
            ends[item.fetched.partition] = item.fetched.offset + 1
        partitions = sorted(ends)  # in one order everywhere, so that two processes cannot wait for each other
        columns = (
            [partition.topic.removeprefix(self._prefix) for partition in partitions],
            [partition.number for partition in partitions],
            [positions[partition] for partition in partitions],
            [ends[partition] for partition in partitions],
        )
        result = await conn.exec_driver_sql(self._set_offsets, (self._consumer, *columns))
        if result.rowcount != len(partitions):
            raise LostRace(f"consumer {self._consumer}: another process has advanced {', '.join(map(str, partitions))}")

    async def _keys(self, conn: AsyncConnection, batch: Sequence[Item]) -> dict[tuple[str, str], _Key]:
        """The state of every key in the batch, its row locked: a replay of parked events locks it too."""
        names = {(item.topic, item.key): _Key(0, False) for item in batch if item.event is not None}
        if names:
            columns = ([topic for topic, _ in names], [key for _, key in names])
            for topic, key, sequence, parked in await conn.exec_driver_sql(self._get_keys, (self._consumer, *columns)):
                names[topic, key] = _Key(sequence, parked)
        return names

    async def _one(
        self,
        conn: AsyncConnection,
        index: int,
        item: Item,
        keys: Mapping[tuple[str, str], _Key],
        outcome: Outcome,
        savepoints: bool,
        spans: BatchTracing,
    ) -> str | None:
        """Does with one event what is to be done; returns the reason if it is to be parked."""
        event = item.event
        if event is None:
            await self._notify(conn, item, item.reason)
            return item.reason
        state = keys[event.topic, event.key]
        if event.sequence <= state.sequence:
            outcome.duplicates += 1
            return None
        if event.sequence != state.sequence + 1 and not topics.topic(event.topic).compacted:
            gap = SequenceGap(
                f"{event.topic} {event.key}: event {event.sequence} ({event.type}, {event.id}) came after {state.sequence}"
                f" for consumer {self._consumer}: what was between them is lost"
            )
            raise HandlerFailed(index, gap)
        if state.parked:
            state.sequence = event.sequence
            return "waits behind an earlier event of its key"
        handler = self.handlers.get(event.type)
        if handler is None and not event.must_understand:
            state.sequence = event.sequence
            outcome.skipped[event.type] += 1
            return None
        if handler is None:
            reason = _NOT_UNDERSTOOD.format(event.type)
        else:
            try:
                with spans.event(self._consumer, event.topic, event.key, str(event.id), event.traceparent):
                    if savepoints:
                        async with conn.begin_nested():
                            await handler(conn, event)
                    else:
                        await handler(conn, event)
            except Exception as exc:
                if not savepoints or not is_invalid(exc):
                    raise HandlerFailed(index, exc) from exc
                reason = describe(exc)
            else:
                state.sequence = event.sequence
                outcome.applied += 1
                return None
        state.sequence = event.sequence
        state.parked = True
        await self._notify(conn, item, reason)
        return reason

    async def _keep(self, conn: AsyncConnection, changed: Mapping[tuple[str, str], _Key], before: Mapping[tuple[str, str], int]) -> None:
        """Compare-and-set of the keys' last sequences."""
        columns = (
            [topic for topic, _ in changed],
            [key for _, key in changed],
            [before[name] for name in changed],
            [state.sequence for state in changed.values()],
            [state.parked for state in changed.values()],
        )
        new = sum(1 for name in changed if before[name] == 0)
        kept = 0
        if new:
            kept += (await conn.exec_driver_sql(self._add_keys, (self._consumer, *columns))).rowcount
        if new < len(changed):
            kept += (await conn.exec_driver_sql(self._set_keys, (self._consumer, *columns))).rowcount
        if kept != len(changed):
            raise LostRace(f"consumer {self._consumer}: another process has applied events of the same keys")

    async def _put_away(self, conn: AsyncConnection, parked: Sequence[tuple[Item, str]], cluster_id: str) -> None:
        rows = [
            (
                item.topic,
                item.key,
                item.sequence,
                item.fetched.partition.number,
                item.fetched.offset,
                cluster_id,
                str(item.event.id) if item.event is not None else "",
                item.event.type if item.event is not None else "",
                pack_headers(item.fetched.headers),
                item.fetched.value or b"",
                reason,
            )
            for item, reason in parked
        ]
        await conn.exec_driver_sql(self._park, (self._consumer, *(list(column) for column in zip(*rows, strict=True))))

    async def _notify(self, conn: AsyncConnection, item: Item, reason: str) -> None:
        """Tells the dead-letter topic of the event that holds up its key; those behind it are not told of."""
        event = item.event
        notice = events_pb2.EventParked(
            consumer=self._consumer,
            topic=item.topic,
            partition=item.fetched.partition.number,
            offset=item.fetched.offset,
            key=item.key,
            sequence=item.sequence,
            event_id=str(event.id) if event is not None else "",
            event_type=event.type if event is not None else "",
            reason=reason,
        )
        told = Event(
            type=NOTICE_TYPE,
            topic=topics.durable(item.topic).dead_letters,
            key=item.key,
            sequence=0,
            payload=notice.SerializeToString(),
            id=self._ids.uuid7(),
            time=self._clock.now(),
            traceparent=event.traceparent if event is not None else "",
        )
        await self._outbox.append(conn, [told])
