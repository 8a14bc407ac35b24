"""Events outside the promise: traffic windows and samples. They cost the sender nothing, and may be lost; what is lost is counted."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime

from servicekit.clock import Clock, Ids, SystemClock, SystemIds
from servicekit.errors import Invalid, Transient

from eventing import metrics, tracing
from eventing.background import Background, Backoff
from eventing.broker import Broker, OffsetOutOfRange, Producer, Record
from eventing.envelope import Event, Received, encode_headers
from eventing.records import receive_any
from eventing.topics import ensure_topics, topic

_log = logging.getLogger(__name__)

_POLL_S = 0.25
_BATCH = 500


def _best_effort(name: str) -> str:
    if not topic(name).best_effort:
        raise Invalid(f"topic {name!r} is durable: publish through the outbox, read with a Consumer")
    return name


class BestEffortProducer(Background):
    """Sends events from a bounded queue in the background. `send` never waits and never raises for the broker's sake."""

    def __init__(
        self,
        broker: Broker,
        topic_prefix: str = "",
        *,
        source: str = "/headrace",
        capacity: int = 10_000,
        send_timeout_s: float = 5.0,
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        super().__init__("best-effort producer")
        self._broker = broker
        self._prefix = topic_prefix
        self._source = source
        self._capacity = capacity
        self._send_timeout_s = send_timeout_s
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._queue: deque[Record] = deque()
        self._filled = asyncio.Event()
        self.sent = 0
        """Events that the broker acknowledged."""
        self.dropped = 0
        """Events that were shed because the queue was full, or lost with a send that failed."""

    def send(self, topic: str, key: str, type: str, payload: bytes, *, time: datetime | None = None, subject: str = "") -> bool:
        """Queues an event; False, and counted as dropped, if the queue is full. Raises Invalid if the topic is not a best-effort one."""
        _best_effort(topic)
        if len(self._queue) >= self._capacity:
            self._drop(topic, 1)
            return False
        now = time or self._clock.now()
        event = Event(type, topic, key, 0, payload, self._ids.uuid7(), now, subject, tracing.current_traceparent())
        headers = encode_headers(event, self._source)
        self._queue.append(Record(self._prefix + topic, key.encode(), payload, headers, int(now.timestamp() * 1000)))
        self._filled.set()
        return True

    def _wake(self) -> None:
        self._filled.set()

    async def _run(self) -> None:
        backoff = Backoff(most_s=3.0)
        producer: Producer | None = None
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._queue:
                    if producer is None:
                        producer = await self._connect(backoff)
                        if producer is None:
                            break
                    if not await self._send(producer):
                        await producer.stop()
                        producer = None
                if self._stopping.is_set():
                    return
                if self._queue:
                    self._filled.set()
        finally:
            for record in self._queue:
                self._drop(record.topic.removeprefix(self._prefix), 1)
            self._queue.clear()
            if producer is not None:
                await producer.stop()

    async def _connect(self, backoff: Backoff) -> Producer | None:
        producer = self._broker.producer(best_effort=True)
        try:
            await ensure_topics(self._broker, self._prefix)
            await producer.start()
        except Transient as exc:
            await producer.stop()
            wait = backoff.next()
            _log.warning("%s: %s; again in %.1f s", self._name, exc, wait)
            await self._pause(wait)
            return None
        backoff.reset()
        return producer

    async def _send(self, producer: Producer) -> bool:
        """Sends what is queued, once: what fails is lost. False if the producer must be replaced."""
        batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
        outcomes = await producer.send(batch, self._send_timeout_s)
        for record, outcome in zip(batch, outcomes, strict=True):
            name = record.topic.removeprefix(self._prefix)
            if outcome is None:
                self.sent += 1
                metrics.best_effort_sent.add(1, {"topic": name})
            else:
                self._drop(name, 1)
        failed = next((outcome for outcome in outcomes if outcome is not None), None)
        if failed is not None:
            _log.warning("%s: %s", self._name, failed)
        return failed is None

    def _drop(self, name: str, count: int) -> None:
        self.dropped += count
        metrics.best_effort_dropped.add(count, {"topic": name})


class BestEffortConsumer(Background):
    """Passes the events of a best-effort topic that arrive from now on to `handler`: all partitions, in no group, each event at most once.

    An event that is none, or for which the handler raises Invalid or Transient, is logged and passed over; anything else stops it loudly.
    """

    def __init__(
        self,
        broker: Broker,
        topic_name: str,
        handler: Callable[[Received], Awaitable[None]],
        topic_prefix: str = "",
        *,
        create_topics: bool = True,
    ) -> None:
        super().__init__(f"best-effort consumer of {topic_name}")
        self._broker = broker
        self._topic = _best_effort(topic_name)
        self._handler = handler
        self._prefix = topic_prefix
        self._create_topics = create_topics
        self._listening = asyncio.Event()

    def ready(self) -> str | None:
        """None while listening, else why not."""
        return super().ready() or (None if self._listening.is_set() else f"{self._name}: not connected")

    async def connected(self) -> None:
        """Waits until events that are sent from now on will be passed on."""
        await self._listening.wait()

    async def _run(self) -> None:
        backoff = Backoff(most_s=3.0)
        try:
            while not self._stopping.is_set():
                try:
                    await self._session(backoff)
                except (Transient, OffsetOutOfRange) as exc:
                    self._listening.clear()
                    wait = backoff.next()
                    _log.warning("%s: %r; again in %.1f s", self._name, exc, wait)
                    await self._pause(wait)
        finally:
            await self._broker.close()

    async def _session(self, backoff: Backoff) -> None:
        if self._create_topics:
            await ensure_topics(self._broker, self._prefix)
        cluster_id = await self._broker.cluster_id()
        reader = self._broker.reader([self._prefix + self._topic])
        try:
            await reader.start()
            while not self._stopping.is_set():
                polled = await reader.poll(_BATCH, _POLL_S)
                if polled.assigned is not None:
                    for partition, (_, end) in (await self._broker.offsets(polled.assigned)).items():
                        reader.seek(partition, end)
                    self._listening.set()
                    backoff.reset()
                for record in polled.records:
                    try:
                        await self._handler(receive_any(record, self._topic, cluster_id))
                    except (Invalid, Transient) as exc:
                        _log.warning("%s: record %s of %s passed over: %s", self._name, record.offset, record.partition, exc)
        finally:
            await reader.stop()
