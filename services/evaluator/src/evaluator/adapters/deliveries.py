"""How far the compacted topic of deliveries has been read: whether "no delivery claims it" can be believed."""

from __future__ import annotations

import asyncio

from eventing import topics
from eventing.broker import Broker, Partition
from servicekit.errors import Unavailable

_PATIENCE_S = 5.0
"""How long the broker may take to answer: a transaction is open meanwhile."""


class DeliveriesRead:
    """Implements `ports.DeliveriesRead` on a broker. In one event loop with the reader that calls `saw`."""

    def __init__(self, broker: Broker, topic_prefix: str = "") -> None:
        self._broker = broker
        topic = topics.topic(topics.DELIVERIES)
        self._partitions = [Partition(topic_prefix + topic.name, number) for number in range(topic.partitions)]
        self._seen: dict[int, int] = {}
        self._once = False

    def saw(self, partition: int, position: int) -> None:
        self._seen[partition] = position

    async def check(self, *, now: bool) -> None:
        if self._once and not now:
            return
        try:
            async with asyncio.timeout(_PATIENCE_S):
                offsets = await self._broker.offsets(self._partitions)
        except TimeoutError:
            raise Unavailable("the broker does not say how many deliveries there are") from None
        for partition, (start, end) in offsets.items():
            if end > start and self._seen.get(partition.number, 0) < end:
                raise Unavailable("the deliveries have not all been read yet")
        self._once = True
