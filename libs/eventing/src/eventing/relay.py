"""The relay: publishes the outbox of one schema, in order, at least once. The inboxes make it exactly once.

The outbox is a queue, never a log read by a cursor: ids commit out of order, and a cursor would pass over a row that commits late. One
relay per schema and shard is active: it holds an advisory lock on a direct connection of its own, and reads and marks on that same
connection, so that a relay which lost the lock cannot mark. No transaction is open while it sends. Rows are marked after the broker's
acknowledgement; the next round begins after that, so one batch per partition is in flight.

A relay that is paused between reading and sending can send rows that another relay has sent meanwhile. The copies arrive in the order of
the key, after rows that went before them, and every inbox drops them by their sequence.
"""

# ruff: noqa: S608 - the one thing put into statements is the schema's name, which `schema.tables` has checked

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
from servicekit.clock import Clock, SystemClock
from servicekit.errors import Unavailable

from eventing import metrics, topics
from eventing.background import Background, Backoff
from eventing.broker import Broker, Producer, Record, WrongCluster
from eventing.envelope import Event, encode_headers
from eventing.faults import passes
from eventing.outbox import Outbox
from eventing.schema import tables
from eventing.tracing import Tracing

_log = logging.getLogger(__name__)

POLL_S = 0.2
"""The longest an event waits for a relay that was not woken, and between two attempts to become the active one."""

KEEP_SENT = timedelta(days=7)
_BATCH_ROWS = 500
_BATCH_BYTES = 4_000_000
_PRUNE_ROWS = 1000
_PRUNE_ROUNDS = 5
_COUNTED = 100_000
_HOUSEKEEPING_S = 1.0


def lock_key(schema: str, shard: int) -> int:
    """The key of the advisory lock that the active relay holds (advisory locks are per database)."""
    return int.from_bytes(hashlib.sha256(f"headrace relay {schema} {shard}".encode()).digest()[:8], signed=True)


def channel(schema: str, shard: int) -> str:
    """The channel on which waiting replicas tell the active relay of new rows."""
    return f"eventing_{schema}_{shard}"


