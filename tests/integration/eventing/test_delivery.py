"""From the outbox through Kafka to the inbox, on real servers."""

from __future__ import annotations

import asyncio


async def test_events_arrive_once_and_in_order(service, until):
    await service.relay()
    await service.consume()
    for n in range(50):
        await service.emit(f"run-{n % 5}")
    for n in range(5):
        await until(lambda n=n: service.effects(f"run-{n}"), list(range(1, 11)))
