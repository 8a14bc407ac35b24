"""Brings a service's schema to the newest revision with Alembic: an explicit command, never done at start or import."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from servicekit.settings import ServiceSettings

_log = logging.getLogger(__name__)


def run(settings: ServiceSettings, schema: str, migrations_dir: Path) -> None:
    """Applies all revisions in `migrations_dir/versions` that the database has not seen, in one transaction.

    The schema is made if it is missing; it holds the version table too, and unqualified names in a revision mean it. Blocks,
    also within a running event loop. May be repeated, and run by several processes at once: one works, the others wait.
    """
    if not settings.database_url:
        raise ValueError("HEADRACE_DATABASE_URL is not set")
    # A thread of its own, so that it can be called from a coroutine as well.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(upgrade(settings.database_url, schema, migrations_dir))).result()


async def upgrade(database_url: str, schema: str, migrations_dir: Path, target: str = "heads") -> None:
    """As `run`, for callers with a database URL and an event loop."""
    if not schema.isidentifier():
        raise ValueError(f"{schema!r} is no name of a schema")
    engine = create_async_engine(database_url, poolclass=NullPool, connect_args={"timeout": 10})
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_upgrade, schema, migrations_dir, target)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection, schema: str, migrations_dir: Path, target: str) -> None:
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(schema)})
    # Not IF NOT EXISTS: that asks for the right to create schemas even when there is nothing to create.
    if connection.scalar(text("SELECT 1 FROM pg_namespace WHERE nspname = :schema"), {"schema": schema}) is None:
        connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    connection.execute(text(f'SET LOCAL search_path TO "{schema}"'))

    config = Config()
    config.set_main_option("script_location", str(migrations_dir).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    script = ScriptDirectory.from_config(config)

    def steps(revision: tuple[str, ...], context: MigrationContext) -> list[RevisionStep]:
        return script._upgrade_revs(target, revision)  # type: ignore[arg-type]  # what alembic.command.upgrade itself calls

    with EnvironmentContext(config, script, fn=steps) as environment:
        environment.configure(connection=connection, version_table="alembic_version", version_table_schema=schema)
        environment.run_migrations()
    _log.info("schema %s is at the newest revision", schema)


def _lock_key(schema: str) -> int:
    return int.from_bytes(hashlib.sha256(f"migrate:{schema}".encode()).digest()[:8], "big", signed=True)
