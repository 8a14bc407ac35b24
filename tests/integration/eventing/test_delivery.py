"""From the outbox through the broker to the inbox: exactly once, in order per key, and what becomes of events that cannot be applied."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from eventing import topics
from eventing.broker import Record
from eventing.dlq import DeadLetters
from eventing.inbox import NOTICE_TYPE
from eventing.records import receive_any
from eventing.recovery import republish_since


async def read_all(service, topic):
    """Every record of a topic of the service, from all partitions."""
    reader = service.broker.reader([service.prefix + topic])
    await reader.start()
    try:
        assigned = (await reader.poll(1, 1.0)).assigned
        ends = await service.broker.offsets(assigned)
        for partition in assigned:
            reader.seek(partition, 0)
        records = []
        while len(records) < sum(end for _, end in ends.values()):
            records += (await reader.poll(1000, 0.2)).records
        return records
    finally:
        await reader.stop()


async def test_events_arrive_once_and_in_order(service, until):
    await service.relay()
    first = await service.consume()
    second = await service.consume()  # a replica: they share the partitions
    for n in range(40):
        await service.emit(f"run-{n % 8}")
    for n in range(8):
        await until(lambda n=n: service.effects(f"run-{n}"), [1, 2, 3, 4, 5])
    await until(lambda: (first.ready(), second.ready()), (None, None))
    await first.stop()
    for n in range(8):
        await service.emit(f"run-{n}")
    for n in range(8):
        await until(lambda n=n: service.effects(f"run-{n}"), [1, 2, 3, 4, 5, 6])
    await second.stop()
    await second.wait()


async def test_many_events_of_one_transaction_keep_their_order(service, until):
    async with service.engine.begin() as conn:
        await service.outbox.append(conn, [service.event("run", n) for n in range(1, 1201)])  # more than a round
    await service.relay()
    await service.consume()
    await until(lambda: service.effects("run"), list(range(1, 1201)))


async def test_unknown_types_are_skipped_and_counted_and_leave_no_gap(service, until, counters):
    await service.relay()
    await service.consume()
    before = counters.total("eventing.consumer.skipped", type="run.renamed")
    await service.emit("run")
    await service.emit("run", type="run.renamed")
    await service.emit("run")
    await until(lambda: service.effects("run"), [1, 3])
    await until(lambda: counters.total("eventing.consumer.skipped", consumer="reader", type="run.renamed"), before + 1)
    assert await service.scalar("SELECT sequence FROM {s}.consumer_key WHERE key = 'run'") == 3


async def test_a_broken_payload_parks_its_key_alone_until_a_replay(service, until):
    await service.relay()
    consumer = await service.consume()
    letters = DeadLetters(service.engine, service.name, [consumer])
    await service.emit("bad", payload=b"fine")
    await service.emit("bad", payload=b"broken")
    await service.emit("bad", payload=b"later")
    await service.emit("good")
    await until(lambda: service.effects("good"), [1])
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.parked_event"), 2)
    assert await service.effects("bad") == [1]
    await service.emit("bad", payload=b"later still")
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.parked_event"), 3)

    head, behind, _ = await letters.list("reader")
    assert (head.key, head.sequence, head.type, head.payload, head.reason) == (
        "bad",
        2,
        "run.finished",
        b"broken",
        "Invalid: the payload is broken",
    )
    assert (behind.sequence, behind.payload) == (3, b"later")
    assert "behind" in behind.reason

    # One notice, about the event that holds up the key.
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    (notice,) = await read_all(service, "headrace.runs.dlq")
    event = receive_any(notice, "headrace.runs.dlq", "")
    assert (event.type, event.key, event.sequence) == (NOTICE_TYPE, "bad", 0)

    # It still fails: nothing moves, and the attempt is counted.
    again = await letters.replay("reader", topics.RUNS, "bad")
    assert (again.applied, again.remaining, again.reason) == (0, 3, "Invalid: the payload is broken")
    assert (await letters.get("reader", topics.RUNS, "bad", 2)).attempts == 2

    # The handler is corrected: all of the key in order, then it is free.
    async def corrected(conn, event):
        await service.apply(conn, event) if event.payload != b"broken" else await conn.exec_driver_sql(
            "INSERT INTO alpha.effect (key, sequence, type) VALUES ($1, $2, 'corrected')", (event.key, event.sequence)
        )

    consumer.inbox.handlers["run.finished"] = corrected
    done = await letters.replay("reader", topics.RUNS, "bad")
    assert (done.applied, done.remaining) == (3, 0)
    assert await service.effects("bad") == [1, 2, 3, 4]
    assert await letters.list() == []
    await service.emit("bad")
    await until(lambda: service.effects("bad"), [1, 2, 3, 4, 5])


async def test_records_that_are_no_events_are_parked_apart(service, until):
    await service.relay()
    consumer = await service.consume()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1])
    producer = service.broker.producer()
    await producer.start()
    junk = Record(service.prefix + topics.RUNS, b"run", b"junk", (("ce_type", b"run.finished"),), 1)
    unsequenced = Record(service.prefix + topics.RUNS, b"\xff", b"junk", (), 1)
    assert list(await producer.send([junk, unsequenced])) == [None, None]
    await producer.stop()
    await service.emit("run")
    await until(lambda: service.effects("run"), [1, 2])
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.parked_event"), 2)
    letters = DeadLetters(service.engine, service.name, [consumer])
    first, second = sorted(await letters.list(), key=lambda letter: letter.reason)
    assert (first.payload, second.payload) == (b"junk", b"junk")
    assert "ce_specversion" in first.reason
    assert "not UTF-8" in second.reason
    assert (await letters.replay("reader", topics.RUNS, first.key)).remaining == 1
    dropped = await letters.drop("reader", topics.RUNS, first.key, first.sequence)
    assert (dropped.key, dropped.attempts) == (first.key, 2)
    assert [letter.key for letter in await letters.list()] == [second.key]


async def test_sent_events_that_are_published_again_have_no_second_effect(service, until, counters):
    await service.relay()
    await service.consume()
    for _ in range(5):
        await service.emit("run")
    await until(lambda: service.effects("run"), [1, 2, 3, 4, 5])
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.outbox WHERE sent_at IS NULL"), 0)
    before = counters.total("eventing.consumer.duplicates", consumer="reader")
    ids = await service.rows("SELECT event_id FROM {s}.outbox ORDER BY id")
    assert await republish_since(service.engine, service.name, datetime.now(UTC) + timedelta(hours=1)) == 0
    assert await republish_since(service.engine, service.name, datetime.now(UTC) - timedelta(hours=1), topics.MODELS) == 0
    assert await republish_since(service.engine, service.name, datetime.now(UTC) - timedelta(hours=1)) == 5
    await service.emit("run")
    await until(lambda: service.effects("run"), [1, 2, 3, 4, 5, 6])
    await until(lambda: counters.total("eventing.consumer.duplicates", consumer="reader") - before, 5.0)
    assert await service.effects("run") == [1, 2, 3, 4, 5, 6]
    records = await read_all(service, topics.RUNS)
    assert [str(receive_any(record, topics.RUNS, "").id) for record in records][:10] == [str(row[0]) for row in ids] * 2


async def test_an_event_that_must_be_understood_is_parked_by_who_does_not_know_it(service, until):
    await service.relay()
    consumer = await service.consume()
    await service.emit("run", type="run.quarantined", must_understand=True)
    await service.emit("run")
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.parked_event"), 2)
    letters = DeadLetters(service.engine, service.name, [consumer])
    assert "must be understood" in (await letters.list())[0].reason
    assert (await letters.replay("reader", topics.RUNS, "run")).remaining == 2
    consumer.inbox.handlers["run.quarantined"] = service.apply
    assert (await letters.replay("reader", topics.RUNS, "run")).applied == 2
    assert await service.effects("run") == [1, 2]


async def test_a_row_that_commits_late_is_not_passed_over(service, until):
    """Ids commit out of order: a relay that read by a cursor would lose this row."""
    await service.relay()
    await service.consume()
    async with service.engine.connect() as slow:
        await service.outbox.append(slow, [service.event("slow", 1)])
        await service.emit("fast")
        await until(lambda: service.effects("fast"), [1])
        assert await service.effects("slow") == []
        await slow.commit()
    await until(lambda: service.effects("slow"), [1])


async def test_a_transaction_that_rolls_back_publishes_nothing(service, until):
    await service.relay()
    await service.consume()
    async with service.engine.connect() as conn:
        await service.outbox.append(conn, [service.event("run", 1, payload=b"never was")])
        await conn.rollback()
    await service.emit("run", payload=b"was")
    await until(lambda: service.effects("run"), [1])
    assert await service.scalar("SELECT payload FROM {s}.effect") == b"was"


async def test_handlers_make_events_of_their_own(service, until):
    """An effect and the events that it makes are one transaction."""

    async def promote(conn, event):
        await service.apply(conn, event)
        sequence = await service.take(conn, event.key, topics.MODELS)
        await service.outbox.append(conn, [service.event(event.key, sequence, "model.promoted", topic=topics.MODELS)])

    await service.relay()
    await service.consume({"run.finished": promote})
    await service.consume({"model.promoted": service.apply}, name="second", consumes=[topics.MODELS])
    for _ in range(3):
        await service.emit("run")
    await until(lambda: service.scalar("SELECT count(*) FROM {s}.effect WHERE type = 'model.promoted'"), 3)
    held = await service.rows("SELECT consumer, topic, sequence, parked FROM {s}.consumer_key ORDER BY consumer")
    assert held == [("reader", topics.RUNS, 3, False), ("second", topics.MODELS, 3, False)]
    partitions = await service.rows("SELECT DISTINCT topic, count(*) FROM {s}.consumer_offset GROUP BY topic ORDER BY topic")
    assert partitions == [(topics.MODELS, 6), (topics.RUNS, 12)]
