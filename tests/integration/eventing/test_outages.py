"""Servers that die and come back under relays and consumers: everything goes on by itself, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import shutil

from eventing import topics
from eventing.__main__ import main
from eventing.background import Background
from eventing.broker import WrongCluster
from eventing.kafka import KafkaBroker
from eventing.topics import ensure_topics
from localstack import server
from localstack.cache import Silent

OUTAGE_S = 3.0


async def test_everything_resumes_after_the_broker_and_the_database_died(own_postgres, own_kafka, make_service, until):
    postgres, kafka = own_postgres(), own_kafka()
    broker = KafkaBroker(kafka.bootstrap, "test", session_timeout_s=2.0, request_timeout_s=5.0)
    service = await make_service(postgres.dsn.replace("postgresql:", "postgresql+asyncpg:"), broker)
    relay = await service.relay()
    consumer = await service.consume()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1])

    server.crash(kafka)
    for _ in range(3):
        await service.emit("run")  # the business goes on without a broker
    await until(lambda: relay.ready() is not None)
    await asyncio.sleep(OUTAGE_S)
    await asyncio.to_thread(server.restart, kafka)
    await until(lambda: service.effects("run"), [1, 2, 3, 4], deadline_s=60)

    server.crash(postgres)
    await until(lambda: relay.ready() is not None)
    await asyncio.sleep(OUTAGE_S)
    await asyncio.to_thread(server.restart, postgres)
    await service.engine.dispose()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1, 2, 3, 4, 5], deadline_s=60)
    await until(lambda: (relay.ready(), consumer.ready()), (None, None), deadline_s=60)


async def test_a_stop_returns_while_the_broker_is_dead(own_kafka, database, make_service, until):
    kafka = own_kafka()
    service = await make_service(database.sqlalchemy, KafkaBroker(kafka.bootstrap, "test", session_timeout_s=2.0, request_timeout_s=5.0))
    relay = await service.relay()
    consumer = await service.consume()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1])
    server.crash(kafka)
    await service.emit("run")
    async with asyncio.timeout(60):
        await asyncio.gather(relay.stop(), consumer.stop())
        await relay.wait()
        await consumer.wait()
    assert await service.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL") == 1


async def test_kafka_wiped_under_a_kept_database_stops_loudly(own_kafka, database, make_service, until, monkeypatch, capsys):
    kafka = own_kafka()
    service = await make_service(database.sqlalchemy, KafkaBroker(kafka.bootstrap, "test", session_timeout_s=2.0, request_timeout_s=5.0))
    await service.relay()
    running = await service.consume()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1])

    await asyncio.to_thread(kafka.stop)
    await asyncio.to_thread(shutil.rmtree, kafka.directory)
    await asyncio.to_thread(server.run, kafka, Silent())
    await ensure_topics(service.broker)

    async def stopped(component: Background) -> str:
        async with asyncio.timeout(60):
            try:
                await component.wait()
            except WrongCluster as exc:
                return str(exc)
        return "it ended quietly"

    assert "wiped under a database that was kept" in await stopped(running)
    assert "wiped under a database that was kept" in await stopped(await service.consume())
    assert "wiped under a database that was kept" in await stopped(await service.relay())
    assert await service.effects("run") == [1]

    # What an operator does then.
    monkeypatch.setenv("HEADRACE_DATABASE_URL", database.sqlalchemy)
    monkeypatch.setenv("HEADRACE_KAFKA_BOOTSTRAP", kafka.bootstrap)
    await asyncio.to_thread(main, ["adopt-cluster", "alpha"])
    assert capsys.readouterr().out == f"alpha goes on with cluster {kafka.cluster_id}; 1 events will be published again\n"
    await service.relay()
    await service.consume()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1, 2])
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    await asyncio.to_thread(main, ["republish", "alpha", "--since", "2020-01-01", "--topic", topics.RUNS])
    assert capsys.readouterr().out == "2 events will be published again\n"
