"""The port to a log of records: what eventing needs of Kafka, and no more. `eventing.kafka` and `eventing.memory` implement it.

All methods raise `servicekit.errors.Unavailable` when the broker does not answer; what then helps is to stop the producer or reader
and to make a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from eventing.envelope import Headers


class Partition(NamedTuple):
    """One partition of a topic; the topic's name with its prefix."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}]"


@dataclass(frozen=True, slots=True)
class Record:
    """A record to send. The partition follows from the key, as in Kafka's own clients (murmur2)."""

    topic: str
    key: bytes
    value: bytes
    headers: Headers
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A record as read from the log. `value` is None in a tombstone."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """How a topic is to be created. `retention_ms` -1 keeps for ever; compacted topics keep the last record of every key; `replication` -1
    is the broker's own default."""

    name: str
    partitions: int
    compacted: bool = False
    retention_ms: int = -1
    replication: int = -1
    max_message_bytes: int = 1_048_588


@dataclass(frozen=True, slots=True)
class Polled:
    """What a poll brought. `assigned` is given when the assignment changed since the last poll, else None."""

    records: Sequence[Fetched]
    assigned: frozenset[Partition] | None = None


class WrongCluster(Exception):
    """The database was kept with another Kafka cluster than the one that answers: Kafka was replaced or wiped under it.

    docs/eventing.md tells what an operator does then.
    """


class OffsetOutOfRange(Exception):
    """The log does not hold the offset that a consumer stands at: records are lost. Not a thing to go on from."""

    def __init__(self, partition: Partition, offset: int, detail: str = "") -> None:
        super().__init__(f"{partition} does not hold offset {offset}{': ' + detail if detail else ''}")
        self.partition = partition
        self.offset = offset


class Producer(Protocol):
    """Sends records. After any error it must not be used again, only stopped."""

    async def start(self) -> None:
        """Connects. Where this fails nothing is left open."""
        ...

    async def send(self, records: Sequence[Record], timeout_s: float = 10.0) -> Sequence[BaseException | None]:
        """Sends and waits for the acknowledgement of all in-sync replicas; one outcome per record, None = acknowledged.

        Within a partition the order of `records` is kept, and nothing is acknowledged behind a record that was not. A record that
        was not acknowledged may still have been stored. A single caller at a time. Repeating stores again.
        """
        ...

    def check(self) -> None:
        """Raises Unavailable if the next send is known to fail. Asks nobody."""
        ...

    async def stop(self, timeout_s: float = 1.5) -> None:
        """Gives up what is not sent yet and closes the connections. Never raises, returns within about twice `timeout_s`."""
        ...


class Reader(Protocol):
    """Reads records, from partitions that a group gave it or from all partitions of its topics.

    A partition is silent until its position is given by `seek`, also after every new assignment.
    """

    async def start(self) -> None:
        """Connects. Where this fails nothing is left open."""
        ...

    async def poll(self, max_records: int, timeout_s: float) -> Polled:
        """Waits up to `timeout_s` for records. Raises OffsetOutOfRange. A single caller at a time."""
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Reads on from `offset`, and resumes the partition if it was paused. Records fetched before are dropped. A partition that is
        no longer assigned is passed over."""
        ...

    async def position(self, partition: Partition) -> int:
        """The offset that the next poll reads from, in a partition that was positioned by `seek`."""
        ...

    def pause(self, partition: Partition) -> None:
        """No records of this partition until the next `seek`."""
        ...

    async def stop(self, timeout_s: float = 1.5) -> None:
        """Leaves the group and closes the connections. Never raises, returns within about twice `timeout_s`."""
        ...


class Broker(Protocol):
    """A broker. Making one connects to nothing. May be shared by all components of a process."""

    def producer(self, *, best_effort: bool = False) -> Producer:
        """A producer: acks=all and idempotent; a best-effort one asks for the leader's acknowledgement only."""
        ...

    def group_reader(self, group: str, topics: Collection[str]) -> Reader:
        """A member of a consumer group, which shares the partitions out."""
        ...

    def reader(self, topics: Collection[str]) -> Reader:
        """A reader of all partitions, in no group; its first poll names them."""
        ...

    async def cluster_id(self) -> str: ...

    async def topics(self) -> Mapping[str, int]:
        """Names and partition counts of all topics that are not internal."""
        ...

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Creates the topics that do not exist; leaves the others as they are. May be repeated, also by several at once."""
        ...

    async def offsets(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        """First offset held and the offset after the last, of each partition."""
        ...

    async def close(self) -> None:
        """Closes what questions to it opened (not producers and readers); the next question opens it again. Components call it when they
        end. May be repeated."""
        ...
