"""Who leads, of several deployers on one database: whoever holds a session's advisory lock. Each term has an epoch of its own.

The lock says who may begin; the epoch, checked in every transaction of a leader, stops one that was paused and does not know that
its session is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from servicekit import db

from deployer.adapters.tables import SCHEMA

LOCK = int.from_bytes(hashlib.sha256(f"headrace leader {SCHEMA}".encode()).digest()[:8], signed=True)
"""Key of the advisory lock (advisory locks are per database)."""


class Session:
    """A connection of its own, that holds the lock or tries to get it."""

    def __init__(self, connection: Any, holder: str) -> None:
        self._connection = connection
        self._holder = holder

    async def try_lead(self) -> int | None:
        """Take the lead if nobody has it: the new epoch, else None. Raises Unavailable."""
        try:
            if not await self._connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                return None
            statement = f"UPDATE {SCHEMA}.leader SET epoch = epoch + 1, holder = $1, since = clock_timestamp() WHERE id = 1 RETURNING epoch"  # noqa: S608
            epoch: int = await self._connection.fetchval(statement, self._holder)
            return epoch
        except Exception as error:
            raise db.translate(error) from error

    async def check(self) -> None:
        """Raises Unavailable when the session, and the lock with it, is gone."""
        try:
            await self._connection.fetchval("SELECT 1")
        except Exception as error:
            raise db.translate(error) from error


@asynccontextmanager
async def session(database_url: str, holder: str) -> AsyncIterator[Session]:
    """A session on PostgreSQL itself, not through a pooler that shares connections. Gives the lock back at the end. Raises Unavailable."""
    try:
        connection = await asyncpg.connect(
            database_url.replace("postgresql+asyncpg://", "postgresql://", 1),
            timeout=5.0,
            command_timeout=5.0,
            server_settings={
                "application_name": "deployer leader",
                # A leader on a machine that vanished must lose its lock soon.
                "tcp_keepalives_idle": "5",
                "tcp_keepalives_interval": "2",
                "tcp_keepalives_count": "3",
            },
        )
    except Exception as error:
        raise db.translate(error) from error
    try:
        yield Session(connection, holder)
    finally:
        with contextlib.suppress(Exception):  # the server may be gone, and the lock with it
            await connection.close(timeout=2.0)
