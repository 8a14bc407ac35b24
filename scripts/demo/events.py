"""Reads the events of the chain from Kafka, as an operator would, to tell the story in their own words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from eventing.broker import Fetched, Partition
from eventing.kafka import KafkaBroker
from eventing.records import receive

STORY_TOPICS = ("headrace.runs", "headrace.evals", "headrace.models", "headrace.deploys")


@dataclass(frozen=True)
class Told:
    """One event: when it was written, what it is, about what, in which trace."""

    time: datetime
    type: str
    key: str
    trace_id: str
    payload: bytes


async def read_all(bootstrap: str, topics: Sequence[str] = STORY_TOPICS) -> list[Told]:
    """Every event of these topics up to now, in the order of their times. Blocks until their ends are reached."""
    broker = KafkaBroker(bootstrap, "headrace-demo")
    reader = broker.reader(topics)
    found: list[Told] = []
    try:
        async with asyncio.timeout(30):
            await reader.start()
            missing: dict[Partition, int] | None = None
            while missing is None or missing:
                polled = await reader.poll(1000, 0.25)
                if polled.assigned is not None:
                    held = await broker.offsets(polled.assigned)
                    for partition, (start, _) in held.items():
                        reader.seek(partition, start)
                    missing = {partition: end for partition, (start, end) in held.items() if end > start}
                found += [_told(record) for record in polled.records]
                missing = {partition: end for partition, end in (missing or {}).items() if await reader.position(partition) < end}
    finally:
        await reader.stop()
        await broker.close()
    return sorted(found, key=lambda event: event.time)


def _told(record: Fetched) -> Told:
    event = receive(record, record.partition.topic, "")
    trace = event.traceparent.split("-")
    return Told(event.time, event.type, event.key, trace[1] if len(trace) == 4 else "", event.payload)
