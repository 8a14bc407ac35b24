"""The store: transactions on the registry's schema, with the repositories that work in them and the outbox beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from eventing.outbox import Outbox
from servicekit.clock import Clock, Ids
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from registry.adapters.audit import SqlAudit
from registry.adapters.catalogue import SqlCatalogue
from registry.adapters.deliveries import SqlDeliveries
from registry.adapters.keys import SqlKeys
from registry.adapters.models import SqlModels
from registry.adapters.outgoing import Outgoing
from registry.adapters.webhooks import WebhookQueue
from registry.ports import Encode


class SqlSession:
    """Implements ports.Session on a connection whose transaction is somebody else's to end."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, encode: Encode, clock: Clock, ids: Ids, webhooks: bool) -> None:
        outgoing = Outgoing(conn, outbox, encode, clock, ids)
        self.audit = SqlAudit(conn)
        self.deliveries = SqlDeliveries(conn, outgoing, clock)
        self.catalogue = SqlCatalogue(conn)
        self.keys = SqlKeys(conn, outgoing, clock)
        self.models = SqlModels(conn, outgoing, self.audit, WebhookQueue(conn, clock, ids, enabled=webhooks))


class SqlStore:
    """Implements ports.Store. `webhooks`: whether somebody is to be told of requests for approval."""

    def __init__(self, engine: AsyncEngine, outbox: Outbox, encode: Encode, clock: Clock, ids: Ids, webhooks: bool = False) -> None:
        self._engine = engine
        self._outbox = outbox
        self._encode = encode
        self._clock = clock
        self._ids = ids
        self._webhooks = webhooks

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlSession]:
        async with self._engine.begin() as conn:
            yield self.session(conn)
        self._outbox.committed()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[SqlSession]:
        # Several statements that see one moment: a version must not be shown in production without the alias it got with that.
        async with self._engine.connect() as conn:
            await conn.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            async with conn.begin():
                yield self.session(conn)

    def session(self, conn: AsyncConnection) -> SqlSession:
        """A session in a transaction that a consumer has begun."""
        return SqlSession(conn, self._outbox, self._encode, self._clock, self._ids, self._webhooks)
