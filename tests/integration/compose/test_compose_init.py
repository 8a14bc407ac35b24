"""The set-up job of docker-compose.yml on real PostgreSQL, Kafka and MinIO: what it makes works, and again changes nothing."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from artifacts import S3Location
from artifacts.s3 import S3Store
from eventing.kafka import KafkaBroker
from eventing.topics import TOPICS
from servicekit.errors import Forbidden

ROOT = Path(__file__).parents[3]
SERVICES = ("tracker", "registry", "trainer", "evaluator", "deployer")


async def run(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def test_it_makes_what_the_services_need_and_can_be_run_again(
    own_postgres: Callable[[], Any], own_kafka: Callable[[], Any], minio_server: S3Location, tmp_path: Path
) -> None:
    postgres, kafka = await asyncio.to_thread(own_postgres), await asyncio.to_thread(own_kafka)
    server = urlsplit(postgres.dsn)
    postgres.sql("CREATE DATABASE headrace")
    folder = tmp_path / "secrets"
    await run(ROOT / "scripts" / "compose_secrets", folder)
    # These servers have passwords and addresses of their own already.
    (folder / "postgres_password").write_text(server.password or "")
    (folder / "s3_root_password").write_text(minio_server.secret_key)
    for file in folder.glob("*_database_url"):
        file.write_text(file.read_text().replace("postgres:5432", f"{server.hostname}:{server.port}"))
    bucket = f"init-{secrets.token_hex(4)}"
    address = f"{server.hostname}:{server.port}"
    options = [f"--postgres={address}", f"--kafka={kafka.bootstrap}", f"--s3={minio_server.endpoint}", f"--bucket={bucket}"]
    options += [f"--s3-root-user={minio_server.access_key}", f"--secrets={folder}"]
    for _ in range(2):
        await run(ROOT / "deploy" / "compose" / "init.py", *options)

    for service in SERVICES:
        url = (folder / f"{service}_database_url").read_text().strip().replace("+asyncpg", "")
        connection = await asyncpg.connect(url)
        try:
            assert await connection.fetchval("SELECT count(*) FROM outbox") == 0
            stranger = next(other for other in SERVICES if other != service)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetchval(f"SELECT count(*) FROM {stranger}.outbox")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("CREATE SCHEMA mine")
        finally:
            await connection.close()

    broker = KafkaBroker(kafka.bootstrap, "test")
    try:
        found = await broker.topics()
    finally:
        await broker.close()
    assert {topic.name: topic.partitions for topic in TOPICS}.items() <= dict(found).items()

    key = (folder / "s3_secret_key").read_text().strip()
    ours = S3Store(S3Location(minio_server.endpoint, "services", key, bucket))
    theirs = S3Store(S3Location(minio_server.endpoint, "services", key, minio_server.bucket))
    try:
        stored = await ours.put("a/b", b"bytes")
        assert await ours.read("a/b", sha256=stored.sha256, max_bytes=10) == b"bytes"
        await ours.delete("a/b")
        with pytest.raises(Forbidden):
            await theirs.put("a/b", b"bytes")
    finally:
        await ours.stop()
        await theirs.stop()
