"""What a consumer does when handlers, the database, the broker or another consumer misbehave."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from eventing import topics
from eventing.broker import Fetched, OffsetOutOfRange, Partition, Polled, WrongCluster
from eventing.consumer import Unapplied, UnknownValue
from eventing.dlq import DeadLetters
from eventing.envelope import encode_headers
from eventing.inbox import LostRace, SequenceGap, read
from eventing.memory import MemoryBroker
from eventing.partitioning import partition_of
from eventing.recovery import adopt_cluster
from eventing.topics import ensure_topics
from eventing.watchdog import Stuck
from servicekit.clock import FakeClock
from servicekit.errors import NotFound, Unavailable
from sqlalchemy import exc as sa_exc


def apart(count):
    """Keys of different partitions of the topic of runs."""
    found = {}
    for n in range(1000):
        found.setdefault(partition_of(f"run-{n}".encode(), 12), f"run-{n}")
    return list(found.values())[:count]


async def failure(component):
    """What a component fails with; waits for it."""
    async with asyncio.timeout(20):
        with pytest.raises(Exception) as caught:
            await component.wait()
    assert component.ready() is not None
    return caught.value


class Flaky:
    """A handler that raises what it is told to, for some payloads, a number of times; and then works."""

    def __init__(self, service, errors):
        self._service = service
        self.errors = {payload: list(queue) for payload, queue in errors.items()}
        self.seen = []

    async def __call__(self, conn, event):
        self.seen.append((event.key, event.sequence))
        await self._service.apply(conn, event)
        queue = self.errors.get(event.payload)
        if queue:
            error = queue.pop(0)
            if isinstance(error, str):
                await conn.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'as if' USING ERRCODE = '{error}'; END $$")
            raise error


async def test_a_passing_error_is_tried_again_and_holds_up_its_partition_alone(local, until, counters):
    slow, quick = apart(2)
    handler = Flaky(local, {b"later": [Unavailable("not yet")] * 3})
    before = counters.total("eventing.consumer.retries", consumer="reader")
    for payload in (b"a", b"later", b"b"):
        await local.emit(slow, payload=payload)
        await local.emit(quick, payload=b"x")
    await local.relay()
    await local.consume({"run.finished": handler}, max_backoff_s=0.2)
    await until(lambda: local.effects(quick), [1, 2, 3])
    await until(lambda: local.effects(slow), [1, 2, 3])
    assert handler.errors == {b"later": []}
    assert counters.total("eventing.consumer.retries", consumer="reader") == before + 3
    # The prefix was committed once and not applied again.
    assert handler.seen.count((slow, 3)) == 1


async def test_the_other_partitions_go_on_while_one_waits(local, until):
    stuck, quick = apart(2)
    handler = Flaky(local, {b"never": [Unavailable("for long")] * 1000})
    await local.relay()
    await local.consume({"run.finished": handler}, max_backoff_s=0.1)
    await local.emit(stuck, payload=b"never")
    await until(lambda: handler.seen.count((stuck, 1)) > 3)
    for _ in range(5):
        await local.emit(quick)
    await until(lambda: local.effects(quick), [1, 2, 3, 4, 5])
    assert await local.effects(stuck) == []
    handler.errors.clear()
    await until(lambda: local.effects(stuck), [1])


@pytest.mark.parametrize("state", ["40P01", "40001"])
async def test_a_deadlock_makes_the_batch_run_one_by_one(local, until, state):
    handler = Flaky(local, {b"trouble": [state]})
    for n in range(20):
        await local.emit("run", payload=b"trouble" if n == 10 else b"fine")
    await local.relay()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    await local.consume({"run.finished": handler})
    await until(lambda: local.effects("run"), list(range(1, 21)))
    assert handler.seen.count(("run", 20)) == 1


async def test_a_conflict_at_the_commit_makes_the_batch_run_one_by_one(local, until):
    class Original(Exception):
        sqlstate = "40001"

    sizes = []
    for _ in range(5):
        await local.emit("run")
    await local.relay()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    consumer = local.consumer()
    apply = consumer.inbox.apply

    async def conflicting(batch, *args, **options):
        sizes.append(len(batch))
        if sizes in ([5], [5, 1]):  # the batch, and then its first event alone
            raise sa_exc.DBAPIError("COMMIT", {}, Original())
        return await apply(batch, *args, **options)

    consumer.inbox.apply = conflicting
    await consumer.start()
    await until(lambda: local.effects("run"), [1, 2, 3, 4, 5])
    assert sizes[:2] == [5, 1]


async def test_a_bug_beside_the_handlers_is_loud_too(local, until):
    consumer = local.consumer(watchdog_s=0.1)

    async def broken(partitions):
        raise ZeroDivisionError("a bug")

    await consumer.start()
    await until(lambda: consumer.ready(), None)
    consumer._broker.offsets = broken
    assert isinstance(await failure(consumer), ZeroDivisionError)


async def test_a_partition_that_waits_stays_put_off_when_the_partitions_are_shared_anew(local, until):
    slow, quick = apart(2)
    handler = Flaky(local, {b"later": [Unavailable("not yet")]})
    await local.relay()
    first = await local.consume({"run.finished": handler}, max_backoff_s=0.5)
    await local.emit(slow, payload=b"later")
    await until(lambda: handler.seen, [(slow, 1)])
    second = await local.consume({"run.finished": handler})
    await local.emit(quick)
    await until(lambda: local.effects(quick), [1])
    await until(lambda: local.effects(slow), [1])
    await until(lambda: (first.ready(), second.ready()), (None, None))


async def test_an_event_that_deadlocks_alone_waits_and_is_tried_again(local, until):
    handler = Flaky(local, {b"trouble": ["40P01"] * 3})
    await local.relay()
    await local.consume({"run.finished": handler}, max_backoff_s=0.2)
    await local.emit("run", payload=b"trouble")
    await until(lambda: local.effects("run"), [1])
    assert handler.seen == [("run", 1)] * 4


async def test_a_bug_stops_the_consumer_loudly_after_what_came_before(local, until):
    handler = Flaky(local, {b"bug": [ZeroDivisionError("a bug")] * 10})
    for payload in (b"a", b"b", b"bug", b"c"):
        await local.emit("run", payload=payload)
    await local.relay()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    consumer = await local.consume({"run.finished": handler})
    error = await failure(consumer)
    assert isinstance(error, Unapplied)
    assert "run.finished 3 of headrace.runs run, at headrace.runs[" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert await local.effects("run") == [1, 2]
    # The corrected version goes on where it stopped.
    await local.consume()
    await until(lambda: local.effects("run"), [1, 2, 3, 4])


async def test_a_value_that_this_version_does_not_know_stops_it_after_some_tries(local, until):
    handler = Flaky(local, {b"newer": [UnknownValue("state 7")] * 10})
    await local.relay()
    consumer = await local.consume({"run.finished": handler}, max_backoff_s=0.05)
    await local.emit("run", payload=b"newer")
    error = await failure(consumer)
    assert isinstance(error, Unapplied)
    assert isinstance(error.__cause__, UnknownValue)
    assert handler.seen == [("run", 1)] * 6
    assert await local.effects("run") == []


async def test_several_invalid_events_of_one_batch_are_parked_together(local, until):
    for n in range(12):
        await local.emit(f"run-{n % 4}", payload=b"broken" if n in (1, 2) else b"fine")
    await local.relay()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    await local.consume()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 6)
    assert [await local.effects(f"run-{n}") for n in range(4)] == [[1, 2, 3], [], [], [1, 2, 3]]


async def test_a_lost_event_stops_the_consumer_loudly(local, until):
    async with local.engine.begin() as conn:
        await local.outbox.append(conn, [local.event("run", 1), local.event("run", 3)])
    await local.relay()
    consumer = await local.consume()
    gap = await failure(consumer)
    assert isinstance(gap, SequenceGap)
    assert "run: event 3" in str(gap)
    assert await local.effects("run") == [1]


async def test_a_compacted_topic_has_gaps_by_its_nature(local, until):
    for _ in range(4):
        await local.emit("flights", "delivery.applied", topic=topics.DELIVERIES)
    await local.relay()
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    local.broker.compact(topics.DELIVERIES)
    await local.consume({"delivery.applied": local.apply}, consumes=[topics.DELIVERIES])
    await until(lambda: local.effects("flights"), [4])


async def test_kafka_wiped_under_a_kept_database_stops_loudly(local, until):
    relay = await local.relay()
    consumer = await local.consume()
    await local.emit("run")
    await until(lambda: local.effects("run"), [1])
    await relay.stop()
    await local.emit("run")  # not published yet
    local.broker.wipe()
    await ensure_topics(local.broker)
    error = await failure(consumer)
    assert isinstance(error, WrongCluster)
    assert "wiped" in str(error)
    # And so does what starts later, the relay too: nothing new may stand in a log without what went before it.
    assert isinstance(await failure(await local.consume()), WrongCluster)
    assert isinstance(await failure(await local.relay()), WrongCluster)
    assert await local.effects("run") == [1]
    assert sum(end for _, end in (await local.broker.offsets([Partition(topics.RUNS, n) for n in range(12)])).values()) == 0

    # The operator adopts the new cluster: everything goes on, and nothing happens twice.
    assert await adopt_cluster(local.engine, "alpha", await local.broker.cluster_id()) == 1
    await local.relay()
    await local.consume()
    await local.emit("run")
    await until(lambda: local.effects("run"), [1, 2, 3])


async def test_a_log_that_lost_its_end_stops_loudly(local, until):
    """Wiped, and formatted with the same cluster id: the offsets tell."""
    await local.relay()
    consumer = await local.consume()
    await local.emit("run")
    await until(lambda: local.effects("run"), [1])
    await consumer.stop()
    partition = Partition(topics.RUNS, partition_of(b"run", 12))
    log = local.broker.log(partition)
    log.records.clear()
    log.end = 0
    assert isinstance(await failure(await local.consume()), OffsetOutOfRange)


async def test_a_log_that_lost_its_beginning_stops_loudly(local, until):
    await local.relay()
    for _ in range(3):
        await local.emit("run")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    local.broker.delete_before(Partition(topics.RUNS, partition_of(b"run", 12)), 2)
    assert isinstance(await failure(await local.consume()), OffsetOutOfRange)
    assert await local.effects("run") == []


class Zombies(MemoryBroker):
    """A broker whose groups give every member all partitions: as if each had lost them and did not know yet."""

    def group_reader(self, group, names):
        return self.reader(names)


async def test_a_consumer_that_lost_its_partitions_is_fenced(database, make_service, until, counters):
    service = await make_service(database.sqlalchemy, Zombies())
    before = counters.total("eventing.consumer.fenced", consumer="reader")
    await service.relay()
    for _ in range(2):
        await service.consume()
    count = 0
    async with asyncio.timeout(60):
        while counters.total("eventing.consumer.fenced", consumer="reader") < before + 3:
            count += 1
            await service.emit("run")
    await until(lambda: service.effects("run"), list(range(1, count + 1)))


async def test_two_transactions_from_the_same_position_cannot_both_commit(local, until):
    await local.emit("run")
    consumer = local.consumer()
    partition = Partition(topics.RUNS, partition_of(b"run", 12))
    relay = await local.relay()
    await until(lambda: len(local.broker.log(partition).records), 1)
    await relay.stop()
    cluster = await local.broker.cluster_id()
    positions = await consumer.inbox.positions([partition], cluster)
    batch = [read(local.broker.log(partition).records[0], topics.RUNS, cluster)]
    outcomes = await asyncio.gather(
        *(consumer.inbox.apply(batch, positions, savepoints=False, cluster_id=cluster) for _ in range(4)), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["LostRace", "LostRace", "LostRace", "Outcome"]
    assert await local.effects("run") == [1]
    # The sequence of a key alone would fence too: here the offset was set back, as by a restored backup.
    async with local.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE alpha.consumer_offset SET next_offset = 0")
    outcome = await consumer.inbox.apply(batch, positions, savepoints=False, cluster_id=cluster)
    assert (outcome.applied, outcome.duplicates) == (0, 1)
    with pytest.raises(LostRace):
        await consumer.inbox.apply(batch, positions, savepoints=False, cluster_id=cluster)


async def test_the_sequences_fence_by_themselves(local):
    """Should a key's row change under a transaction in spite of its lock, the transaction must not commit."""
    consumer = local.consumer()
    partition = Partition(topics.RUNS, 0)
    await consumer.inbox.positions([partition], "cluster")

    def batch(sequence):
        event = local.event("run", sequence)
        return [read(Fetched(partition, 0, b"run", b"x", encode_headers(event, "/test"), 0), topics.RUNS, "cluster")]

    async def apply(sequence):
        async with local.engine.begin() as conn:
            await conn.exec_driver_sql("UPDATE alpha.consumer_offset SET next_offset = 0")
        await consumer.inbox.apply(batch(sequence), {partition: 0}, savepoints=False, cluster_id="cluster")

    look = consumer.inbox._keys
    await apply(1)
    for before in (0, 1):  # the key looked new; the key looked as if it stood elsewhere

        async def stale(conn, items, before=before):
            found = await look(conn, items)
            for state in found.values():
                state.sequence = before
            return found

        consumer.inbox._keys = stale
        with pytest.raises(LostRace, match="events of the same keys"):
            await apply(before + 1)
        consumer.inbox._keys = look
        if before == 0:
            await apply(2)
    assert await local.effects("run") == [1, 2]


