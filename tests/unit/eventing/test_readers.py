"""Readers of snapshots and best-effort producers and consumers, while the broker comes and goes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
from eventing import besteffort, topics
from eventing.besteffort import BestEffortConsumer, BestEffortProducer
from eventing.broker import Partition, Record, TopicSpec
from eventing.envelope import Event, encode_headers
from eventing.memory import MemoryBroker
from eventing.partitioning import partition_of
from eventing.snapshots import SnapshotReader
from servicekit.clock import SequentialIds
from servicekit.errors import Invalid, Unavailable


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


async def until(question, wanted=True):
    async with asyncio.timeout(20):
        while question() != wanted:  # noqa: ASYNC110 - the questions are of many kinds
            await asyncio.sleep(0.005)


async def started(component, stack):
    await component.start()
    stack.push_async_callback(component.stop)
    return component


def snapshot(key, revision, topic=topics.ROUTES):
    event = Event("route.changed", topic, key, revision, b"x", SequentialIds().uuid7(), datetime.now(UTC))
    return Record(topic, key.encode(), b"x", encode_headers(event, "/test"), 1)


async def test_snapshots_need_a_compacted_topic():
    with pytest.raises(Invalid, match="not compacted"):
        SnapshotReader(MemoryBroker(), topics.RUNS, lambda key, event: None)


async def test_a_reader_of_snapshots_waits_for_its_broker_and_lives_through_its_loss(stack):
    broker = MemoryBroker()
    broker.available = False
    seen = []
    reader = await started(SnapshotReader(broker, topics.ROUTES, lambda key, event: seen.append((key, event and event.sequence))), stack)
    assert "not read to the end" in reader.ready()
    broker.available = True
    await reader.loaded()
    broker.append(snapshot("a", 1))
    await until(lambda: seen, [("a", 1)])

    broker.available = False
    await until(lambda: reader.ready(), None)  # the table stays as it is
    broker.available = True
    broker.append(snapshot("a", 2))
    await until(lambda: seen[-1], ("a", 2))

    # The broker lost everything: the reader begins anew.
    broker.wipe()
    await until(lambda: topics.ROUTES in broker._topics)
    broker.append(snapshot("a", 7))
    await until(lambda: seen[-1], ("a", 7))

    # Retention took what it stood before: it begins where the log begins now.
    partition = Partition(topics.ROUTES, partition_of(b"a", 4))
    broker.append(snapshot("a", 8))
    broker.append(snapshot("a", 8), tombstone=True)
    await until(lambda: seen[-1], ("a", None))
    broker.delete_before(partition, 9)
    broker.log(partition).end = 9
    await until(lambda: partition in broker._logs and broker.log(partition).start == 9)
    broker.append(snapshot("a", 9))
    await until(lambda: seen[-1], ("a", 9))


async def test_only_what_compaction_left_is_read(stack):
    broker = MemoryBroker()
    await topics.ensure_topics(broker)
    for revision in range(1, 6):
        for key in ("a", "b"):
            broker.append(snapshot(key, revision))
    broker.compact(topics.ROUTES)
    seen = []
    reader = SnapshotReader(broker, topics.ROUTES, lambda key, event: seen.append((key, event.sequence)), create_topics=False)
    await started(reader, stack)
    await reader.loaded()
    assert sorted(seen) == [("a", 5), ("b", 5)]


async def test_a_bug_in_what_is_called_stops_the_reader_loudly(stack):
    broker = MemoryBroker()

    def on_record(key, event):
        raise ZeroDivisionError("a bug")

    reader = await started(SnapshotReader(broker, topics.ROUTES, on_record), stack)
    await reader.loaded()
    broker.append(snapshot("a", 1))
    with pytest.raises(ZeroDivisionError):
        await reader.wait()
    assert "a bug" in reader.ready()


async def test_best_effort_is_for_its_own_topics():
    with pytest.raises(Invalid, match="is durable"):
        BestEffortProducer(MemoryBroker()).send(topics.RUNS, "k", "t", b"")
    with pytest.raises(Invalid, match="is durable"):
        BestEffortConsumer(MemoryBroker(), topics.RUNS, None)


async def test_a_full_queue_sheds_and_counts(stack):
    producer = BestEffortProducer(MemoryBroker(), capacity=3)
    sent = [producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x") for _ in range(5)]
    assert sent == [True, True, True, False, False]
    assert producer.dropped == 2
    await started(producer, stack)
    await until(lambda: producer.sent, 3)


async def test_what_is_queued_at_a_stop_is_sent_if_the_broker_is_there():
    broker = MemoryBroker()
    producer = BestEffortProducer(broker)
    await producer.start()
    for _ in range(1200):
        producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x")
    await producer.stop()
    assert (producer.sent, producer.dropped) == (1200, 0)


async def test_what_is_queued_at_a_stop_is_counted_lost_if_it_is_not():
    broker = MemoryBroker()
    broker.available = False
    producer = BestEffortProducer(broker)
    await producer.start()
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x")
    async with asyncio.timeout(10):
        await producer.stop()
    assert (producer.sent, producer.dropped) == (0, 1)


async def test_a_send_that_fails_loses_its_events_and_the_next_one_works(stack):
    broker = MemoryBroker()
    producer = await started(BestEffortProducer(broker), stack)
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x")
    await until(lambda: producer.sent, 1)
    broker.available = False
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x")
    await until(lambda: producer.dropped, 1)
    broker.available = True
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"x")
    await until(lambda: producer.sent, 2)
    assert producer.dropped == 1


async def test_a_best_effort_consumer_comes_back_and_hears_what_is_sent_from_then_on(stack, monkeypatch):
    monkeypatch.setattr(besteffort, "_POLL_S", 0.01)
    broker = MemoryBroker()
    broker.available = False
    seen = []

    async def handler(event):
        if event.payload == b"busy":
            raise Unavailable("later, or never")
        seen.append(event.payload)

    producer = await started(BestEffortProducer(broker), stack)
    consumer = await started(BestEffortConsumer(broker, topics.TRAFFIC, handler), stack)
    assert "not connected" in consumer.ready()
    broker.available = True
    await consumer.connected()
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"busy")
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"1")
    await until(lambda: seen, [b"1"])
    broker.available = False
    await until(lambda: consumer.ready() is not None)
    broker.available = True
    await until(lambda: consumer.ready(), None)
    producer.send(topics.TRAFFIC, "gateway", "traffic.window", b"2")
    await until(lambda: seen, [b"1", b"2"])


async def test_a_bug_in_a_best_effort_handler_stops_it_loudly(stack):
    broker = MemoryBroker()
    await broker.create_topics([TopicSpec(topics.TRAFFIC, 4)])

    async def handler(event):
        raise ZeroDivisionError("a bug")

    consumer = await started(BestEffortConsumer(broker, topics.TRAFFIC, handler, create_topics=False), stack)
    await consumer.connected()
    broker.append(snapshot("gateway", 1, topics.TRAFFIC))
    with pytest.raises(ZeroDivisionError):
        await consumer.wait()


async def test_a_broker_in_memory_knows_what_it_does_not_have():
    broker = MemoryBroker()
    with pytest.raises(Unavailable, match="no topic"):
        broker.append(snapshot("a", 1))
    with pytest.raises(Unavailable, match="no partition"):
        await broker.offsets([Partition("t", 0)])
