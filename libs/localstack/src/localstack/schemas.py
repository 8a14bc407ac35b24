"""What the services find when they start: a role and a schema each, with all migrations, and the topics.

The supervisor runs `python -m localstack.schemas`: one process for all, because importing Alembic six times would take
longer than the work.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from localstack.cache import repository
from localstack.postgres import Postgres

DATABASE = "headrace"
_VARIABLE = "HEADRACE_LOCALSTACK_TARGETS"


def make_roles(postgres: Postgres, passwords: Mapping[str, str]) -> None:
    """The database, and per service a role that owns the schema of its name and has no right to anything else. Blocks; may be repeated.

    Raises StackError.
    """
    if postgres.sql("SELECT 1 FROM pg_database WHERE datname = :'name'", variables={"name": DATABASE}) != "1":
        postgres.sql('CREATE DATABASE :"name"', variables={"name": DATABASE})
    statements = [
        "CREATE SCHEMA IF NOT EXISTS localstack;",
        "CREATE TABLE IF NOT EXISTS localstack.done (fingerprint text PRIMARY KEY);",
        f'REVOKE ALL ON DATABASE "{DATABASE}" FROM PUBLIC;',
        "REVOKE ALL ON SCHEMA public FROM PUBLIC;",
    ]
    variables = {}
    for name, password in passwords.items():  # the names are those of our own table of services
        variables[f"password_{name}"] = password
        statements += [
            f"SELECT 'CREATE ROLE {name} LOGIN' WHERE NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = '{name}') \\gexec",  # noqa: S608
            f"ALTER ROLE {name} PASSWORD :'password_{name}';",
            f'GRANT CONNECT ON DATABASE "{DATABASE}" TO {name};',
            f"CREATE SCHEMA IF NOT EXISTS {name} AUTHORIZATION {name};",
            f'ALTER ROLE {name} IN DATABASE "{DATABASE}" SET search_path = {name};',
        ]
    postgres.sql("\n".join(statements) + "\n", database=DATABASE, variables=variables)


def migrations(service: str) -> Path:
    """The folder with a service's migrations."""
    return repository() / "services" / service / "migrations"


def fingerprint(kafka_cluster: str) -> str:
    """Changes when a migration, a shared table, a topic or the Kafka cluster does."""
    root = repository()
    files = sorted(root.glob("services/*/migrations/**/*.py"))
    files += [root / "libs" / "eventing" / "src" / "eventing" / name for name in ("schema.py", "topics.py")]
    files += [root / "libs" / "jobs" / "src" / "jobs" / "schema.py"]
    digest = hashlib.sha256(kafka_cluster.encode())
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def is_done(postgres: Postgres, mark: str) -> bool:
    """Whether this was done already: kept in the database, so that it shares its fate. Raises StackError."""
    return postgres.sql("SELECT 1 FROM localstack.done WHERE fingerprint = :'mark'", database=DATABASE, variables={"mark": mark}) == "1"


def record_done(postgres: Postgres, mark: str) -> None:
    """Remembers that it was done. Raises StackError."""
    script = "INSERT INTO localstack.done VALUES (:'mark') ON CONFLICT DO NOTHING"
    postgres.sql(script, database=DATABASE, variables={"mark": mark})


def command() -> list[str]:
    """The command that migrates and makes topics; see `targets` for its environment."""
    return [sys.executable, "-m", "localstack.schemas"]


def targets(databases: Mapping[str, str], kafka: str) -> dict[str, str]:
    """The environment of `command`: SQLAlchemy URL by service, and the broker."""
    return {_VARIABLE: json.dumps({"databases": dict(databases), "kafka": kafka})}


async def _work(databases: Mapping[str, str], kafka: str) -> None:
    from eventing.kafka import KafkaBroker
    from eventing.topics import ensure_topics
    from servicekit import migrate

    async def topics() -> None:
        broker = KafkaBroker(kafka, "localstack")
        try:
            await ensure_topics(broker, "")
        finally:
            await broker.close()

    async def schemas() -> None:
        for name, url in databases.items():
            if (migrations(name) / "versions").is_dir():
                await migrate.upgrade(url, name, migrations(name))

    await asyncio.gather(topics(), schemas())


def main() -> None:
    given = json.loads(os.environ[_VARIABLE])
    asyncio.run(_work(given["databases"], given["kafka"]))


if __name__ == "__main__":
    main()
