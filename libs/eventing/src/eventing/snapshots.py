"""Reading a compacted topic as a table: every record from the beginning, then every new one, in no group.

A record is a full snapshot with a revision. All records are passed on; that the highest revision wins is for the caller to see to, since
records may come again and an older one may come last.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable

from servicekit.clock import Clock, SystemClock
from servicekit.errors import Invalid, Transient

from eventing.background import Background, Backoff
from eventing.broker import Broker, Fetched, OffsetOutOfRange, Partition, Reader
from eventing.envelope import Received
from eventing.records import receive_any
from eventing.topics import ensure_topics, topic

_log = logging.getLogger(__name__)

OnRecord = Callable[[str, Received | None], Awaitable[None] | None]
"""Called with the key and the event, or None for a tombstone."""

OnRead = Callable[[int, int], None]
"""Called with a partition's number and the offset before which every record of it was passed on or passed over."""

_POLL_S = 0.25
_MAX_RECORDS = 1000


class SnapshotReader(Background):
    """Passes all records of a compacted topic to `on_record`, one at a time, in order per key.

    Ready once the end that the topic had at the start is reached, and from then on: when the broker goes away the table stays as it is and
    the reader comes back by itself. After a broker lost its log the reader begins anew. A record that is no event is logged and passed
    over, one for which `on_record` raises Invalid too; anything else it raises stops the reader loudly.
    """

    def __init__(
        self,
        broker: Broker,
        topic_name: str,
        on_record: OnRecord,
        topic_prefix: str = "",
        *,
        clock: Clock | None = None,
        create_topics: bool = True,
        on_read: OnRead | None = None,
    ) -> None:
        super().__init__(f"snapshots of {topic_name}")
        if not topic(topic_name).compacted:
            raise Invalid(f"topic {topic_name!r} is not compacted: it holds no snapshots")
        self._broker = broker
        self._topic = topic_name
        self._prefix = topic_prefix
        self._on_record = on_record
        self._clock = clock or SystemClock()
        self._create_topics = create_topics
        self._on_read = on_read
        self._cluster_id = ""
        self._loaded = asyncio.Event()

    def ready(self) -> str | None:
        """None once the table is complete, else why not."""
        return super().ready() or (None if self._loaded.is_set() else f"{self._name}: not read to the end yet")

    async def loaded(self) -> None:
        """Waits until the table is complete."""
        await self._loaded.wait()

    async def _run(self) -> None:
        backoff = Backoff(most_s=3.0)
        try:
            while not self._stopping.is_set():
                try:
                    await self._session(backoff)
                except (Transient, OffsetOutOfRange) as exc:
                    wait = backoff.next()
                    _log.warning("%s: %r; again in %.1f s", self._name, exc, wait)
                    await self._pause(wait)
        finally:
            await self._broker.close()

    async def _session(self, backoff: Backoff) -> None:
        if self._create_topics:
            await ensure_topics(self._broker, self._prefix)
        self._cluster_id = await self._broker.cluster_id()
        reader = self._broker.reader([self._prefix + self._topic])
        try:
            await reader.start()
            missing: dict[Partition, int] = {}
            mine: frozenset[Partition] = frozenset()
            while not self._stopping.is_set():
                polled = await reader.poll(_MAX_RECORDS, _POLL_S)
                if polled.assigned is not None:
                    mine, missing = polled.assigned, await self._begin(reader, polled.assigned)
                for record in polled.records:
                    await self._pass_on(record)
                if self._on_read is not None:
                    for partition in mine:
                        self._on_read(partition.number, await reader.position(partition))
                missing = {partition: end for partition, end in missing.items() if await reader.position(partition) < end}
                if not missing:
                    self._loaded.set()
                    backoff.reset()
        finally:
            await reader.stop()

    async def _begin(self, reader: Reader, assigned: frozenset[Partition]) -> dict[Partition, int]:
        """Seeks to the beginning; returns the ends to be reached before the table is complete."""
        held = await self._broker.offsets(assigned)
        for partition, (start, _) in held.items():
            reader.seek(partition, start)
        return {partition: end for partition, (start, end) in held.items() if end > start}

    async def _pass_on(self, record: Fetched) -> None:
        try:
            if record.value is None:
                key, event = (record.key or b"").decode(errors="replace"), None
            else:
                event = receive_any(record, self._topic, self._cluster_id)
                key = event.key
            result = self._on_record(key, event)
            if inspect.isawaitable(result):
                await result
        except Invalid as exc:
            _log.error("%s: record %s of %s passed over: %s", self._name, record.offset, record.partition, exc)
