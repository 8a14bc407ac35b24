"""The relay: one is active, it wakes at once, it comes back by itself, it keeps house."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest
from eventing import relay as relay_module
from eventing import schema, topics
from eventing.broker import Partition
from eventing.memory import MemoryBroker
from eventing.outbox import Outbox
from eventing.partitioning import partition_of
from eventing.relay import Relay
from eventing.topics import ensure_topics
from servicekit.errors import Unavailable
from sqlalchemy import text


def stored(broker, key, topic=topics.RUNS, partitions=12):
    """The sequences of a key as they stand in the memory broker's log."""
    log = broker.log(Partition(topic, partition_of(key.encode(), partitions)))
    return [int(dict(record.headers)["ce_sequence"]) for record in log.records if record.key == key.encode()]


async def test_of_two_relays_one_is_active_and_the_other_takes_over(local, until):
    relays = [await local.relay(), await local.relay()]
    await until(lambda: sorted(relay.active for relay in relays), [False, True])
    await until(lambda: [relay.ready() for relay in relays], [None, None])
    for n in range(1, 6):
        await local.emit("run")
        await until(lambda n=n: stored(local.broker, "run"), list(range(1, n + 1)))
    first, second = sorted(relays, key=lambda relay: not relay.active)
    await first.stop()
    await first.wait()
    await until(lambda: second.active)
    await local.emit("run")
    await until(lambda: stored(local.broker, "run"), [1, 2, 3, 4, 5, 6])


async def test_a_relay_whose_connection_is_cut_comes_back(local, until, counters):
    relay = await local.relay()
    await until(lambda: relay.active)
    before = counters.total("eventing.relay.failures", schema="alpha")
    killed = await local.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'relay alpha/0'")
    assert killed == [(True,)]
    await until(lambda: counters.total("eventing.relay.failures", schema="alpha"), before + 1)
    await local.emit("run")
    await until(lambda: stored(local.broker, "run"), [1])
    await until(lambda: (relay.active, relay.ready()), (True, None))


async def test_a_relay_whose_broker_was_away_sends_what_waited_in_order(local, until):
    relay = await local.relay()
    await until(lambda: relay.active)
    local.broker.available = False
    for _ in range(5):
        await local.emit("run")
    await until(lambda: relay.ready() is not None)
    assert "away" in relay.ready()
    local.broker.available = True
    await until(lambda: stored(local.broker, "run"), [1, 2, 3, 4, 5])
    await until(lambda: relay.ready(), None)


class Halting(MemoryBroker):
    """A broker that takes the first records of a batch and fails on the rest, once."""

    takes = 3

    def producer(self, *, best_effort=False):
        producer = super().producer(best_effort=best_effort)
        send = producer.send

        async def halting(records, timeout_s=30.0):
            if self.takes is None:
                return await send(records, timeout_s)
            count, self.takes = self.takes, None
            return [*await send(records[:count], timeout_s), *[Unavailable("not these")] * (len(records) - count)]

        producer.send = halting
        return producer


async def test_only_what_was_acknowledged_is_marked(database, make_service, until):
    service = await make_service(database.sqlalchemy, Halting())
    async with service.engine.begin() as conn:
        await service.outbox.append(conn, [service.event("run", n) for n in range(1, 9)])
    await service.relay()
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    assert stored(service.broker, "run") == [1, 2, 3, 4, 5, 6, 7, 8]


async def test_an_event_wakes_the_relay_in_its_own_process_and_in_another(local, until, monkeypatch):
    """With the poll as good as switched off only the wake-ups are left."""
    monkeypatch.setattr(relay_module, "POLL_S", 3600.0)
    active = await local.relay()
    await until(lambda: active.active)
    await local.emit("run")
    await until(lambda: stored(local.broker, "run"), [1])
    # A replica of the service, whose relay is the waiting one: it passes the wake-up on.
    replica = Outbox(local.tables)
    waiting = await local.relay(outbox=replica)
    await until(lambda: waiting.ready(), None)
    async with local.engine.begin() as conn:
        await replica.append(conn, [local.event("run", 2)])
    replica.committed()
    await until(lambda: stored(local.broker, "run"), [1, 2])
    assert not waiting.active


async def test_an_event_of_which_nobody_tells_is_found_by_the_poll(local, until):
    await local.relay()
    async with local.engine.begin() as conn:
        await local.outbox.append(conn, [local.event("run", 1)])
    await until(lambda: stored(local.broker, "run"), [1])


