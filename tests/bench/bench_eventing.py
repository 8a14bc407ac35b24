"""Figures of event delivery: from the outbox insert through Kafka to the committed effect, all on this machine with durable commits.

A replica of the writing service (writers and relay) and the consuming service are processes of their own, as they are in production.
Throughput: events divided by the time from the first insert to the last committed effect, writers going as fast as they can.
Latency: at 300 transactions/s, from the moment before a transaction begins until the effect of its event is committed.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import resource
import struct
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
from eventing import schema, topics
from eventing.consumer import Consumer
from eventing.envelope import Event, Received
from eventing.inbox import Item, Outcome
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from servicekit.clock import SystemIds
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

KEYS = 256
PAYLOAD_BYTES = 600
WRITERS = 16
THROUGHPUT_S = 10.0
LATENCY_S = 12.0
LATENCY_RATE = 300.0
_SEQUENCES = "UPDATE writing.counter SET sequence = sequence + $2 WHERE key = $1 RETURNING sequence"
_EFFECT = "INSERT INTO reading.effect (key, sequence) VALUES ($1, $2)"


async def figures(servers: Any) -> list[dict[str, Any]]:
    """Measures on real servers; takes about a minute."""
    measured: list[dict[str, Any]] = []
    for per_transaction, aim in ((1, 1000.0), (20, 3000.0)):
        result = await _run(servers, replicas=1, per_transaction=per_transaction, rate=0.0, seconds=THROUGHPUT_S)
        name = f"eventing: events/s, {per_transaction} per transaction"
        measured.append(_figure(name, result["events_per_s"], "events/s", aim, lower_is_better=False))
    for replicas, p50_aim in ((1, 30.0), (2, 60.0)):
        result = await _run(servers, replicas=replicas, per_transaction=1, rate=LATENCY_RATE, seconds=LATENCY_S)
        of = f"at 300/s, {replicas} replica{'s' if replicas > 1 else ''}"
        measured.append(_figure(f"eventing: latency p50 {of}", result["p50_ms"], "ms", p50_aim, lower_is_better=True))
        measured.append(_figure(f"eventing: latency p99 {of}", result["p99_ms"], "ms", 150.0, lower_is_better=True))
    return measured


def _figure(name: str, value: float, unit: str, aim: float, *, lower_is_better: bool) -> dict[str, Any]:
    return {"name": name, "value": round(value, 2), "unit": unit, "aim": aim, "lower_is_better": lower_is_better, "reference": None}


async def _run(servers: Any, *, replicas: int, per_transaction: int, rate: float, seconds: float) -> dict[str, float]:
    """One measurement in a database of its own and topics of its own."""
    name = f"bench_{uuid.uuid4().hex[:12]}"
    admin = await asyncpg.connect(servers.postgres.dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    url = f"{servers.postgres.dsn.rsplit('/', 1)[0]}/{name}".replace("postgresql://", "postgresql+asyncpg://", 1)
    processes: list[asyncio.subprocess.Process] = []
    try:
        await _create(url)
        common = {"url": url, "bootstrap": servers.kafka.bootstrap, "prefix": f"{name}."}
        await topics.ensure_topics(KafkaBroker(servers.kafka.bootstrap, "bench"), f"{name}.")
        share = {"per_transaction": per_transaction, "rate": rate / replicas, "seconds": seconds}
        writers = [
            await _spawn(processes, {"role": "write", "replica": n, "replicas": replicas, **share, **common}) for n in range(replicas)
        ]
        reader = await _spawn(processes, {"role": "read", **common})
        for process in [*writers, reader]:
            await _line(process)  # "ready"
        for process in writers:
            _tell(process, "go")
        written = [json.loads(await _line(process)) for process in writers]
        total = sum(one["events"] for one in written)
        _tell(reader, str(total + sum(one["before"] for one in written)))
        read = json.loads(await _line(reader))
        for process in writers:
            _tell(process, "stop")
        for process, one in zip([*writers, reader], [*[json.loads(await _line(process)) for process in writers], read], strict=True):
            print(" ", {k: v for k, v in one.items() if k != "latencies_ms"}, file=sys.stderr)
            await process.wait()
        latencies = sorted(read["latencies_ms"])
        return {
            "events_per_s": total / (read["last"] - min(one["first"] for one in written)),
            "p50_ms": latencies[len(latencies) // 2],
            "p99_ms": latencies[math.ceil(len(latencies) * 0.99) - 1],
        }
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def _create(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as conn:
        for name in ("writing", "reading"):
            await conn.execute(text(f"CREATE SCHEMA {name}"))
            await conn.run_sync(schema.create, name)
        await conn.execute(text("CREATE TABLE writing.counter (key text PRIMARY KEY, sequence bigint NOT NULL)"))
        await conn.execute(text(f"INSERT INTO writing.counter SELECT 'key-' || n, 0 FROM generate_series(0, {KEYS - 1}) AS n"))
        await conn.execute(text("CREATE TABLE reading.effect (key text, sequence bigint)"))
    await engine.dispose()


async def _spawn(processes: list[asyncio.subprocess.Process], job: dict[str, Any]) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, json.dumps(job), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**26
    )
    processes.append(process)
    return process


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), timeout=120)
    if not line:
        raise RuntimeError(f"a measuring process ended with {await process.wait()}")
    return line.decode()


def _tell(process: asyncio.subprocess.Process, word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word.encode() + b"\n")


# What follows runs in the measuring processes.


async def _said() -> str:
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


def _say(what: Any) -> None:
    print(what if isinstance(what, str) else json.dumps(what), flush=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _until_ready(component: Relay | Consumer) -> None:
    async with asyncio.timeout(60):
        while component.ready() is not None:  # noqa: ASYNC110 - asked now and then, as a prober does
            await asyncio.sleep(0.05)


async def _write(job: dict[str, Any]) -> None:
    """A replica of the writing service: writers and a relay. With a rate transactions begin by the clock, late or not."""
    engine = create_async_engine(job["url"], pool_size=WRITERS, max_overflow=0)
    outbox = Outbox(schema.tables("writing"))
    broker = KafkaBroker(job["bootstrap"], "bench-writing")
    relay = Relay(job["url"], "writing", broker, "/bench/writing", job["prefix"], outbox=outbox, create_topics=False)
    await relay.start()
    await _until_ready(relay)
    ids = SystemIds()
    filler = random.Random(7).randbytes(PAYLOAD_BYTES - 8)
    count = job["per_transaction"]
    written = 0  # with those before the clock starts

    async def transaction(key: str, measured: bool = True) -> None:
        nonlocal written
        began = time.monotonic() if measured else 0.0
        async with engine.begin() as conn:
            last = (await conn.exec_driver_sql(_SEQUENCES, (key, count))).scalar_one()
            payload = struct.pack("<d", began) + filler
            now = datetime.now(UTC)
            numbers = range(last - count + 1, last + 1)
            await outbox.append(conn, [Event("run.finished", topics.RUNS, key, number, payload, ids.uuid7(), now) for number in numbers])
        outbox.committed()
        written += count

    keys = [f"key-{n}" for n in range(job["replica"], KEYS, job["replicas"])]
    choose = random.Random(job["replica"])
    for key in keys[:WRITERS]:
        await transaction(key, measured=False)  # connections and statements are there before the clock starts
    _say("ready")
    await _said()
    before, written = written, 0
    first = time.monotonic()
    cpu = _cpu_s()
    if job["rate"]:
        async with asyncio.TaskGroup() as group:
            for n in range(int(job["rate"] * job["seconds"])):
                await asyncio.sleep(max(0.0, first + n / job["rate"] - time.monotonic()))
                group.create_task(transaction(choose.choice(keys)))
    else:

        async def writer() -> None:
            while time.monotonic() < first + job["seconds"]:
                await transaction(choose.choice(keys))

        await asyncio.gather(*(writer() for _ in range(WRITERS)))
    elapsed = time.monotonic() - first
    _say({"events": written, "before": before, "first": first})
    await _said()
    _say(
        {
            "role": "write",
            "events": written,
            "write_per_s": round(written / elapsed),
            "cpu_us_per_event": round((_cpu_s() - cpu) / written * 1e6),
        }
    )
    await relay.stop()
    await engine.dispose()


async def _read(job: dict[str, Any]) -> None:
    """The consuming service. A latency ends when the transaction with the effect has committed."""
    engine = create_async_engine(job["url"], pool_size=3, pool_pre_ping=True)
    broker = KafkaBroker(job["bootstrap"], "bench-reading")

    async def effect(conn: AsyncConnection, event: Received) -> None:
        await conn.exec_driver_sql(_EFFECT, (event.key, event.sequence))

    consumer = Consumer(engine, "reading", broker, "bench", [topics.RUNS], {"run.finished": effect}, job["prefix"], create_topics=False)
    latencies: list[float] = []
    batches: list[int] = []
    last = 0.0
    arrived = 0
    enough = asyncio.Event()
    wanted = math.inf
    apply = consumer.inbox.apply

    async def timed(batch: Sequence[Item], *args: Any, **options: Any) -> Outcome:
        nonlocal last, arrived
        outcome = await apply(batch, *args, **options)
        last = time.monotonic()
        batches.append(len(batch))
        starts = [struct.unpack_from("<d", item.event.payload)[0] for item in batch if item.event is not None]
        latencies.extend((last - start) * 1000 for start in starts if start)
        arrived += len(starts)
        if arrived >= wanted:
            enough.set()
        return outcome

    consumer.inbox.apply = timed  # type: ignore[method-assign]
    await consumer.start()
    await _until_ready(consumer)
    _say("ready")
    cpu = _cpu_s()
    wanted = int(await _said())
    if arrived < wanted:
        await enough.wait()
    _say(
        {
            "role": "read",
            "last": last,
            "batch": round(sum(batches) / len(batches), 1),
            "cpu_us_per_event": round((_cpu_s() - cpu) / wanted * 1e6),
            "latencies_ms": latencies,
        }
    )
    await consumer.stop()
    await broker.close()
    await engine.dispose()


if __name__ == "__main__":
    _job = json.loads(sys.argv[1])
    asyncio.run({"write": _write, "read": _read}[_job["role"]](_job))
