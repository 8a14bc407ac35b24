"""The Kafka adapter where the memory broker has no counterpart: refused connections, records that aiokafka chokes on."""

from __future__ import annotations

import asyncio
import signal
import socket

import pytest
from aiokafka import errors as kafka_errors
from eventing import topics
from eventing.broker import Partition, Record, TopicSpec
from eventing.kafka import KafkaBroker
from localstack import server
from servicekit.errors import Unavailable


@pytest.fixture
async def nobody():
    """A broker that is not there: a port that is taken, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        broker = KafkaBroker(f"127.0.0.1:{taken.getsockname()[1]}", "test", request_timeout_s=1.0)
        yield broker
        await broker.close()


async def test_a_broker_that_is_not_there_is_unavailable_to_every_question(nobody):
    for ask in (
        nobody.cluster_id(),
        nobody.topics(),
        nobody.create_topics([TopicSpec("t", 1)]),
        nobody.offsets([Partition("t", 0)]),
        nobody.producer().start(),
        nobody.producer(best_effort=True).start(),
        nobody.reader(["t"]).start(),
        nobody.group_reader("g", ["t"]).start(),
        topics.ensure_topics(nobody),
    ):
        with pytest.raises(Unavailable):
            await ask


async def test_what_is_not_started_cannot_be_used(nobody):
    with pytest.raises(RuntimeError, match="producer is not started"):
        await nobody.producer().send([Record("t", b"k", b"v", (), 1)])
    with pytest.raises(RuntimeError, match="reader is not started"):
        await nobody.reader(["t"]).poll(1, 0.1)


async def test_a_server_that_never_answers_costs_the_time_out_and_no_more():
    async def silent(reader, writer):
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        broker = KafkaBroker(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "test", request_timeout_s=0.3)
        async with asyncio.timeout(20):
            for ask in (broker.cluster_id(), broker.offsets([Partition("t", 0)])):
                with pytest.raises(Unavailable):
                    await ask
            producer = broker.producer()
            with pytest.raises(Unavailable):
                await producer.start()
            await producer.stop()


async def test_a_topic_that_the_broker_refuses_is_said(stack_servers, topic_prefix):
    broker = KafkaBroker(stack_servers.kafka, "test")
    with pytest.raises(Unavailable, match="was not created: InvalidReplicationFactorError"):
        await broker.create_topics([TopicSpec(f"{topic_prefix}t", 1, replication=3)])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (kafka_errors.CorruptRecordException("crc"), kafka_errors.CorruptRecordException),
        (kafka_errors.TopicAuthorizationFailedError("t"), kafka_errors.TopicAuthorizationFailedError),
        (kafka_errors.KafkaError("unexpected error in the coordinator"), Unavailable),
        (kafka_errors.NoOffsetForPartitionError("p"), None),
        (kafka_errors.OffsetOutOfRangeError({("t", 5): 3}), None),  # of a partition that was not positioned
    ],
)
async def test_errors_of_a_fetch_are_loud_or_pass(stack_servers, topic_prefix, error, expected):
    broker = KafkaBroker(stack_servers.kafka, "test")
    await broker.create_topics([TopicSpec(f"{topic_prefix}t", 1)])
    reader = broker.reader([f"{topic_prefix}t"])
    await reader.start()
    try:
        assert (await reader.poll(10, 0.1)).assigned == {Partition(f"{topic_prefix}t", 0)}
        async with asyncio.timeout(10):
            while reader._fetching is not None:
                await reader.poll(10, 0.1)
                if reader._fetching is not None and reader._fetching.done():
                    break

        async def failing(**_):
            raise error

        reader._consumer.getmany = failing
        reader._fetching = None
        if expected is None:
            assert (await reader.poll(10, 0.1)).records == []
        else:
            with pytest.raises(expected):
                await reader.poll(10, 0.1)
    finally:
        await reader.stop()


async def test_a_write_that_the_broker_refuses_is_not_acknowledged(stack_servers, topic_prefix):
    broker = KafkaBroker(stack_servers.kafka, "test")
    small = TopicSpec(f"{topic_prefix}small", 1, max_message_bytes=10_000)
    await broker.create_topics([small, TopicSpec(f"{topic_prefix}t", 1)])
    producer = broker.producer()
    await producer.start()
    try:
        records = [Record(f"{topic_prefix}small", b"k", bytes(20_000), (), 1), Record(f"{topic_prefix}t", b"k", b"v", (), 1)]
        refused, taken = await producer.send(records)
        assert isinstance(refused, Unavailable)
        assert "MessageSizeTooLarge" in str(refused)
        assert taken is None
    finally:
        await producer.stop()


async def test_a_producer_ends_with_its_connection_and_sends_nothing_later(own_kafka, until):
    """What was in flight must not reach whichever broker answers later: it may be another one."""
    kafka = own_kafka()
    broker = KafkaBroker(kafka.bootstrap, "test")
    await broker.create_topics([TopicSpec("t", 1)])
    producer = broker.producer()
    await producer.start()
    assert list(await producer.send([Record("t", b"k", b"1", (), 1)])) == [None]
    kafka.child._popen.send_signal(signal.SIGSTOP)  # it accepts, and does not answer
    sending = asyncio.create_task(producer.send([Record("t", b"k", b"2", (), 1)], timeout_s=60))
    connections = producer._producer.client._conns

    def unanswered():
        return {type(request).__name__ for connection in connections.values() for _, request, _ in connection._requests}

    await until(lambda: any(name.startswith("ProduceRequest") for name in unanswered()))
    await asyncio.to_thread(kafka.child.kill)
    async with asyncio.timeout(5):
        (outcome,) = await sending
        assert "the connection broke" in str(outcome)
        assert "the connection broke" in str((await producer.send([Record("t", b"k", b"3", (), 1)]))[0])
        await producer.stop()
    await asyncio.to_thread(server.restart, kafka)
    assert await broker.offsets([Partition("t", 0)]) == {Partition("t", 0): (0, 1)}
    await broker.close()


async def test_a_producer_that_hangs_is_abandoned_in_time(own_kafka):
    kafka = own_kafka()
    broker = KafkaBroker(kafka.bootstrap, "test")
    await broker.create_topics([TopicSpec("t", 1)])
    producer = broker.producer()
    await producer.start()
    kafka.child._popen.send_signal(signal.SIGSTOP)
    (outcome,) = await producer.send([Record("t", b"k", b"v", (), 1)], timeout_s=0.3)
    assert "no acknowledgement within 0.3 s" in str(outcome)
    async with asyncio.timeout(10):
        await producer.stop()
