"""The watchdog of a consumer: a partition that has records to read, and does not move, ends the consumer loudly.

Consumers of aiokafka are known to get stuck without an error; a restart joins the group anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from servicekit.clock import Clock

from eventing.broker import Partition


class Stuck(Exception):
    """Records wait in a partition and nothing has moved for too long."""


class Watchdog:
    """Compares where partitions stand with where they end, from one look to the next."""

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._since: dict[Partition, tuple[int, float]] = {}

    def excuse(self, partition: Partition | None = None) -> None:
        """There is a known reason (a backoff) why this partition does not move, or none of them: count from now."""
        if partition is None:
            self._since.clear()
        else:
            self._since.pop(partition, None)

    def look(self, standing: Mapping[Partition, int], ends: Mapping[Partition, int], patience: float = 1.0) -> None:
        """Raises Stuck if a partition has records behind where it stands, and stood there `patience` times the limit ago already."""
        now = self._clock.monotonic()
        for partition, offset in standing.items():
            held, since = self._since.get(partition, (-1, now))
            if held != offset or ends.get(partition, 0) <= offset:
                self._since[partition] = (offset, now)
            elif now - since > self._limit_s * patience:
                raise Stuck(f"{partition} stands at {offset} since {now - since:.0f} s, and its end is {ends[partition]}")
        for partition in self._since.keys() - standing.keys():
            del self._since[partition]
