"""The tables and columns that the revisions of each service make in a real PostgreSQL are those that its code knows."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from servicekit import db, migrate


@pytest.mark.parametrize("service", ["tracker", "registry", "trainer", "evaluator", "deployer"])
async def test_the_migrations_make_the_tables_that_the_code_knows(service: str, database: Any) -> None:
    metadata = import_module(f"{service}.adapters.tables").METADATA
    await migrate.upgrade(database.sqlalchemy, service, import_module(f"{service}.bootstrap").MIGRATIONS)

    def compare(connection: Any) -> list[Any]:
        def mine(entry: Any, name: str | None, kind: str, *_: Any) -> bool:
            # Those of the outbox, the inbox, the jobs and of Alembic itself belong to their libraries.
            return kind != "table" or f"{service}.{name}" in metadata.tables

        options = {
            "include_schemas": True,
            "include_object": mine,
            "include_name": lambda name, kind, _: kind != "schema" or name == service,
        }
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        # Of what no statement of the code names, the revisions alone tell: foreign keys, indexes. Comments are for readers of the code.
        silent = {"remove_fk", "remove_index", "add_table_comment", "modify_comment"}
        return [one for entry in found for one in (entry if isinstance(entry, list) else [entry]) if one[0] not in silent]

    engine = db.create_engine(database.sqlalchemy)
    try:
        async with engine.connect() as connection:
            assert await connection.run_sync(compare) == []
    finally:
        await engine.dispose()
