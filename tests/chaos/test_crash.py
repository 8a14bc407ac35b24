"""The promise of eventing under SIGKILL: relays, consumers, producer, broker and database are killed at random points under load, over
and over, and then the ledger must balance: no event lost, no effect doubled, no order within a key broken. Now and then a relay or a
consumer is only paused, for longer than its session lasts: it comes back as a zombie that does not know what it lost.

HEADRACE_CHAOS_SECONDS (90) or HEADRACE_CHAOS_KILLS say how long; HEADRACE_CHAOS_SEED repeats the kills of an earlier run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from contracts.eventing.v1 import events_pb2
from eventing import schema, topics
from eventing.broker import Partition
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.records import receive_any
from localstack import process
from localstack import server as stack_server
from localstack.kafka import Kafka
from localstack.postgres import Postgres
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

sys.path.insert(0, str(Path(__file__).parent))
import crash_roles

ROLES = {"writer": "writer", "relay-1": "relay", "relay-2": "relay", "consumer-1": "consumer", "consumer-2": "consumer", "echo": "echo"}
WEIGHTS = {
    "relay-1": 4,
    "relay-2": 4,
    "consumer-1": 4,
    "consumer-2": 4,
    "writer": 4,
    "echo": 3,
    "broker": 3,
    "postmaster": 2,
    "database": 2,
}
ZOMBIES = {"relay-1 paused": 1, "relay-2 paused": 1, "consumer-1 paused": 1, "consumer-2 paused": 1}
ZOMBIE_S = 3.5
WAIT_S = (0.2, 1.6)
SETTLE_S = 150.0


@dataclass(frozen=True)
class Kill:
    """One entry of the schedule: wait, kill (or pause), leave down."""

    wait_s: float
    victim: str
    down_s: float


def schedule(seed: int) -> Iterator[Kill]:
    """The endless list of kills that a seed stands for. Every victim comes once before any chance decides."""
    chance = random.Random(seed)
    weights = {**WEIGHTS, **ZOMBIES}
    first = chance.sample(sorted(weights), len(weights))
    while True:
        victim = first.pop() if first else chance.choices(list(weights), weights=list(weights.values()))[0]
        yield Kill(chance.uniform(*WAIT_S), victim, ZOMBIE_S if victim in ZOMBIES else chance.uniform(0.0, 0.6))


@dataclass
class System:
    """The servers and role processes, each of which can be killed and brought back."""

    postgres: Postgres
    kafka: Kafka
    logs: Path
    children: dict[str, process.Child] = field(default_factory=dict)
    reviving: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    pauses: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return self.postgres.dsn.replace("postgresql://", "postgresql+asyncpg://", 1)

    def start(self, name: str) -> None:
        job = {"role": ROLES[name], "url": self.url, "bootstrap": self.kafka.bootstrap, "up": str(self._up(name))}
        argv = [sys.executable, crash_roles.__file__, json.dumps(job)]
        self.children[name] = process.spawn(name, argv, log=self.logs / f"{name}.log", env=dict(os.environ), mark=self.logs.name)

    async def kill(self, kill: Kill) -> None:
        """Waits until the victim is up, kills it, and brings it back in the background."""
        self.check()
        place = "database" if kill.victim == "postmaster" else kill.victim.removesuffix(" paused")
        if place in self.reviving:
            await self.reviving.pop(place)
        if place == "broker":
            stack_server.crash(self.kafka)
        elif place == "database":
            await self._kill_database(alone=kill.victim == "postmaster")
        elif kill.victim in ZOMBIES:
            os.kill(self.children[place].pid, signal.SIGSTOP)
        else:
            self.check()
            self.children[place].kill()
        counter = self.pauses if kill.victim in ZOMBIES else self.kills
        counter[kill.victim] += 1
        self.reviving[place] = asyncio.create_task(self._revive(place, kill))

    async def _revive(self, place: str, kill: Kill) -> None:
        await asyncio.sleep(kill.down_s)
        if kill.victim in ZOMBIES:
            os.kill(self.children[place].pid, signal.SIGCONT)
        elif place == "broker":
            await asyncio.to_thread(stack_server.restart, self.kafka)
        elif place == "database":
            await asyncio.to_thread(stack_server.restart, self.postgres)
        else:
            self.start(place)

    async def _kill_database(self, *, alone: bool) -> None:
        """SIGKILL to the postmaster: its backends notice and end by themselves; or to all of them at once."""
        assert self.postgres.child is not None
        backends = _children(self.postgres.child.pid)
        os.kill(self.postgres.child.pid, signal.SIGKILL)
        if not alone:
            for backend in backends:
                if backend.alive():
                    os.kill(backend.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            # The next postmaster refuses to start beside them.
            while any(backend.alive() for backend in backends):  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.02)
        self.postgres.child.kill()

    async def revive_all(self) -> None:
        for task in self.reviving.values():
            await task
        self.reviving.clear()
        self.check()

    def check(self) -> None:
        """Fails if a role ended that nobody killed: eventing must live through all of this."""
        for name, child in self.children.items():
            if name not in self.reviving and child.exit_code() is not None:
                pytest.fail(f"{name} ended by itself with {child.exit_code()}; its log ends:\n{process.tail(child.log, 60)}")

    def _up(self, name: str) -> Path:
        """A file in which a role writes its pid once it listens to signals."""
        return self.logs / f"{name}.up"

    async def stop(self, name: str) -> int | None:
        """SIGTERM, once the role listens to it; returns the exit code."""
        async with asyncio.timeout(60):
            while self._up(name).read_text() != str(self.children[name].pid):
                self.check()
                await asyncio.sleep(0.05)
        child = self.children.pop(name)
        await asyncio.to_thread(child.stop, 30.0)
        return child.exit_code()

    def kill_all(self) -> None:
        for child in self.children.values():
            child.kill()


def _children(pid: int) -> list[process.ProcessId]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[stat.rindex(")") + 2 :].split()[1]) == pid and (child := process.identify(int(entry.name))) is not None:
                found.append(child)
    return found


@asynccontextmanager
async def running(postgres: Postgres, kafka: Kafka, logs: Path) -> AsyncIterator[System]:
    system = System(postgres, kafka, logs)
    engine = create_async_engine(system.url)
    async with engine.begin() as conn:
        for name in ("alpha", "beta"):
            await conn.execute(text(f"CREATE SCHEMA {name}"))
            await conn.run_sync(lambda sync, name=name: schema.create(sync, name))
        for statement in crash_roles.SETUP.strip().split("\n"):
            await conn.execute(text(statement))
    await engine.dispose()
    try:
        for name in ROLES:
            system.start(name)
        yield system
    finally:
        for task in system.reviving.values():
            task.cancel()
        system.kill_all()


class Ledger:
    """Questions to the database of the test."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    async def rows(self, statement: str) -> list[Any]:
        conn = await asyncpg.connect(self._dsn, timeout=10)
        try:
            return list(await conn.fetch(statement))
        finally:
            await conn.close()

    async def number(self, statement: str) -> int:
        return int((await self.rows(statement))[0][0])

    async def per_key(self, statement: str) -> dict[str, list[int]]:
        """Rows (key, sequence) as lists per key, in the order of the rows."""
        found: dict[str, list[int]] = defaultdict(list)
        for row in await self.rows(statement):
            found[row[0]].append(row[1])
        return found


