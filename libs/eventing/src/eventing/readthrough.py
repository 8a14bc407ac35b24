"""How far a compacted topic has been read: whether "there is none in it" can be believed."""

from __future__ import annotations

import asyncio

from servicekit.errors import Unavailable

from eventing import topics
from eventing.broker import Broker, Partition

_PATIENCE_S = 5.0
"""How long the broker may take to answer: a transaction is open meanwhile."""


class ReadThrough:
    """Compares the ends of a topic with what a `SnapshotReader` has read. In one event loop with the reader that calls `saw`."""

    def __init__(self, broker: Broker, topic: str, topic_prefix: str = "") -> None:
        self._broker = broker
        self._topic = topics.topic(topic)
        self._partitions = [Partition(topic_prefix + self._topic.name, number) for number in range(self._topic.partitions)]
        self._seen: dict[int, int] = {}
        self._once = False

    def saw(self, partition: int, position: int) -> None:
        """The `on_read` of the reader: everything in the partition before `position` has been read."""
        self._seen[partition] = position

    async def check(self, *, now: bool) -> None:
        """Raises Unavailable unless the topic has been read to its end: its end `now`, else that of any earlier moment."""
        if self._once and not now:
            return
        try:
            async with asyncio.timeout(_PATIENCE_S):
                offsets = await self._broker.offsets(self._partitions)
        except TimeoutError:
            raise Unavailable(f"the broker does not say how much there is in {self._topic.name}") from None
        for partition, (start, end) in offsets.items():
            if end > start and self._seen.get(partition.number, 0) < end:
                raise Unavailable(f"{self._topic.name} has not been read to its end yet")
        self._once = True
