"""What every broker behind the port must do: one suite, run on the memory broker and on a real Kafka."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
from eventing import topics
from eventing.besteffort import BestEffortConsumer, BestEffortProducer
from eventing.broker import OffsetOutOfRange, Partition, Record, TopicSpec
from eventing.envelope import Event, encode_headers
from eventing.kafka import KafkaBroker
from eventing.memory import MemoryBroker
from eventing.partitioning import partition_of
from eventing.snapshots import SnapshotReader
from servicekit.clock import SystemIds
from servicekit.errors import Invalid, Unavailable

DEADLINE_S = 30.0


def record(topic, key, value=b"value", headers=(("ce_type", b"t"), ("twice", b"1"), ("twice", b"2")), timestamp_ms=1_700_000_000_123):
    return Record(topic, key.encode(), value, headers, timestamp_ms)


async def until(question, wanted=True):
    async with asyncio.timeout(DEADLINE_S):
        while question() != wanted:  # noqa: ASYNC110 - the questions are of many kinds
            await asyncio.sleep(0.02)


class BrokerContract:
    """The suite. A subclass says which broker, and under which prefix the topics of a test stand."""

    @pytest.fixture
    def prefix(self):
        return f"c{secrets.token_hex(4)}."

    @pytest.fixture
    async def stack(self):
        async with AsyncExitStack() as stack:
            yield stack

    @pytest.fixture
    async def topic(self, broker, prefix):
        """A topic with three partitions."""
        await broker.create_topics([TopicSpec(f"{prefix}events", 3)])
        return f"{prefix}events"

    @pytest.fixture
    async def producer(self, broker, stack):
        producer = broker.producer()
        await producer.start()
        stack.push_async_callback(producer.stop)
        return producer

    async def opened(self, reader, stack):
        """Starts a reader; returns what is assigned to it."""
        await reader.start()
        stack.push_async_callback(reader.stop)
        return await self.assigned(reader)

    async def assigned(self, reader):
        async with asyncio.timeout(DEADLINE_S):
            while True:
                polled = await reader.poll(100, 0.1)
                assert polled.records == []
                if polled.assigned is not None:
                    return polled.assigned

    async def read(self, reader, count):
        records = []
        async with asyncio.timeout(DEADLINE_S):
            while len(records) < count:
                batch = (await reader.poll(100, 0.1)).records
                assert len(batch) <= 100
                records += batch
        return records

    async def test_topics_are_created_once(self, broker, prefix):
        specs = [TopicSpec(f"{prefix}a", 3), TopicSpec(f"{prefix}b", 1, compacted=True, retention_ms=1000)]
        await asyncio.gather(*(broker.create_topics(specs) for _ in range(3)))
        await broker.create_topics([TopicSpec(f"{prefix}a", 7)])
        found = {name: count for name, count in (await broker.topics()).items() if name.startswith(prefix)}
        assert found == {f"{prefix}a": 3, f"{prefix}b": 1}

    async def test_the_table_of_topics_is_made_and_held_to(self, broker, prefix):
        await asyncio.gather(topics.ensure_topics(broker, prefix), topics.ensure_topics(broker, prefix))
        found = await broker.topics()
        assert {spec.name: spec.partitions for spec in topics.specs(prefix)}.items() <= found.items()
        other = f"{prefix}other."
        await broker.create_topics([TopicSpec(f"{other}{topics.RUNS}", 5)])
        with pytest.raises(Invalid, match="has 5 partitions and must have 12"):
            await topics.ensure_topics(broker, other)

    async def test_the_cluster_has_one_id(self, broker):
        assert await broker.cluster_id() == await broker.cluster_id() != ""

    async def test_a_record_arrives_as_it_was_sent(self, broker, topic, producer, stack):
        sent = [record(topic, "kä"), record(topic, "k", b"", headers=(("empty", b""),)), record(topic, "k", bytes(900_000))]
        assert list(await producer.send(sent)) == [None, None, None]
        reader = broker.reader([topic])
        for partition in await self.opened(reader, stack):
            reader.seek(partition, 0)
        got = await self.read(reader, 3)
        for one in sent:
            (match,) = [other for other in got if (other.key, other.value) == (one.key, one.value)]
            assert (match.headers, match.timestamp_ms) == (one.headers, one.timestamp_ms)
            assert match.partition == Partition(topic, partition_of(one.key, 3))

    async def test_a_keys_records_keep_their_order_and_offsets_have_no_holes(self, broker, topic, producer, stack):
        sent = [record(topic, f"key-{n % 7}", f"{n}".encode() + bytes(1500)) for n in range(2500)]
        for start in range(0, 2500, 1250):
            assert set(await producer.send(sent[start : start + 1250])) == {None}
        reader = broker.reader([topic])
        for partition in await self.opened(reader, stack):
            reader.seek(partition, 0)
        got = await self.read(reader, 2500)
        for key in {one.key for one in sent}:
            assert [one.value for one in got if one.key == key] == [one.value for one in sent if one.key == key]
        ends = {}
        for one in got:
            assert one.offset == ends.get(one.partition, 0)
            ends[one.partition] = one.offset + 1
        assert {partition: (0, end) for partition, end in ends.items()} == dict(await broker.offsets(list(ends)))

    async def test_a_missing_topic_fails_its_own_records_alone(self, broker, topic, producer, prefix):
        outcomes = await producer.send([record(topic, "a"), record(f"{prefix}missing", "a"), record(topic, "b")], timeout_s=20.0)
        assert outcomes[0] is None
        assert isinstance(outcomes[1], Unavailable)
        assert outcomes[2] is None

    async def test_a_partition_is_silent_until_it_is_positioned(self, broker, topic, producer, stack):
        await producer.send([record(topic, f"key-{n}") for n in range(30)])
        reader = broker.reader([topic])
        assigned = await self.opened(reader, stack)
        assert assigned == {Partition(topic, n) for n in range(3)}
        assert (await reader.poll(100, 0.3)).records == []
        reader.seek(Partition(topic, 1), 2)
        end = (await broker.offsets([Partition(topic, 1)]))[Partition(topic, 1)][1]
        got = await self.read(reader, end - 2)
        assert [(one.partition, one.offset) for one in got] == [(Partition(topic, 1), n) for n in range(2, end)]
        assert await reader.position(Partition(topic, 1)) == end

    async def test_a_paused_partition_waits_for_its_next_seek(self, broker, topic, producer, stack):
        reader = broker.reader([topic])
        for partition in await self.opened(reader, stack):
            reader.seek(partition, 0)
        first, second = Partition(topic, partition_of(b"key-1", 3)), Partition(topic, partition_of(b"key-2", 3))
        assert first != second
        reader.pause(first)
        await producer.send([record(topic, "key-1"), record(topic, "key-2")])
        assert [one.partition for one in await self.read(reader, 1)] == [second]
        assert (await reader.poll(10, 0.3)).records == []
        reader.seek(first, 0)
        assert [one.partition for one in await self.read(reader, 1)] == [first]
        reader.seek(first, 0)
        reader.seek(second, 0)
        assert {one.partition for one in await self.read(reader, 2)} == {first, second}
        reader.seek(Partition(topic, 99), 0)  # not assigned: passed over
        reader.pause(Partition(topic, 99))

    async def test_new_records_wake_a_poll(self, broker, topic, producer, stack):
        reader = broker.reader([topic])
        for partition in await self.opened(reader, stack):
            reader.seek(partition, 0)
        polling = asyncio.create_task(reader.poll(100, 10 * DEADLINE_S))
        await asyncio.sleep(0)
        assert not polling.done()
        await producer.send([record(topic, "a")])
        async with asyncio.timeout(DEADLINE_S):  # long before the poll itself would end
            assert len((await polling).records) == 1

    async def test_an_offset_that_is_not_there_is_an_error(self, broker, topic, producer, stack):
        await producer.send([record(topic, "a")])
        partition = Partition(topic, partition_of(b"a", 3))
        reader = broker.reader([topic])
        await self.opened(reader, stack)
        reader.seek(partition, 17)
        with pytest.raises(OffsetOutOfRange, match=r"does not hold offset 17") as caught:
            await self.read(reader, 1)
        assert (caught.value.partition, caught.value.offset) == (partition, 17)

    async def test_a_reader_of_a_missing_topic_does_not_start(self, broker, prefix, stack):
        reader = broker.reader([f"{prefix}missing"])
        stack.push_async_callback(reader.stop)
        with pytest.raises(Unavailable, match="missing"):
            await reader.start()

    async def test_the_members_of_a_group_share_and_hand_over(self, broker, topic, producer, stack, prefix):
        await producer.send([record(topic, f"key-{n}") for n in range(9)])
        every = {Partition(topic, n) for n in range(3)}
        first = broker.group_reader(f"{prefix}group", [topic])
        assert await self.opened(first, stack) == every
        for partition in every:
            first.seek(partition, 0)
        await self.read(first, 9)

        second = broker.group_reader(f"{prefix}group", [topic])
        await second.start()
        stack.push_async_callback(second.stop)
        held: dict[int, frozenset[Partition]] = {}

        async def shared():
            for index, reader in enumerate((first, second)):
                polled = await reader.poll(100, 0.1)
                assert polled.records == []  # not positioned since the last assignment
                held[index] = polled.assigned if polled.assigned is not None else held.get(index, frozenset())
            return held[0] | held[1] == every and not held[0] & held[1] and bool(held[0]) and bool(held[1])

        async with asyncio.timeout(DEADLINE_S):
            while not await shared():
                pass
        await second.stop()
        async with asyncio.timeout(DEADLINE_S):
            while await self.assigned(first) != every:
                pass

    async def test_stopping_twice_is_fine(self, broker, topic):
        for one in (broker.producer(), broker.reader([topic]), broker.group_reader("g", [topic])):
            await one.stop()
            await one.start()
            await one.stop()
            await one.stop()

    # What stands on the port: readers of snapshots and best effort.

    def snapshot(self, prefix, key, revision, value=b"x"):
        event = Event("route.changed", topics.ROUTES, key, revision, value, SystemIds().uuid7(), datetime.now(UTC))
        return Record(prefix + topics.ROUTES, key.encode(), value, encode_headers(event, "/test"), 1)

    async def test_snapshots_are_all_read_before_the_reader_is_ready(self, broker, prefix, producer, stack):
        await topics.ensure_topics(broker, prefix)
        await producer.send([self.snapshot(prefix, f"endpoint-{n % 5}", n // 5 + 1) for n in range(50)])
        seen = []

        async def on_record(key, event):
            await asyncio.sleep(0)
            seen.append((key, event.sequence))

        reader = SnapshotReader(broker, topics.ROUTES, on_record, prefix)
        assert "not read to the end" in reader.ready()
        await reader.start()
        stack.push_async_callback(reader.stop)
        async with asyncio.timeout(DEADLINE_S):
            await reader.loaded()
        assert reader.ready() is None
        assert {key: [n for other, n in seen if other == key] for key, _ in seen} == {f"endpoint-{n}": list(range(1, 11)) for n in range(5)}
        await producer.send([self.snapshot(prefix, "endpoint-0", 11)])
        await until(lambda: seen[-1], ("endpoint-0", 11))

    async def test_an_empty_topic_of_snapshots_is_ready_at_once(self, broker, prefix, stack):
        reader = SnapshotReader(broker, topics.ACCESS, lambda key, event: None, prefix)
        await reader.start()
        stack.push_async_callback(reader.stop)
        async with asyncio.timeout(DEADLINE_S):
            await reader.loaded()

    async def test_a_record_that_is_no_snapshot_is_passed_over(self, broker, prefix, producer, stack):
        await topics.ensure_topics(broker, prefix)
        refused = self.snapshot(prefix, "a", 2, b"refused")
        junk = Record(prefix + topics.ROUTES, b"a", b"junk", (), 1)
        await producer.send([self.snapshot(prefix, "a", 1), junk, refused, self.snapshot(prefix, "a", 3)])
        seen = []

        async def on_record(key, event):
            if event.payload == b"refused":
                raise Invalid("no route")
            seen.append(event.sequence)

        reader = SnapshotReader(broker, topics.ROUTES, on_record, prefix)
        await reader.start()
        stack.push_async_callback(reader.stop)
        await until(lambda: seen, [1, 3])
        assert reader.ready() is None

    async def test_best_effort_events_reach_who_is_listening(self, broker, prefix, stack):
        producer = BestEffortProducer(broker, prefix, source="/test/gateway")
        assert producer.send(topics.TRAFFIC, "gateway-1", "traffic.window", b"before anybody listens")
        await producer.start()
        stack.push_async_callback(producer.stop)
        await until(lambda: producer.sent, 1)
        seen = []

        async def handler(event):
            if event.payload == b"wrong":
                raise Invalid("unreadable")
            seen.append(event)

        consumers = [BestEffortConsumer(broker, topics.TRAFFIC, handler, prefix) for _ in range(2)]
        for consumer in consumers:
            assert consumer.ready() is not None
            await consumer.start()
            stack.push_async_callback(consumer.stop)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(consumer.connected() for consumer in consumers))
        for payload in (b"1", b"wrong", b"2"):
            assert producer.send(topics.TRAFFIC, "gateway-1", "traffic.window", payload, subject="flights")
        await until(lambda: sorted(event.payload for event in seen), [b"1", b"1", b"2", b"2"])
        assert (seen[0].type, seen[0].key, seen[0].source, seen[0].subject, seen[0].sequence) == (
            "traffic.window",
            "gateway-1",
            "/test/gateway",
            "flights",
            0,
        )
        assert [consumer.ready() for consumer in consumers] == [None, None]
        assert (producer.sent, producer.dropped) == (4, 0)


class TestMemoryBroker(BrokerContract):
    @pytest.fixture
    async def broker(self):
        return MemoryBroker()


class TestKafkaBroker(BrokerContract):
    @pytest.fixture
    def prefix(self, topic_prefix):
        return topic_prefix

    @pytest.fixture
    async def broker(self, stack_servers):
        broker = KafkaBroker(stack_servers.kafka, "contract", session_timeout_s=6.0)
        yield broker
        await broker.close()
