"""Migrations and database errors against a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from eventing.faults import passes
from localstack.server import crash, restart
from servicekit import db, migrate
from servicekit.errors import HeadraceError, Invalid, Unavailable
from servicekit.settings import ServiceSettings
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

FIRST = """
import sqlalchemy as sa
from alembic import op
revision = "0001"
down_revision = None
def upgrade():
    op.create_table("thing", sa.Column("id", sa.Integer, primary_key=True), sa.Column("100%", sa.Integer))
def downgrade():
    op.drop_table("thing")
"""
SECOND = """
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.execute("INSERT INTO example.thing (id) VALUES (1)")
def downgrade():
    op.execute("DELETE FROM thing")
"""
BROKEN = """
from alembic import op
revision = "0003"
down_revision = "0002"
def upgrade():
    op.execute("INSERT INTO thing (id) VALUES (2)")
    op.execute("SELECT 1 / 0")
def downgrade():
    pass
"""


class Settings(ServiceSettings):
    service_name: ClassVar[str] = "example"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    folder = tmp_path / "100% migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "versions" / "0001_things.py").write_text(FIRST)
    return folder


def sqlalchemy_url(dsn: str) -> str:
    return dsn.replace("postgresql://", "postgresql+asyncpg://", 1)


def settings(dsn: str) -> Settings:
    return Settings(database_url=sqlalchemy_url(dsn))


async def query(dsn: str, sql: str) -> list[Any]:
    engine = db.create_engine(sqlalchemy_url(dsn))
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(sql))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        await engine.dispose()


async def test_it_brings_a_schema_to_the_newest_revision_again_and_again(database: str, migrations: Path) -> None:
    migrate.run(settings(database), "example", migrations)
    assert await query(database, "SELECT version_num FROM example.alembic_version") == [("0001",)]
    assert await query(database, "SELECT id FROM example.thing") == []
    migrate.run(settings(database), "example", migrations)
    (migrations / "versions" / "0002_one.py").write_text(SECOND)
    migrate.run(settings(database), "example", migrations)
    assert await query(database, "SELECT id FROM example.thing") == [(1,)]
    tables = await query(database, "SELECT table_schema FROM information_schema.tables WHERE table_name IN ('thing', 'alembic_version')")
    assert tables == [("example",), ("example",)]


async def test_a_revision_that_fails_leaves_nothing_behind(database: str, migrations: Path) -> None:
    migrate.run(settings(database), "example", migrations)
    (migrations / "versions" / "0002_one.py").write_text(SECOND)
    (migrations / "versions" / "0003_broken.py").write_text(BROKEN)
    with pytest.raises(sa_exc.DBAPIError, match="division by zero"):
        migrate.run(settings(database), "example", migrations)
    assert await query(database, "SELECT version_num FROM example.alembic_version") == [("0001",)]
    assert await query(database, "SELECT id FROM example.thing") == []


async def test_several_processes_at_once_apply_it_once(database: str, migrations: Path) -> None:
    (migrations / "versions" / "0002_one.py").write_text(SECOND)
    url = sqlalchemy_url(database)
    await asyncio.gather(*(migrate.upgrade(url, "example", migrations) for _ in range(5)))
    assert await query(database, "SELECT id FROM example.thing") == [(1,)]


async def test_a_role_that_owns_only_its_schema_can_migrate(database: str, migrations: Path) -> None:
    role = f"role_{database.rsplit('_', 1)[1]}"
    await query(database, f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        await query(database, f"CREATE SCHEMA example AUTHORIZATION {role}")
        _, _, place = database.partition("@")
        migrate.run(settings(f"postgresql://{role}:pw@{place}"), "example", migrations)
        assert await query(database, "SELECT version_num FROM example.alembic_version") == [("0001",)]
    finally:
        await query(database, f"DROP OWNED BY {role} CASCADE")
        await query(database, f"DROP ROLE {role}")


def test_a_name_that_is_no_schema_is_refused(migrations: Path) -> None:
    with pytest.raises(ValueError, match="schema"):
        migrate.run(Settings(database_url="postgresql+asyncpg://x/y"), 'ex"ample', migrations)
    with pytest.raises(ValueError, match="HEADRACE_DATABASE_URL"):
        migrate.run(Settings(), "example", migrations)


async def failure(engine: AsyncEngine, sql: str) -> BaseException:
    try:
        async with engine.begin() as connection:
            await connection.execute(text(sql))
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


async def test_which_errors_pass(database: str) -> None:
    engine = db.create_engine(sqlalchemy_url(database), pool_size=3)
    try:
        assert not db.is_transient(await failure(engine, "SELECT 1 / 0"))
        assert not db.is_transient(await failure(engine, "SELECT * FROM nowhere"))
        for state in ("40001", "40P01", "53300", "57P01", "57P03"):
            error = await failure(engine, f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$")
            assert db.is_transient(error), state
            assert type(db.translate(error)) is Unavailable
        terminated = await failure(engine, "SELECT pg_terminate_backend(pg_backend_pid())")
        assert db.is_transient(terminated)
        # The connection died; the next caller must not see it.
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT current_setting('TimeZone')")) == "UTC"
    finally:
        await engine.dispose()


async def test_a_text_that_no_database_holds_is_the_callers_fault(database: str) -> None:
    engine = db.create_engine(sqlalchemy_url(database))
    try:
        async with engine.connect() as connection:
            with pytest.raises(sa_exc.DBAPIError) as failed:
                await connection.execute(text("SELECT length(CAST(:name AS text))"), {"name": "a\x00b"})
        assert type(db.translate(failed.value)) is Invalid
        assert not db.is_transient(failed.value)
        assert type(db.translate(await failure(engine, "SELECT 1 / 0"))) is not Invalid
    finally:
        await engine.dispose()


async def test_no_free_connection_passes(database: str) -> None:
    engine = db.create_engine(sqlalchemy_url(database), pool_size=1)
    engine.pool._timeout = 0.05  # type: ignore[attr-defined]  # the pool offers no setter, and 10 s are too long for a test
    try:
        async with engine.connect():
            error = await failure(engine, "SELECT 1")
    finally:
        await engine.dispose()
    assert type(db.translate(error)) is Unavailable


async def test_a_server_that_is_away_passes_and_comes_back(own_postgres: Callable[[], Any]) -> None:
    server = own_postgres()
    engine = db.create_engine(sqlalchemy_url(server.dsn))
    try:
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        crash(server)
        error = await failure(engine, "SELECT 1")
        translated = db.translate(error)
        assert type(translated) is Unavailable, repr(error)
        assert "127.0.0.1" not in str(translated)
        restart(server)
        async with asyncio.timeout(30):
            while True:
                try:
                    async with engine.connect() as connection:
                        assert await connection.scalar(text("SELECT 1")) == 1
                    break
                except Exception as error:
                    if not db.is_transient(error):
                        raise
                    await asyncio.sleep(0.02)
    finally:
        await engine.dispose()


@contextlib.contextmanager
def frozen(server: Any) -> Iterator[None]:
    """Stops the server and all of its processes as they are: links stay, and nothing answers."""
    lines = (server.directory / "data" / "postmaster.pid").read_text().splitlines()
    postmaster = psutil.Process(int(lines[0]))
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


async def test_a_server_that_hangs_is_given_up_and_comes_back(own_postgres: Callable[[], Any]) -> None:
    server = own_postgres()
    engine = db.create_engine(sqlalchemy_url(server.dsn), pool_size=1, command_timeout_s=1)
    watching = db.create_engine(sqlalchemy_url(server.dsn), pool_size=1)
    try:
        assert await failure(engine, "SELECT 1 / 0")
        running = asyncio.create_task(failure(engine, "SELECT pg_sleep(600)"))
        async with asyncio.timeout(30), watching.connect() as connection:
            begun = 0
            while not begun:
                await asyncio.sleep(0.02)
                begun = await connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'"))
        with frozen(server):
            async with asyncio.timeout(60):
                error = await running
                again = await failure(engine, "SELECT 1")
        for one in (error, again):
            assert type(db.translate(one)) is Unavailable, repr(one)
            assert passes(one)
        async with asyncio.timeout(30), engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
    finally:
        await engine.dispose()
        await watching.dispose()


async def test_the_system_watches_the_link(database: str) -> None:
    engine = db.create_engine(sqlalchemy_url(database))
    try:
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            link = raw.driver_connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
            assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert 0 < link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000
    finally:
        await engine.dispose()


def test_errors_of_others_are_left_alone() -> None:
    assert not db.is_transient(ValueError("x"))
    ours = HeadraceError("x")
    assert db.translate(ours) is ours


PROGRAM = """
import sys
from pathlib import Path
from typing import ClassVar
from servicekit.main import main
from servicekit.settings import ServiceSettings

class Settings(ServiceSettings):
    service_name: ClassVar[str] = "example"

def build(settings):
    raise AssertionError("only a run builds")

main(Settings, build, Path(sys.argv[1]), argv=sys.argv[2:])
"""


def run_program(url: str, migrations: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")} | {"HEADRACE_DATABASE_URL": url}
    command = [sys.executable, "-c", PROGRAM, str(migrations), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


async def test_migrate_is_a_command(database: str, migrations: Path) -> None:
    done = await asyncio.to_thread(run_program, sqlalchemy_url(database), migrations, "migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert await query(database, "SELECT version_num FROM example.alembic_version") == [("0001",)]


def test_a_migration_that_fails_says_so_in_the_log(migrations: Path) -> None:
    done = run_program("postgresql+asyncpg://nobody:hunter2@127.0.0.1:1/none", migrations, "migrate")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout.splitlines()[-1])["level"] == "CRITICAL"
    assert "hunter2" not in done.stdout
