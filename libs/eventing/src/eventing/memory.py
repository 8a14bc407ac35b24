"""The broker port in memory, for tests and for one process: real logs, groups and offsets, and outages on demand."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from servicekit.errors import Unavailable

from eventing.broker import Fetched, OffsetOutOfRange, Partition, Polled, Producer, Reader, Record, TopicSpec
from eventing.partitioning import partition_of


@dataclass(slots=True)
class _Log:
    start: int = 0
    end: int = 0
    records: list[Fetched] = field(default_factory=list)
    """In the order of their offsets, which may have holes after `compact`."""


class MemoryBroker:
    """All topics of one "cluster". `available = False` makes everything raise Unavailable until it is set again."""

    def __init__(self) -> None:
        self.available = True
        self._cluster_id = uuid.uuid4().hex
        self._logs: dict[Partition, _Log] = {}
        self._topics: dict[str, int] = {}
        self._groups: dict[str, list[_MemoryReader]] = {}
        self._changed = asyncio.Event()

    def producer(self, *, best_effort: bool = False) -> Producer:
        return _MemoryProducer(self)

    def group_reader(self, group: str, topics: Collection[str]) -> Reader:
        return _MemoryReader(self, group, topics)

    def reader(self, topics: Collection[str]) -> Reader:
        return _MemoryReader(self, None, topics)

    async def cluster_id(self) -> str:
        self.check()
        return self._cluster_id

    async def topics(self) -> Mapping[str, int]:
        self.check()
        return dict(self._topics)

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        self.check()
        for spec in specs:
            if spec.name not in self._topics:
                self._topics[spec.name] = spec.partitions
                self._logs.update({Partition(spec.name, number): _Log() for number in range(spec.partitions)})
        for group in self._groups:
            self.rebalance(group)

    async def offsets(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        self.check()
        found = {}
        for partition in partitions:
            log = self.log(partition)
            found[partition] = (log.start, log.end)
        return found

    async def close(self) -> None:
        """Nothing is held open."""

    def wipe(self) -> None:
        """Loses every topic, and is another cluster from now on."""
        self._cluster_id = uuid.uuid4().hex
        self._topics.clear()
        self._logs.clear()
        for group in self._groups:
            self.rebalance(group)
        self.woken()

    def delete_before(self, partition: Partition, offset: int) -> None:
        """Loses the first records of a partition, as retention does."""
        log = self.log(partition)
        log.records = [record for record in log.records if record.offset >= offset]
        log.start = offset

    def compact(self, topic: str) -> None:
        """Keeps only the last record of every key."""
        for partition, log in self._logs.items():
            if partition.topic == topic:
                last = {record.key: record for record in log.records}
                log.records = sorted(last.values(), key=lambda record: record.offset)

    def append(self, record: Record, *, value: bytes | None = None, tombstone: bool = False) -> None:
        """Stores one record; tests use it for what our own producers never send."""
        count = self._topics.get(record.topic)
        if count is None:
            raise Unavailable(f"there is no topic {record.topic}")
        partition = Partition(record.topic, partition_of(record.key, count))
        log = self._logs[partition]
        stored = None if tombstone else record.value if value is None else value
        log.records.append(Fetched(partition, log.end, record.key, stored, record.headers, record.timestamp_ms))
        log.end += 1
        self.woken()

    def check(self) -> None:
        if not self.available:
            raise Unavailable("the broker is away")

    def log(self, partition: Partition) -> _Log:
        try:
            return self._logs[partition]
        except KeyError:
            raise Unavailable(f"there is no partition {partition}") from None

    def woken(self) -> None:
        """Wakes the readers that wait."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        return self._changed

    def join(self, group: str, member: _MemoryReader) -> None:
        self._groups.setdefault(group, []).append(member)
        self.rebalance(group)

    def leave(self, group: str, member: _MemoryReader) -> None:
        if member in self._groups.get(group, []):
            self._groups[group].remove(member)
            self.rebalance(group)

    def rebalance(self, group: str) -> None:
        """Shares the partitions of a group out anew; every member gets a new assignment."""
        members = self._groups[group]
        shares: dict[int, set[Partition]] = {index: set() for index in range(len(members))}
        for topic in sorted({topic for member in members for topic in member.topics}):
            takers = itertools.cycle([index for index, member in enumerate(members) if topic in member.topics])
            for number in range(self._topics.get(topic, 0)):
                shares[next(takers)].add(Partition(topic, number))
        for index, member in enumerate(members):
            member.assign(frozenset(shares[index]))
        self.woken()


class _MemoryProducer:
    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def start(self) -> None:
        self._broker.check()

    async def send(self, records: Sequence[Record], timeout_s: float = 10.0) -> Sequence[BaseException | None]:
        await asyncio.sleep(0)
        outcomes: list[BaseException | None] = []
        for record in records:
            try:
                self._broker.check()
                self._broker.append(record)
            except Unavailable as exc:
                outcomes.append(exc)
            else:
                outcomes.append(None)
        return outcomes

    def check(self) -> None:
        self._broker.check()

    async def stop(self, timeout_s: float = 1.5) -> None:
        """Nothing is held open."""


class _MemoryReader:
    def __init__(self, broker: MemoryBroker, group: str | None, topics: Collection[str]) -> None:
        self._broker = broker
        self._group = group
        self.topics = set(topics)
        self._assigned: frozenset[Partition] | None = None
        self._announced = True
        self._positions: dict[Partition, int] = {}
        self._held: frozenset[Partition] = frozenset()

    async def start(self) -> None:
        self._broker.check()
        if self._group is not None:
            self._broker.join(self._group, self)
            return
        counts = await self._broker.topics()
        missing = self.topics - counts.keys()
        if missing:
            raise Unavailable(f"there is no topic {', '.join(sorted(missing))} yet")
        self.assign(frozenset(Partition(topic, number) for topic in self.topics for number in range(counts[topic])))

    def assign(self, assigned: frozenset[Partition]) -> None:
        self._held = assigned
        self._announced = False
        self._positions.clear()

    async def poll(self, max_records: int, timeout_s: float) -> Polled:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            self._broker.check()
            if not self._announced:
                self._announced = True
                return Polled([], assigned=self._held)
            changed = self._broker.changed
            if records := self._read(max_records):
                return Polled(records)
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                return Polled([])

    def _read(self, max_records: int) -> list[Fetched]:
        records: list[Fetched] = []
        for partition, position in self._positions.items():
            log = self._broker.log(partition)
            if not log.start <= position <= log.end:
                raise OffsetOutOfRange(partition, position)
            fresh = [record for record in log.records if record.offset >= position]
            taken = fresh[: max_records - len(records)]
            records += taken
            self._positions[partition] = log.end if len(taken) == len(fresh) else fresh[len(taken)].offset
        return records

    async def position(self, partition: Partition) -> int:
        return self._positions[partition]

    def seek(self, partition: Partition, offset: int) -> None:
        if partition in self._held:
            self._positions[partition] = offset

    def pause(self, partition: Partition) -> None:
        self._positions.pop(partition, None)

    async def stop(self, timeout_s: float = 1.5) -> None:
        if self._group is not None:
            self._broker.leave(self._group, self)
