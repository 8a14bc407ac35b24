"""How far the compacted topic of deliveries has been read: whether "no delivery claims it" can be believed."""

from __future__ import annotations

from eventing import topics
from eventing.broker import Broker, Partition
from servicekit.errors import Unavailable


class DeliveriesRead:
    """Implements `ports.DeliveriesRead` on a broker. In one event loop with the reader that calls `saw`."""

    def __init__(self, broker: Broker, topic_prefix: str = "") -> None:
        self._broker = broker
        topic = topics.topic(topics.DELIVERIES)
        self._partitions = [Partition(topic_prefix + topic.name, number) for number in range(topic.partitions)]
        self._seen: dict[int, int] = {}
        self._once = False

    def saw(self, partition: int, offset: int) -> None:
        self._seen[partition] = max(offset, self._seen.get(partition, -1))

    async def check(self, *, now: bool) -> None:
        if self._once and not now:
            return
        for partition, (start, end) in (await self._broker.offsets(self._partitions)).items():
            if end > start and self._seen.get(partition.number, -1) < end - 1:
                raise Unavailable("the deliveries have not all been read yet")
        self._once = True