class Deaf(MemoryBroker):
    """A broker whose readers get their partitions and never a record: the stuck consumer that the watchdog is for."""

    assigned = True

    def group_reader(self, group, names):
        reader = super().group_reader(group, names)
        poll = reader.poll

        async def silent(max_records, timeout_s):
            polled = await poll(max_records, timeout_s)
            return Polled([], polled.assigned if self.assigned or polled.assigned is None else frozenset())

        reader.poll = silent
        return reader


async def test_a_partition_that_has_records_and_does_not_move_ends_the_consumer(database, make_service):
    service = await make_service(database.sqlalchemy, Deaf())
    await service.relay()
    consumer = await service.consume(watchdog_s=0.4)
    await service.emit("run")
    assert isinstance(await failure(consumer), Stuck)


async def test_a_consumer_without_partitions_ends_when_nobody_else_moves_either(database, make_service):
    broker = Deaf()
    broker.assigned = False
    service = await make_service(database.sqlalchemy, broker)
    await service.relay()
    consumer = await service.consume(watchdog_s=0.2)
    await service.emit("run")
    assert isinstance(await failure(consumer), Stuck)


async def test_a_broker_that_was_away_is_no_reason_to_end(local, until):
    clock = FakeClock()
    looks = 0
    ask = local.broker.topics

    async def counting():
        nonlocal looks
        looks += 1
        return await ask()

    local.broker.topics = counting  # what the watchdog asks first while nothing is assigned
    await local.relay()
    consumer = await local.consume(watchdog_s=0.2, clock=clock)
    await local.emit("run")
    await until(lambda: local.effects("run"), [1])
    local.broker.available = False
    await local.emit("run")
    await until(lambda: consumer.ready() is not None)
    for _ in range(3):
        clock.advance(3600)
        before = looks
        await until(lambda before=before: looks > before)
    local.broker.available = True
    await until(lambda: local.effects("run"), [1, 2])
    await until(lambda: consumer.ready(), None)