async def settled(question: Callable[[], Awaitable[dict[str, int]]], system: System) -> None:
    """Waits until all differences are 0; fails with those that remain."""
    deadline = time.monotonic() + SETTLE_S
    while any((differences := await question()).values()):
        system.check()
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {name}\n{process.tail(child.log, 20)}" for name, child in system.children.items())
            pytest.fail(f"after {SETTLE_S:g} s without kills it does not balance: {differences}\n{logs}")
        await asyncio.sleep(0.2)


async def notices(bootstrap: str) -> set[tuple[str, int]]:
    """Key and sequence of every notice in the dead-letter topic of runs."""
    broker = KafkaBroker(bootstrap, "test-notices")
    dead_letters = topics.topic(topics.RUNS).dead_letters
    (end,) = (await broker.offsets([Partition(dead_letters, 0)])).values()
    reader = broker.reader([dead_letters])
    found = set()
    try:
        await reader.start()
        reader.seek(Partition(dead_letters, 0), end[0])
        while end[1] and await reader.position(Partition(dead_letters, 0)) < end[1]:
            for record in (await reader.poll(500, 0.2)).records:
                notice = events_pb2.EventParked.FromString(receive_any(record, dead_letters, "").payload)
                found.add((notice.key, notice.sequence))
    finally:
        await reader.stop()
        await broker.close()
    return found


