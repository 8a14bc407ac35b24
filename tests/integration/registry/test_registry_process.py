"""`python -m registry` as it is run: migrated by command, started from settings alone on real servers, stopped by SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contracts.registry.v1 import events_pb2, service_pb2, service_pb2_grpc
from eventing import topics
from eventing.envelope import Received
from eventing.kafka import KafkaBroker
from eventing.snapshots import SnapshotReader
from pydantic import SecretStr
from registry.settings import RegistrySettings
from servicekit.access import Caller, new_service_token
from servicekit.rpc import acting_for, channel


async def run(environment: dict[str, str], *arguments: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "registry", *arguments]
    return await asyncio.create_subprocess_exec(*command, env=os.environ | environment, stdout=asyncio.subprocess.PIPE)


@pytest.fixture
async def started(database: Any, stack_servers: Any, topic_prefix: str, tmp_path: Path) -> AsyncIterator[tuple[dict[str, Any], str]]:
    """The ports that a started registry announced, and the gateway's token; afterwards it must end well on SIGTERM."""
    token, digest = new_service_token("gateway")
    environment = {
        "HEADRACE_DATABASE_URL": database.sqlalchemy,
        "HEADRACE_KAFKA_BOOTSTRAP": stack_servers.kafka,
        "HEADRACE_TOPIC_PREFIX": topic_prefix,
        "HEADRACE_SERVICE_TOKEN_HASHES": f"gateway={digest}",
        "HEADRACE_BOOTSTRAP_ADMIN_KEY_HASH": f"first:{'a' * 64}",
    }
    migrated = await run(environment, "migrate")
    await migrated.communicate()
    assert migrated.returncode == 0
    announced = tmp_path / "ports"
    process = await run(environment, "--announce", str(announced))
    try:
        async with asyncio.timeout(60):
            while not announced.exists():
                assert process.returncode is None, "it ended before it listened"
                await asyncio.sleep(0.05)
        yield json.loads(announced.read_text()), token
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0


async def test_it_starts_from_settings_alone_and_tells_kafka(
    started: tuple[dict[str, Any], str], stack_servers: Any, topic_prefix: str
) -> None:
    ports, token = started
    found: asyncio.Future[events_pb2.AccessChanged] = asyncio.get_running_loop().create_future()

    def on_record(key: str, record: Received | None) -> None:
        if key == "first" and record is not None and not found.done():
            found.set_result(events_pb2.AccessChanged.FromString(record.payload))

    broker = KafkaBroker(stack_servers.kafka, "test")
    reader = SnapshotReader(broker, topics.ACCESS, on_record, topic_prefix)
    await reader.start()
    try:
        async with asyncio.timeout(60):
            snapshot = await found
    finally:
        await reader.stop()
        await broker.close()
    assert snapshot.hash == "a" * 64
    connection = channel(f"127.0.0.1:{ports['grpc']}", RegistrySettings(service_token=SecretStr(token)))
    try:
        with acting_for(Caller("gateway", "root", frozenset({"admin"}))):
            keys = await service_pb2_grpc.AccessServiceStub(connection).ListApiKeys(service_pb2.ListApiKeysRequest(), timeout=20)
    finally:
        await connection.close()
    assert [key.key_id for key in keys.keys] == ["first"]
