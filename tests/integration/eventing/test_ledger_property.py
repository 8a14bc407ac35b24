"""A property instead of examples: whatever happens in whatever order, the ledger balances.

Hypothesis invents histories of a log: events emitted, stored again, broken payloads, unknown types, consumers that die in the middle of a
batch or stand behind, replays. After each history every event was applied once and in order, or skipped, or is parked.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from datetime import UTC, datetime

import pytest
from eventing import schema, topics
from eventing.broker import Fetched, Partition
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.envelope import Event, encode_headers
from eventing.inbox import LostRace, read
from eventing.memory import MemoryBroker
from hypothesis import given, settings
from hypothesis import strategies as st
from servicekit.errors import Invalid
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

PARTITION = Partition(topics.RUNS, 0)
KEYS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("emit"), KEYS, st.sampled_from(["fine", "fine", "fine", "broken", "unknown"])),
        st.tuples(st.just("store_again"), KEYS, st.integers(1, 5)),
        st.tuples(st.just("consume"), st.integers(1, 6), st.sampled_from(["well", "well", "dying", "behind"])),
        st.tuples(st.just("replay"), KEYS, st.booleans()),
    ),
    min_size=5,
    max_size=40,
)


class Died(BaseException):
    """As if the process ended between a handler's effect and the commit."""


class History:
    """Carries out the steps on a log of one partition and a real database, and remembers what was emitted."""

    def __init__(self, engine):
        self.engine = engine
        self.log = []
        self.emitted = defaultdict(list)
        self.position = 0
        self.corrected = False
        self.dying = False
        self.consumer = Consumer(engine, "alpha", MemoryBroker(), "reader", [topics.RUNS], {"run.finished": self.apply})
        self.letters = DeadLetters(engine, "alpha", [self.consumer])

    async def begin(self):
        async with self.engine.begin() as conn:
            await conn.execute(text("TRUNCATE alpha.outbox, alpha.consumer_offset, alpha.consumer_key, alpha.parked_event, alpha.effect"))
        await self.consumer.inbox.positions([PARTITION], "cluster")

    async def apply(self, conn, event):
        await conn.exec_driver_sql("INSERT INTO alpha.effect (key, sequence) VALUES ($1, $2)", (event.key, event.sequence))
        if event.payload == b"broken" and not self.corrected:
            raise Invalid("broken")
        if self.dying:
            raise Died

    async def emit(self, key, kind):
        sequence = len(self.emitted[key]) + 1
        self.emitted[key].append(kind)
        type_ = "run.unknown" if kind == "unknown" else "run.finished"
        event = Event(type_, topics.RUNS, key, sequence, kind.encode(), uuid.uuid4(), datetime.now(UTC))
        self.log.append((key.encode(), event.payload, encode_headers(event, "/test")))

    async def store_again(self, key, count):
        """What a relay does that sent, and died before it could mark."""
        self.log += [record for record in self.log if record[0] == key.encode()][-count:]

    async def consume(self, count, how):
        position = max(0, self.position - 1) if how == "behind" else self.position
        records = self.log[position : position + count]
        fetched = [Fetched(PARTITION, position + n, *record, 0) for n, record in enumerate(records)]
        if not fetched:
            return
        batch = [read(one, topics.RUNS, "cluster") for one in fetched]
        self.dying = how == "dying"
        try:
            if position != self.position:
                with pytest.raises(LostRace):
                    await self.consumer.inbox.apply(batch, {PARTITION: position}, savepoints=True, cluster_id="cluster")
                return
            await self.consumer.inbox.apply(batch, {PARTITION: position}, savepoints=True, cluster_id="cluster")
            self.position += len(batch)
        except Died:
            assert await self.consumer.inbox.held([PARTITION]) == {PARTITION: position}
        finally:
            self.dying = False

    async def replay(self, key, corrected):
        self.corrected = corrected
        await self.letters.replay("reader", topics.RUNS, key)
        self.corrected = False

    async def check(self):
        """The ledger: per key what was applied and what is parked are, in order, what was emitted and handled."""
        async with self.engine.connect() as conn:
            effects = (await conn.execute(text("SELECT key, sequence FROM alpha.effect ORDER BY id"))).fetchall()
            parked = (await conn.execute(text("SELECT key, sequence FROM alpha.parked_event ORDER BY id"))).fetchall()
            free = {row[0] for row in await conn.execute(text("SELECT key FROM alpha.consumer_key WHERE NOT parked"))}
        for key, kinds in self.emitted.items():
            applied = [sequence for other, sequence in effects if other == key]
            waiting = [sequence for other, sequence in parked if other == key]
            handled = [n for n, kind in enumerate(kinds, 1) if kind != "unknown" or n in waiting]
            assert applied + waiting == handled
            assert (key in free) == (not waiting)


def test_the_ledger_balances_after_every_history(database):
    with asyncio.Runner() as runner:
        engine = create_async_engine(database.sqlalchemy)

        async def prepare():
            async with engine.begin() as conn:
                await conn.execute(text("CREATE SCHEMA alpha"))
                await conn.run_sync(lambda sync: schema.create(sync, "alpha"))
                await conn.execute(text("CREATE TABLE alpha.effect (id bigserial, key text, sequence bigint)"))

        async def live(steps):
            history = History(engine)
            await history.begin()
            for name, *arguments in steps:
                await getattr(history, name)(*arguments)
            await history.consume(len(history.log), "well")
            await history.check()
            for key in history.emitted:
                await history.replay(key, True)
            await history.check()
            assert await history.letters.list() == []

        @settings(max_examples=60, deadline=None, derandomize=True)
        @given(STEPS)
        def every_history(steps):
            runner.run(live(steps))

        runner.run(prepare())
        try:
            every_history()
        finally:
            runner.run(engine.dispose())