async def test_a_handler_that_hangs_is_cancelled_at_the_stop_and_leaves_nothing(local, until):
    entered = asyncio.Event()

    async def hang(conn, event):
        await local.apply(conn, event)
        entered.set()
        await asyncio.Event().wait()

    await local.relay()
    consumer = await local.consume({"run.finished": hang})
    await local.emit("run")
    await entered.wait()
    async with asyncio.timeout(15):
        await consumer.stop()
        await consumer.wait()
    assert await local.effects("run") == []
    held = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    await until(lambda: local.scalar(held), 0)
    await local.consume()
    await until(lambda: local.effects("run"), [1])


async def test_parked_events_of_another_service_are_not_found(local):
    letters = DeadLetters(local.engine, local.name, [local.consumer()])
    with pytest.raises(NotFound, match="no consumer 'stranger'; it has reader"):
        await letters.replay("stranger", topics.RUNS, "run")
    with pytest.raises(NotFound, match="no parked event 1"):
        await letters.get("reader", topics.RUNS, "run", 1)
    with pytest.raises(NotFound):
        await letters.drop("reader", topics.RUNS, "run", 1)
    assert (await letters.replay("reader", topics.RUNS, "run")).applied == 0


async def test_a_replay_keeps_what_fails_for_a_passing_reason(local, until):
    handler = Flaky(local, {})
    await local.relay()
    consumer = await local.consume({"run.finished": handler})
    letters = DeadLetters(local.engine, local.name, [consumer])
    await local.emit("run", payload=b"broken")
    await local.emit("run", payload=b"fine")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 2)
    consumer.inbox.handlers["run.finished"] = Flaky(local, {b"fine": [Unavailable("not yet")]})
    await letters.drop("reader", topics.RUNS, "run", 1)
    with pytest.raises(Unavailable):
        await letters.replay("reader", topics.RUNS, "run")
    assert [letter.sequence for letter in await letters.list("reader")] == [2]
    assert await local.effects("run") == []
    assert (await letters.replay("reader", topics.RUNS, "run")).applied == 1
    assert await local.effects("run") == [2]
    # An event whose type nobody handles any more is done with, without an effect.
    consumer.inbox.handlers["run.finished"] = handler
    await local.emit("run", payload=b"broken")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 1)
    consumer.inbox.handlers.clear()
    assert (await letters.replay("reader", topics.RUNS, "run")).applied == 1
    assert await local.effects("run") == [2]


