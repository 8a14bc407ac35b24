"""The unit of work on PostgreSQL: one transaction with everything the tracker stores, and the outbox within it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tracker.adapters.artifacts import SqlArtifacts, SqlDatasets
from tracker.adapters.conversions import SqlConversions
from tracker.adapters.experiments import SqlExperiments
from tracker.adapters.logged_models import SqlLoggedModels
from tracker.adapters.quick import QuickLog
from tracker.adapters.records import SqlRecords
from tracker.adapters.runs import SqlRuns
from tracker.domain.run import Event, Metric

Encode = Callable[[Event], Envelope]
"""How a domain event is written for the wire; the entry points know that."""


class SqlUnitOfWork:
    """Implements `ports.UnitOfWork` on one connection."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, encode: Encode) -> None:
        self.experiments = SqlExperiments(conn)
        self.runs = SqlRuns(conn)
        self.records = SqlRecords(conn)
        self.artifacts = SqlArtifacts(conn)
        self.conversions = SqlConversions(conn)
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

    def __init__(self, engine: AsyncEngine, outbox: Outbox, encode: Encode, points: AsyncEngine | None = None) -> None:
        """`points`: an engine for single points, which need no test of a connection before it is used; else they share `engine`."""
        self._engine = engine
        self._quick = QuickLog(points or engine)
        self._outbox = outbox
        self._encode = encode

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        async with self._engine.begin() as conn:
            work = SqlUnitOfWork(conn, self._outbox, self._encode)
            yield work
        if work.emitted:
            self._outbox.committed()

    async def log_point(self, run_id: str, metric: Metric, fencing_token: int | None) -> bool:
        return await self._quick.point(run_id, metric, fencing_token)
