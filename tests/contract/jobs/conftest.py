"""A job queue on a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from jobs import Backoff, JobQueue, schema
from servicekit.clock import SystemClock, SystemIds
from servicekit.db import create_engine
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine


def prepare(connection: Connection) -> None:
    connection.execute(text("CREATE SCHEMA svc"))
    schema.create(connection, "svc")


@pytest.fixture
async def engine(database: Any) -> AsyncIterator[AsyncEngine]:
    made = create_engine(database.sqlalchemy, pool_size=20)
    async with made.begin() as connection:
        await connection.run_sync(prepare)
    yield made
    await made.dispose()


@pytest.fixture
def queue(engine: AsyncEngine) -> JobQueue:
    """A queue whose failed jobs come back at once."""
    return JobQueue(engine, "svc", SystemClock(), SystemIds(), Backoff(first_s=0, most_s=0))