async def test_a_key_is_not_free_while_anything_of_it_is_parked(local, until):
    await local.relay()
    consumer = await local.consume()
    letters = DeadLetters(local.engine, local.name, [consumer])
    for payload in (b"broken", b"fine", b"broken too", b"fine"):
        await local.emit("run", payload=payload)
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 4)
    await letters.drop("reader", topics.RUNS, "run", 1)
    await local.emit("run")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 4)
    replayed = await letters.replay("reader", topics.RUNS, "run")  # the second, up to the next broken one
    assert (replayed.applied, replayed.remaining) == (1, 3)
    await local.emit("run")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 4)
    await letters.drop("reader", topics.RUNS, "run", 3)
    assert (await letters.replay("reader", topics.RUNS, "run")).applied == 3
    await local.emit("run")
    await until(lambda: local.effects("run"), [2, 4, 5, 6, 7])


async def test_dropping_the_last_parked_event_frees_the_key(local, until):
    await local.relay()
    consumer = await local.consume()
    letters = DeadLetters(local.engine, local.name, [consumer])
    await local.emit("run", payload=b"broken")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 1)
    letter = await letters.drop("reader", topics.RUNS, "run", 1)
    assert letter.event_id == str(uuid.UUID(letter.event_id))
    await local.emit("run")
    await until(lambda: local.effects("run"), [2])