@pytest.mark.timeout(36_000 if os.environ.get("HEADRACE_CHAOS_KILLS") else 900)
async def test_nothing_is_lost_doubled_or_reordered(own_postgres, own_kafka, tmp_path, capsys):
    seed = int(os.environ.get("HEADRACE_CHAOS_SEED") or secrets.randbelow(2**31))
    most_kills = int(os.environ.get("HEADRACE_CHAOS_KILLS") or 10**9)
    seconds = float("inf") if os.environ.get("HEADRACE_CHAOS_KILLS") else float(os.environ.get("HEADRACE_CHAOS_SECONDS") or 90)
    with capsys.disabled():
        print(f"\ncrash test: HEADRACE_CHAOS_SEED={seed} repeats these kills", flush=True)

    async with running(own_postgres(), own_kafka(), tmp_path) as system:
        ledger = Ledger(system.postgres.dsn)
        began = time.monotonic()
        for kill in schedule(seed):
            await asyncio.sleep(kill.wait_s)
            await system.kill(kill)
            if most_kills < 10**9 and system.kills.total() % 50 == 0 and kill.victim not in ZOMBIES:
                with capsys.disabled():
                    print(f"crash test: {system.kills.total()} of {most_kills} kills, {time.monotonic() - began:.0f} s", flush=True)
            if time.monotonic() - began > seconds or system.kills.total() >= most_kills:
                break
        lasted = time.monotonic() - began
        await system.revive_all()
        assert await system.stop("writer") == 0

        async def open_items() -> dict[str, int]:
            emitted = await ledger.number("SELECT coalesce(sum(sequence), 0) FROM alpha.counter")
            applied = await ledger.number("SELECT count(*) FROM beta.effect")
            return {
                "not published by alpha": await ledger.number("SELECT count(*) FROM alpha.outbox WHERE sent_at IS NULL"),
                "emitted but neither applied nor parked": emitted - applied - await ledger.number("SELECT count(*) FROM beta.parked_event"),
                "not published by beta": await ledger.number("SELECT count(*) FROM beta.outbox WHERE sent_at IS NULL"),
                "applied but not echoed": applied - await ledger.number("SELECT count(*) FROM alpha.echo"),
            }

        began = time.monotonic()
        await settled(open_items, system)
        settled_s = time.monotonic() - began
        emitted = {row["key"]: row["sequence"] for row in await ledger.rows("SELECT key, sequence FROM alpha.counter")}
        applied = await ledger.per_key("SELECT key, sequence FROM beta.effect ORDER BY id")
        parked = await ledger.per_key("SELECT key, sequence FROM beta.parked_event ORDER BY id")
        with capsys.disabled():
            victims = ", ".join(f"{victim} {count}" for victim, count in sorted(system.kills.items()))
            print(
                f"crash test: {system.kills.total()} kills in {lasted:.0f} s ({victims}), {system.pauses.total()} pauses;"
                f" {sum(emitted.values())} events emitted, {sum(map(len, applied.values()))} applied,"
                f" {sum(map(len, parked.values()))} parked in {len(parked)} keys; settled within {settled_s:.0f} s",
                flush=True,
            )

        # The ledger: what was emitted was applied, in order, up to a key's first broken event, and parked from there on.
        assert set(system.kills) == set(WEIGHTS)
        assert sum(emitted.values()) > 10 * system.kills.total()
        for key, last in emitted.items():
            assert applied[key] + parked[key] == list(range(1, last + 1)), key
        assert await ledger.per_key("SELECT key, sequence FROM alpha.echo ORDER BY id") == {
            key: list(range(1, len(sequences) + 1)) for key, sequences in applied.items() if sequences
        }
        assert await notices(system.kafka.bootstrap) == {(key, sequences[0]) for key, sequences in parked.items() if sequences}

        # A corrected version replays what was parked, in order, beside the running consumers.
        engine = create_async_engine(system.url)
        outbox = Outbox(schema.tables("beta"))
        effects = crash_roles.Effects(outbox, strict=False)
        broker = KafkaBroker(system.kafka.bootstrap, "test-replay")
        corrected = Consumer(engine, "beta", broker, "beta", [topics.RUNS], {"run.finished": effects.apply}, outbox=outbox)
        letters = DeadLetters(engine, "beta", [corrected])
        for key in [key for key, sequences in parked.items() if sequences]:
            replayed = await letters.replay("beta", topics.RUNS, key)
            assert (replayed.applied, replayed.remaining) == (len(parked[key]), 0)
        await engine.dispose()
        await settled(open_items, system)
        assert await ledger.per_key("SELECT key, sequence FROM beta.effect ORDER BY id") == {
            key: list(range(1, last + 1)) for key, last in emitted.items()
        }
        echoed = await ledger.rows("SELECT key, sequence, payload FROM alpha.echo ORDER BY id")
        assert all(str(row["sequence"]) == row["payload"] for row in echoed)
        assert await ledger.number("SELECT count(*) FROM beta.consumer_key WHERE parked") == 0

        for name in list(system.children):
            assert await system.stop(name) == 0, f"{name} did not end in good order:\n{process.tail(tmp_path / f'{name}.log', 40)}"