class Relay(Background):
    """Publishes the outbox of `schema`. Every replica of a service runs one; one of them is active.

    Resumes by itself when PostgreSQL or Kafka were away. Fails loudly (`wait` raises) on WrongCluster and on whatever else waiting does
    not mend.
    """

    def __init__(
        self,
        database_url: str,
        schema: str,
        broker: Broker,
        source: str,
        topic_prefix: str = "",
        shard: int = 0,
        *,
        outbox: Outbox | None = None,
        clock: Clock | None = None,
        create_topics: bool = True,
        linger_s: float = 0.004,
        keep_sent: timedelta = KEEP_SENT,
    ) -> None:
        """`database_url` must lead to PostgreSQL directly, not through a pooler that shares connections. `source` is the ce_source of
        all events, as `/headrace/tracker`. `outbox` is the one that the service writes through: its `committed` wakes this relay.
        `linger_s`: rounds begin at least this far apart, so that under load they carry many events."""
        super().__init__(f"relay {schema}/{shard}")
        self._dsn = database_url.replace("postgresql+asyncpg://", "postgresql://", 1)
        self._schema = schema
        self._broker = broker
        self._source = source
        self._prefix = topic_prefix
        self._shard = shard
        self._clock = clock or SystemClock()
        self._create_topics = create_topics
        self._linger_s = linger_s
        self._keep_sent = keep_sent
        self._woken = asyncio.Event()
        self._tracing = Tracing(self._clock)
        self._active = False
        self._problem: str | None = "has not connected yet"
        if outbox is not None:
            outbox.on_committed(self._woken.set)
        table = f"{tables(schema).schema}.outbox"
        columns = "id, topic, key, sequence, event_id, type, subject, traceparent, must_understand, time, payload"
        # The running sum keeps a round of large events from filling the memory; one event always passes.
        self._select = (
            f"SELECT {columns} FROM (SELECT {columns}, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS before"
            f" FROM (SELECT {columns} FROM {table} WHERE shard = $1 AND sent_at IS NULL ORDER BY id LIMIT {_BATCH_ROWS}) AS head) AS sized"
            f" WHERE before < {_BATCH_BYTES} ORDER BY id"
        )
        self._mark = f"UPDATE {table} SET sent_at = clock_timestamp() WHERE id = ANY($1::int8[])"
        # Only the lowest ids are looked at: they are about the oldest, and no index on sent_at is needed.
        self._prune = (
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM (SELECT id, sent_at FROM {table} WHERE shard = $1 ORDER BY id"
            f" LIMIT {_PRUNE_ROWS}) AS oldest WHERE sent_at < clock_timestamp() - $2::interval)"
        )
        # Counted to a limit: a long backlog must not be slowed down further by counting it.
        self._depth = (
            f"SELECT (SELECT count(*) FROM (SELECT FROM {table} WHERE shard = $1 AND sent_at IS NULL LIMIT {_COUNTED}) AS waiting)"
            " AS depth, coalesce(extract(epoch FROM clock_timestamp() - (SELECT created_at"
            f" FROM {table} WHERE shard = $1 AND sent_at IS NULL ORDER BY id LIMIT 1)), 0)::float8 AS age"
        )
        clusters = f"{tables(schema).schema}.outbox_cluster"
        self._note_cluster = f"INSERT INTO {clusters} (shard, cluster_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
        self._get_cluster = f"SELECT cluster_id FROM {clusters} WHERE shard = $1"

    @property
    def active(self) -> bool:
        """Whether this replica holds the lock and publishes."""
        return self._active

    def ready(self) -> str | None:
        """None when active or waiting behind the active one, else why not."""
        return super().ready() or self._problem

    def _wake(self) -> None:
        self._woken.set()

    async def _run(self) -> None:
        backoff = Backoff(most_s=3.0)
        while not self._stopping.is_set():
            try:
                await self._session(backoff)
            except Exception as exc:
                if not passes(exc):
                    raise
                wait = backoff.next()
                self._problem = f"{self._name}: {exc}"
                metrics.relay_failures.add(1, {"schema": self._schema})
                _log.warning("%s: %r; again in %.1f s", self._name, exc, wait)
                await self._pause(wait)

    async def _session(self, backoff: Backoff) -> None:
        """One connection's life: wait for the lock, then publish."""
        conn = await asyncpg.connect(
            self._dsn,
            timeout=5.0,
            command_timeout=30.0,
            server_settings={
                "application_name": self._name,
                # A mark that is lost in a crash costs a copy, which every inbox drops; waiting for the disk costs every round.
                "synchronous_commit": "off",
                # A relay on a machine that vanished must lose its lock soon.
                "tcp_keepalives_idle": "5",
                "tcp_keepalives_interval": "2",
                "tcp_keepalives_count": "3",
            },
        )
        try:
            if await self._become_active(conn):
                await self._publish(conn, backoff)
        finally:
            self._active = False
            metrics.relay_active.set(0, {"schema": self._schema})
            with contextlib.suppress(Exception):  # the server may be gone, and with it the lock
                await conn.close(timeout=2.0)

    async def _become_active(self, conn: Any) -> bool:
        """Waits for the lock; while waiting passes wake-ups on to the active relay. False if stopped."""
        while not self._stopping.is_set():
            if await conn.fetchval("SELECT pg_try_advisory_lock($1)", lock_key(self._schema, self._shard)):
                return True
            self._problem = None
            # Not pg_advisory_lock: a statement that waits for days holds back vacuum for days.
            if await self._wait_for_wake():
                self._woken.clear()
                await conn.execute("SELECT pg_notify($1, '')", channel(self._schema, self._shard))
                await self._clock.sleep(self._linger_s)
        return False

    async def _publish(self, conn: Any, backoff: Backoff) -> None:
        if self._create_topics:
            await topics.ensure_topics(self._broker, self._prefix)
        await self._check_cluster(conn)
        await conn.add_listener(channel(self._schema, self._shard), lambda *_: self._woken.set())
        producer = self._broker.producer()
        try:
            await producer.start()
            self._active = True
            self._problem = None
            metrics.relay_active.set(1, {"schema": self._schema})
            _log.info("%s publishes", self._name)
            housekeeping = self._clock.monotonic()
            while not self._stopping.is_set():
                self._woken.clear()  # before reading: a wake-up that comes while we read is for the next round
                began = self._clock.monotonic()
                rows = await conn.fetch(self._select, self._shard)
                if rows:
                    await self._send(conn, producer, rows)
                    backoff.reset()
                    if (rest := began + self._linger_s - self._clock.monotonic()) > 0 and len(rows) < _BATCH_ROWS:
                        await self._clock.sleep(rest)
                else:
                    producer.check()
                    await self._wait_for_wake()
                if self._clock.monotonic() >= housekeeping:
                    await self._keep_house(conn)
                    housekeeping = self._clock.monotonic() + _HOUSEKEEPING_S
        finally:
            await producer.stop()

    async def _check_cluster(self, conn: Any) -> None:
        """Raises WrongCluster if earlier events went to another cluster: what comes after them must not stand there without them."""
        cluster_id = await self._broker.cluster_id()
        await conn.execute(self._note_cluster, self._shard, cluster_id)
        held = await conn.fetchval(self._get_cluster, self._shard)
        if held != cluster_id:
            raise WrongCluster(
                f"{self._name} has published to cluster {held}, but the broker is cluster {cluster_id}:"
                " Kafka was replaced or wiped under a database that was kept"
            )

    async def _send(self, conn: Any, producer: Producer, rows: Sequence[Any]) -> None:
        """Sends the rows and marks those that were acknowledged. Raises Unavailable if some were not."""
        traceparents = self._tracing.sending(
            [row["topic"] for row in rows],
            [row["key"] for row in rows],
            [str(row["event_id"]) for row in rows],
            [row["traceparent"] for row in rows],
        )
        outcomes = await producer.send([self._record(row, traceparent) for row, traceparent in zip(rows, traceparents, strict=True)])
        sent = [row["id"] for row, outcome in zip(rows, outcomes, strict=True) if outcome is None]
        if sent:
            await conn.execute(self._mark, sent)
            metrics.relay_sent.add(len(sent), {"schema": self._schema})
        if len(sent) < len(rows):
            first = next(outcome for outcome in outcomes if outcome is not None)
            raise Unavailable(f"{len(rows) - len(sent)} of {len(rows)} events were not acknowledged: {first}")

    def _record(self, row: Any, traceparent: str) -> Record:
        event = Event(
            type=row["type"],
            topic=row["topic"],
            key=row["key"],
            sequence=row["sequence"],
            payload=row["payload"],
            id=row["event_id"],
            time=row["time"],
            subject=row["subject"],
            traceparent=traceparent,
            must_understand=row["must_understand"],
        )
        headers = encode_headers(event, self._source)
        return Record(self._prefix + event.topic, event.key.encode(), event.payload, headers, int(event.time.timestamp() * 1000))

    async def _keep_house(self, conn: Any) -> None:
        attributes = {"schema": self._schema}
        state = await conn.fetchrow(self._depth, self._shard)
        metrics.outbox_depth.set(state["depth"], attributes)
        metrics.outbox_age.set(state["age"], attributes)
        for _ in range(_PRUNE_ROUNDS):
            pruned = int((await conn.execute(self._prune, self._shard, self._keep_sent)).split()[-1])
            metrics.outbox_pruned.add(pruned, attributes)
            if pruned < _PRUNE_ROWS:
                break

    async def _wait_for_wake(self) -> bool:
        """Waits until there may be something to do; True if woken, False after the poll interval."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._woken.wait()
                return True
        return False
