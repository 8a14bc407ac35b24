"""Reads the events of the chain from Kafka, as an operator would, to tell the story in their own words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from eventing.envelope import Received
from eventing.kafka import KafkaBroker
from eventing.snapshots import SnapshotReader

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
    found: list[Told] = []

    def on_record(key: str, event: Received | None) -> None:
        if event is not None:
            trace = event.traceparent.split("-")
            found.append(Told(event.time, event.type, key, trace[1] if len(trace) == 4 else "", event.payload))

    for topic in topics:
        reader = SnapshotReader(broker, topic, on_record, "")
        await reader.start()
        try:
            async with asyncio.timeout(30):
                while reader.ready() is not None:  # noqa: ASYNC110 - readiness is asked for, not announced
                    await asyncio.sleep(0.02)
        finally:
            await reader.stop()
    return sorted(found, key=lambda event: event.time)