async def test_sent_events_are_kept_for_a_time_and_then_pruned(local, until, monkeypatch, counters):
    monkeypatch.setattr(relay_module, "_HOUSEKEEPING_S", 0.0)
    monkeypatch.setattr(relay_module, "_PRUNE_ROWS", 3)
    before = counters.total("eventing.outbox.pruned", schema="alpha")
    for _ in range(8):
        await local.emit("run")
    relay = await local.relay(keep_sent=timedelta(days=7))
    await until(lambda: stored(local.broker, "run"), list(range(1, 9)))
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    assert await local.scalar("SELECT count(*) FROM {s}.outbox") == 8
    await relay.stop()
    async with local.engine.begin() as conn:
        await conn.execute(text("UPDATE alpha.outbox SET sent_at = sent_at - interval '8 days' WHERE sequence < 8"))
    await local.relay(keep_sent=timedelta(days=7))
    await until(lambda: local.rows("SELECT sequence FROM {s}.outbox ORDER BY id"), [(8,)])
    await until(lambda: counters.total("eventing.outbox.pruned", schema="alpha"), before + 7)


async def test_depth_and_age_of_the_outbox_are_told(local, until, monkeypatch, counters):
    monkeypatch.setattr(relay_module, "_HOUSEKEEPING_S", 0.0)
    async with local.engine.begin() as conn:
        await local.outbox.append(conn, [local.event("run", n) for n in range(1, 4)])
        await conn.execute(text("UPDATE alpha.outbox SET created_at = created_at - interval '1 hour'"))
    send = asyncio.Event()

    class Slow(MemoryBroker):
        def producer(self, *, best_effort=False):
            producer = super().producer(best_effort=best_effort)
            deliver = producer.send

            async def waiting(records, timeout_s=30.0):
                if not send.is_set():
                    return [Unavailable("not yet")] * len(records)
                return await deliver(records, timeout_s)

            producer.send = waiting
            return producer

    broker = Slow()
    await ensure_topics(broker)
    relay = Relay(local.url, "alpha", broker, "/test", create_topics=False)
    conn = await asyncpg.connect(local.url.replace("postgresql+asyncpg", "postgresql"))
    try:
        await relay._keep_house(conn)
        assert counters.total("eventing.outbox.depth", schema="alpha") == 3
        assert counters.total("eventing.outbox.age", schema="alpha") >= 3600
        send.set()
        await relay.start()
        await until(lambda: counters.total("eventing.outbox.depth", schema="alpha"), 0.0)
        assert counters.total("eventing.relay.active", schema="alpha") == 1
    finally:
        await relay.stop()
        await conn.close()
    assert counters.total("eventing.relay.active", schema="alpha") == 0


async def test_large_events_are_read_in_rounds_that_fit_the_memory(local, until, monkeypatch):
    rounds = []

    class Counting(MemoryBroker):
        def producer(self, *, best_effort=False):
            producer = super().producer(best_effort=best_effort)
            send = producer.send

            async def counting(records, timeout_s=30.0):
                rounds.append(len(records))
                return await send(records, timeout_s)

            producer.send = counting
            return producer

    local.broker = Counting()
    await ensure_topics(local.broker)
    async with local.engine.begin() as conn:
        await local.outbox.append(conn, [local.event("run", n, payload=bytes(900_000)) for n in range(1, 13)])
    await local.relay()
    await until(lambda: stored(local.broker, "run"), list(range(1, 13)))
    assert rounds == [5, 5, 2]


async def test_a_schema_without_the_tables_stops_the_relay_loudly(database):
    relay = Relay(database.sqlalchemy, "nowhere", MemoryBroker(), "/test")
    await relay.start()
    async with asyncio.timeout(20):
        with pytest.raises(asyncpg.UndefinedTableError):
            await relay.wait()
    assert "nowhere" in relay.ready()


async def test_tables_are_made_and_dropped_by_a_revision(local):
    async with local.engine.begin() as conn:
        await conn.run_sync(lambda sync: schema.drop(sync, "alpha"))
        left = (await conn.execute(text("SELECT table_name FROM information_schema.tables WHERE table_schema = 'alpha'"))).fetchall()
    assert {row[0] for row in left} == {"counter", "effect"}


async def test_a_sequence_cannot_be_used_twice(local):
    await local.emit("run")
    with pytest.raises(Exception, match="outbox_sequence"):
        async with local.engine.begin() as conn:
            await local.outbox.append(conn, [local.event("run", 1)])
