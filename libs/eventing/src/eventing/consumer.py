"""The consumer: reads durable topics and applies each event's effect to the service's database exactly once, in order per key."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from servicekit.clock import Clock, Ids, SystemClock, SystemIds
from servicekit.errors import Transient
from sqlalchemy.ext.asyncio import AsyncEngine

from eventing import metrics
from eventing.background import Background, Backoff
from eventing.broker import Broker, Fetched, OffsetOutOfRange, Partition, Reader
from eventing.faults import is_conflict, passes
from eventing.inbox import Handler, HandlerFailed, Inbox, Item, LostRace, Outcome, SequenceGap, is_invalid, read
from eventing.outbox import Outbox
from eventing.schema import tables
from eventing.topics import durable, ensure_topics
from eventing.tracing import Tracing
from eventing.watchdog import Watchdog

__all__ = ["Consumer", "Handler", "Unapplied", "UnknownValue"]

_log = logging.getLogger(__name__)

BATCH = 200
_POLL_S = 0.25
_UNKNOWN_ATTEMPTS = 6


class UnknownValue(Transient):
    """An event says something that this version cannot say back: an enum value newer than the code. Never applied as a default.

    Tried a few times, since a newer replica may take the partition over, and then the consumer stops loudly."""


class Unapplied(Exception):
    """An event could be neither applied nor parked: its handler has a bug, or gave up. The cause is the handler's exception."""


class _Fate(enum.Enum):
    PARK = "park"
    RETRY = "retry"
    ALONE = "alone"
    STOP = "stop"


def _fate(exc: BaseException) -> _Fate:
    """What is done with an event whose handler raised."""
    if is_invalid(exc):
        return _Fate.PARK
    if is_conflict(exc):
        return _Fate.ALONE
    if passes(exc):
        return _Fate.RETRY
    return _Fate.STOP


class _Delay:
    """A partition that waits because its next event failed for a passing reason."""

    def __init__(self, offset: int, max_backoff_s: float) -> None:
        self.offset = offset
        self.backoff = Backoff(most_s=max_backoff_s)
        self.until: float | None = None
        self.attempts = 0


