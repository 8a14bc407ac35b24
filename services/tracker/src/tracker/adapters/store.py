"""The unit of work on PostgreSQL: one transaction with everything the tracker stores, and the outbox within it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tracker.adapters.artifacts import SqlArtifacts, SqlDatasets
from tracker.adapters.experiments import SqlExperiments
from tracker.adapters.logged_models import SqlLoggedModels
from tracker.adapters.records import SqlRecords
from tracker.adapters.runs import SqlRuns
from tracker.domain.run import Event

Encode = Callable[[Event], Envelope]
"""How a domain event is written for the wire; the entry points know that."""


class SqlUnitOfWork:
    """Implements `ports.UnitOfWork` on one connection."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, encode: Encode) -> None:
        self.experiments = SqlExperiments(conn)
        self.runs = SqlRuns(conn)
        self.records = SqlRecords(conn)
        self.artifacts = SqlArtifacts(conn)
        self.logged_models = SqlLoggedModels(conn)
        self.datasets = SqlDatasets(conn)
        self.emitted = False
        self._conn = conn
        self._outbox = outbox
        self._encode = encode

    async def emit(self, event: Event) -> None:
        await self._outbox.append(self._conn, [self._encode(event)])
        self.emitted = True


class SqlStore:
    """Implements `ports.Store`."""

    def __init__(self, engine: AsyncEngine, outbox: Outbox, encode: Encode) -> None:
        self._engine = engine
        self._outbox = outbox
        self._encode = encode

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        async with self._engine.begin() as conn:
            work = SqlUnitOfWork(conn, self._outbox, self._encode)
            yield work
        if work.emitted:
            self._outbox.committed()
