"""Puts domain events into the outbox, encoded by the one who knows the wire."""

from __future__ import annotations

from eventing.envelope import Event
from eventing.outbox import Outbox
from servicekit.clock import Clock, Ids
from sqlalchemy.ext.asyncio import AsyncConnection

from registry import metrics
from registry.domain.events import DomainEvent
from registry.ports import Encode


class Outgoing:
    """The events of one transaction."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, encode: Encode, clock: Clock, ids: Ids) -> None:
        self._conn = conn
        self._outbox = outbox
        self._encode = encode
        self._clock = clock
        self._ids = ids

    async def add(self, event: DomainEvent, key: str, sequence: int, traceparent: str = "") -> None:
        """Writes one event; `sequence` is its key's next, `traceparent` empty for the current trace."""
        encoded = self._encode(event)
        row = Event(
            type=encoded.type,
            topic=encoded.topic,
            key=key,
            sequence=sequence,
            payload=encoded.payload,
            id=self._ids.uuid7(),
            time=self._clock.now(),
            subject=encoded.subject,
            traceparent=traceparent,
        )
        await self._outbox.append(self._conn, [row])
        metrics.events.add(1, {"type": encoded.type})