class Consumer(Background):
    """Applies the events of `topics` through `handlers`. Replicas share the partitions; a replica that lost one, and does not know
    yet, is fenced by the database.

    Works again by itself when Kafka or PostgreSQL were away. Stops loudly (`wait` raises) on WrongCluster, OffsetOutOfRange,
    SequenceGap, Stuck, and with Unapplied on any exception of a handler that is neither Invalid nor Transient.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        schema: str,
        broker: Broker,
        name: str,
        topics: Sequence[str],
        handlers: Mapping[str, Handler],
        topic_prefix: str = "",
        outbox: Outbox | None = None,
        *,
        clock: Clock | None = None,
        ids: Ids | None = None,
        batch_size: int = BATCH,
        max_backoff_s: float = 10.0,
        watchdog_s: float = 60.0,
        create_topics: bool = True,
    ) -> None:
        """`name` stands for this consumer in its tables for ever, and is its group (after the prefix). `handlers` by event type, as
        `run.finished`. `outbox` is the one that the handlers append to: its relay is woken after every commit."""
        super().__init__(f"consumer {name}")
        self.name = name
        self.topics = tuple(durable(topic).name for topic in topics)
        self.engine = engine
        self.schema = schema
        self._broker = broker
        self._prefix = topic_prefix
        self._clock = clock or SystemClock()
        self.outbox = outbox or Outbox(tables(schema))
        self._tracing = Tracing(self._clock)
        self.inbox = Inbox(engine, schema, name, topic_prefix, dict(handlers), self.outbox, self._clock, ids or SystemIds(), self._tracing)
        self._batch_size = batch_size
        self._max_backoff_s = max_backoff_s
        self._watchdog = Watchdog(self._clock, watchdog_s)
        self._watch_every_s = min(5.0, watchdog_s / 4)
        self._create_topics = create_topics
        self._problem: str | None = "has no assignment yet"
        self._cluster_id = ""
        self._assigned: frozenset[Partition] = frozenset()
        self._positions: dict[Partition, int] = {}
        self._delays: dict[Partition, _Delay] = {}
        self._lost = True
        """Whether where we stand must be read from the database before going on."""

    def ready(self) -> str | None:
        """None when partitions are assigned (they may be none) and positioned, else why not."""
        return super().ready() or (f"{self._name}: {self._problem}" if self._problem else None)

    async def _run(self) -> None:
        work = asyncio.create_task(self._work(), name=self._name)
        watch = asyncio.create_task(self._watch(), name=f"{self._name} watchdog")
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                await asyncio.wait({work})  # its running batch may end
        finally:
            work.cancel()
            watch.cancel()
            ended = await asyncio.gather(work, watch, return_exceptions=True)
            await self._broker.close()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    async def _work(self) -> None:
        backoff = Backoff(most_s=3.0)
        while not self._stopping.is_set():
            try:
                await self._session(backoff)
            except Exception as exc:
                await self._excuse(exc, backoff)

    async def _session(self, backoff: Backoff) -> None:
        """One reader's life: until it fails or the consumer is stopped."""
        if self._create_topics:
            await ensure_topics(self._broker, self._prefix)
        reader = self._broker.group_reader(self._prefix + self.name, [self._prefix + topic for topic in self.topics])
        try:
            await reader.start()
            while not self._stopping.is_set():
                try:
                    polled = await reader.poll(self._batch_size, self._poll_s())
                except OffsetOutOfRange:
                    await self._position(reader)  # which knows why: another cluster, or lost records
                    continue
                if polled.assigned is not None:
                    self._assigned = polled.assigned
                    self._lost = True
                try:
                    if self._lost:
                        await self._position(reader)
                    else:
                        self._resume(reader)
                        if polled.records:
                            await self._process(reader, polled.records)
                            backoff.reset()
                except Exception as exc:
                    self._lost = True
                    await self._excuse(exc, backoff)
        finally:
            self._lost = True
            self._assigned = frozenset()
            self._positions.clear()
            self._delays.clear()
            await reader.stop()

    async def _excuse(self, exc: Exception, backoff: Backoff) -> None:
        """Waits, if the error may pass; raises it otherwise."""
        if not isinstance(exc, LostRace) and not passes(exc):
            raise exc
        wait = backoff.next()
        self._problem = str(exc)
        self._watchdog.excuse()
        counter = metrics.fenced if isinstance(exc, LostRace) else metrics.retries
        counter.add(1, {"consumer": self.name})
        _log.warning("%s: %r; again in %.1f s", self._name, exc, wait)
        await self._pause(wait)

    async def _position(self, reader: Reader) -> None:
        """Reads from the database where the assigned partitions stand, and seeks there."""
        self._cluster_id = await self._broker.cluster_id()
        positions = await self.inbox.positions(sorted(self._assigned), self._cluster_id)
        held = await self._broker.offsets(self._assigned) if self._assigned else {}
        for partition, (start, end) in held.items():
            if not start <= positions[partition] <= end:
                raise OffsetOutOfRange(partition, positions[partition], f"it holds {start} to {end}; records were lost")
        self._positions = positions
        self._delays = {partition: delay for partition, delay in self._delays.items() if partition in self._assigned}
        for partition, offset in positions.items():
            reader.seek(partition, offset)
            if partition in self._delays and self._delays[partition].until is not None:
                reader.pause(partition)
        self._lost = False
        self._problem = None

    def _poll_s(self) -> float:
        waits = [delay.until - self._clock.monotonic() for delay in self._delays.values() if delay.until is not None]
        return max(0.001, min([_POLL_S, *waits]))

    def _resume(self, reader: Reader) -> None:
        """Lets the partitions go on whose delay is over."""
        now = self._clock.monotonic()
        for partition, delay in self._delays.items():
            if delay.until is not None and delay.until <= now:
                delay.until = None
                reader.seek(partition, self._positions[partition])

    async def _process(self, reader: Reader, records: Sequence[Fetched]) -> None:
        """Applies what was fetched: as one transaction if all goes well, in smaller ones if not."""
        items = [
            read(record, record.partition.topic.removeprefix(self._prefix), self._cluster_id)
            for record in records
            if record.offset >= self._positions[record.partition]
        ]
        groups = [items] if items else []
        savepoints = False
        stop: Exception | None = None
        while groups:
            group = groups[0]
            try:
                outcome = await self.inbox.apply(group, self._positions, savepoints=savepoints, cluster_id=self._cluster_id)
            except HandlerFailed as failed:
                item = group[failed.index]
                fate = _fate(failed.cause)
                if fate is _Fate.ALONE and len(group) == 1:
                    fate = _Fate.RETRY
                if fate is _Fate.RETRY and not self._delay(reader, item, failed.cause):
                    fate = _Fate.STOP
                if fate is _Fate.PARK:
                    savepoints = True
                elif fate is _Fate.ALONE:
                    groups[0:1] = [[one] for one in group]
                elif fate is _Fate.RETRY:
                    # The events before it, and those of other partitions, need not wait with it.
                    groups = [_without(one, item) for one in groups]
                else:
                    stop = _loud(item, failed.cause)
                    groups = [group[: failed.index]]
                groups = [one for one in groups if one]
            except Exception as exc:
                if not is_conflict(exc) or len(group) == 1:
                    raise
                groups[0:1] = [[one] for one in group]
            else:
                self._advance(group, outcome)
                del groups[0]
        if stop is not None:
            raise stop

    def _delay(self, reader: Reader, item: Item, cause: Exception) -> bool:
        """Puts an event's partition off. False if it was put off often enough."""
        partition = item.fetched.partition
        delay = self._delays.get(partition)
        if delay is None or delay.offset != item.fetched.offset:
            delay = self._delays[partition] = _Delay(item.fetched.offset, self._max_backoff_s)
        delay.attempts += 1
        if isinstance(cause, UnknownValue) and delay.attempts >= _UNKNOWN_ATTEMPTS:
            return False
        wait = delay.backoff.next()
        delay.until = self._clock.monotonic() + wait
        reader.pause(partition)
        self._watchdog.excuse(partition)
        metrics.retries.add(1, {"consumer": self.name})
        _log.warning("%s: %s %s waits %.1f s: %r", self._name, item.topic, item.key, wait, cause)
        return True

    def _advance(self, group: Sequence[Item], outcome: Outcome) -> None:
        """After a commit: where we stand now, what was done, and the relay may look."""
        for item in group:
            self._positions[item.fetched.partition] = item.fetched.offset + 1
        for partition in [p for p, delay in self._delays.items() if self._positions.get(p, 0) > delay.offset]:
            del self._delays[partition]
        self.outbox.committed()
        attributes = {"consumer": self.name}
        metrics.applied.add(outcome.applied, attributes)
        if outcome.duplicates:
            metrics.duplicates.add(outcome.duplicates, attributes)
        if outcome.parked:
            metrics.parked.add(outcome.parked, attributes)
            _log.error("%s parked %d events", self._name, outcome.parked)
        for kind, count in outcome.skipped.items():
            metrics.skipped.add(count, {**attributes, "type": kind})

    async def _watch(self) -> None:
        """Looks now and then whether the partitions move, and tells how far behind they are."""
        while not self._stopping.is_set():
            await self._pause(self._watch_every_s)
            try:
                if self._assigned:
                    standing, patience = dict(self._positions), 1.0
                else:
                    # Without an assignment another replica is expected to read: what it commits is seen in the database.
                    counts = await self._broker.topics()
                    names = [self._prefix + topic for topic in self.topics]
                    every = [Partition(name, number) for name in names for number in range(counts.get(name, 0))]
                    standing, patience = await self.inbox.held(every), 5.0
                ends = {partition: end for partition, (_, end) in (await self._broker.offsets(standing)).items()} if standing else {}
            except Exception as exc:
                if not passes(exc):
                    raise
                self._watchdog.excuse()
                continue
            lags: Counter[str] = Counter({topic: 0 for topic in self.topics})
            for partition in self._assigned & standing.keys():
                lags[partition.topic.removeprefix(self._prefix)] += max(0, ends[partition] - standing[partition])
            for topic, lag in lags.items():
                metrics.consumer_lag.set(lag, {"consumer": self.name, "topic": topic})
            self._watchdog.look(standing, ends, patience)


def _loud(item: Item, cause: Exception) -> Exception:
    """What the consumer fails with because of an event."""
    if isinstance(cause, SequenceGap):
        return cause
    kind = item.event.type if item.event is not None else ""
    unapplied = Unapplied(
        f"{kind} {item.sequence} of {item.topic} {item.key}, at {item.fetched.partition} offset {item.fetched.offset}: {cause!r}"
    )
    unapplied.__cause__ = cause
    return unapplied


def _without(group: Sequence[Item], failed: Item) -> list[Item]:
    """The group without the failed event and what comes after it in its partition."""
    return [item for item in group if item.fetched.partition != failed.fetched.partition or item.fetched.offset < failed.fetched.offset]
