"""The worker against a real queue: what becomes of a job when its handler returns, raises, hangs, is cancelled, or loses its lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from jobs import Ended, Handler, Job, JobContext, JobQueue, JobRecord, LeaseLost, State, Worker
from localstack.server import crash, restart
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from servicekit import telemetry
from servicekit.clock import SystemClock, SystemIds
from servicekit.db import create_engine
from servicekit.errors import Invalid, Transient, Unavailable
from servicekit.settings import ServiceSettings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    """Waits for a condition with a deadline."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # the condition is in another process: no event tells of it
            await asyncio.sleep(0.01)


async def ended(queue: JobQueue, job_id: UUID) -> JobRecord:
    async def is_final() -> bool:
        return (await queue.get(job_id)).state.final

    await until(is_final)
    return await queue.get(job_id)


async def add(queue: JobQueue, key: str = "a", max_attempts: int = 3) -> UUID:
    async with queue.engine.begin() as conn:
        job_id = await queue.enqueue(conn, "train", key, {"n": key}, max_attempts)
    queue.notify()
    return job_id


async def cancel(queue: JobQueue, job_id: UUID) -> None:
    async with queue.engine.begin() as conn:
        await queue.cancel(conn, job_id)
    queue.notify()


@asynccontextmanager
async def working(queue: JobQueue, handler: Handler, **options: Any) -> AsyncIterator[Worker]:
    worker = Worker(queue, {"train": handler}, **{"poll_s": 0.05, **options})
    await worker.start()
    try:
        yield worker
    finally:
        await asyncio.wait_for(worker.stop(), 30)


class Recorder:
    """An on_end that writes what it was told into the database, within the transaction it was given."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, State, str]] = []

    async def __call__(self, conn: AsyncConnection, job: Job, outcome: Ended) -> None:
        assert conn.in_transaction()
        self.told.append((job.key, job.attempt, outcome.state, outcome.cause))


async def test_returning_is_success(queue: JobQueue) -> None:
    seen: list[Job] = []

    async def handler(job: Job, ctx: JobContext) -> None:
        ctx.check()
        assert ctx.job is job
        seen.append(job)

    recorder, commits = Recorder(), asyncio.Event()
    async with working(queue, handler, on_end=recorder, committed=commits.set) as worker:
        job_id = await add(queue)
        record = await ended(queue, job_id)
        assert record.state is State.SUCCEEDED
        await asyncio.wait_for(commits.wait(), 10)
        assert worker.ready() is None
    assert [(job.key, job.attempt) for job in seen] == [("a", 1)]
    assert recorder.told == [("a", 1, State.SUCCEEDED, "")]


async def test_effects_and_the_end_of_the_job_are_one_transaction(queue: JobQueue, engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("CREATE TABLE svc.effect (attempt int)"))

    async def handler(job: Job, ctx: JobContext) -> None:
        async with ctx.transaction() as conn:
            await conn.execute(text("INSERT INTO svc.effect VALUES (:attempt)"), {"attempt": job.attempt})
            await ctx.complete(conn)
            if job.attempt == 1:
                raise Unavailable("after complete, before the commit")

    async with working(queue, handler):
        assert (await ended(queue, await add(queue))).state is State.SUCCEEDED
    async with engine.connect() as conn:
        assert list(await conn.scalars(text("SELECT attempt FROM svc.effect"))) == [2]


async def test_a_handler_may_end_the_attempt_itself(queue: JobQueue) -> None:
    recorder = Recorder()

    async def handler(job: Job, ctx: JobContext) -> None:
        async with ctx.transaction() as conn:
            assert await ctx.fail(conn, "no use", retry=False) is State.FAILED

    async with working(queue, handler, on_end=recorder):
        record = await ended(queue, await add(queue))
    assert (record.state, record.cause) == (State.FAILED, "no use")
    assert recorder.told == []


async def test_transient_is_tried_again_invalid_and_bugs_are_not(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    errors: dict[str, Callable[[], Exception]] = {
        "transient": lambda: Transient("not now"),
        "invalid": lambda: Invalid("never"),
        "bug": lambda: ZeroDivisionError("inside"),
    }

    async def handler(job: Job, ctx: JobContext) -> None:
        raise errors[job.key]()

    recorder = Recorder()
    async with working(queue, handler, on_end=recorder):
        records = {key: await ended(queue, await add(queue, key, max_attempts=2)) for key in errors}
    assert {key: (record.state, record.attempt) for key, record in records.items()} == {
        "transient": (State.FAILED, 2),
        "invalid": (State.FAILED, 1),
        "bug": (State.FAILED, 1),
    }
    assert records["invalid"].cause == "Invalid: never"
    bug = str(records["bug"].cause)
    assert "inside" not in bug
    assert bug.split()[-1] in caplog.text
    assert recorder.told[:2] == [("transient", 1, State.QUEUED, "Transient: not now"), ("transient", 2, State.FAILED, "Transient: not now")]


async def test_a_cancellation_from_within_is_a_failure_and_not_a_silence(queue: JobQueue) -> None:
    async def handler(job: Job, ctx: JobContext) -> None:
        raise asyncio.CancelledError

    async with working(queue, handler):
        record = await ended(queue, await add(queue, max_attempts=2))
    assert (record.state, record.attempt) == (State.FAILED, 2)
    assert "cancelled" in str(record.cause)


class Hanging:
    """A handler that waits until it is cancelled."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.context: JobContext | None = None

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        self.context = ctx
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


@pytest.mark.parametrize("notified", [True, False])
async def test_a_running_job_is_cancelled_at_any_time(queue: JobQueue, notified: bool) -> None:
    handler, recorder = Hanging(), Recorder()
    async with working(queue, handler, on_end=recorder):
        job_id = await add(queue)
        await asyncio.wait_for(handler.entered.wait(), 10)
        if notified:
            await cancel(queue, job_id)
        else:  # as another process would
            async with queue.engine.begin() as conn:
                await queue.cancel(conn, job_id)
        record = await ended(queue, job_id)
        assert handler.left.is_set()
        assert handler.context is not None
        assert handler.context.cancel_requested
    assert record.state is State.CANCELLED
    assert recorder.told == [("a", 1, State.CANCELLED, "cancelled")]


async def test_leases_are_kept_while_a_handler_works(queue: JobQueue) -> None:
    """Twice the lease after the first one is over, beside another worker that would take the job."""
    attempts: list[int] = []

    async def handler(job: Job, ctx: JobContext) -> None:
        attempts.append(job.attempt)
        async with queue.engine.connect() as conn:
            first = await conn.scalar(text("SELECT lease_until FROM svc.job"))

        async def long_over() -> bool:
            async with queue.engine.connect() as conn:
                return bool(
                    await conn.scalar(text("SELECT clock_timestamp() > CAST(:first AS timestamptz) + interval '1 s'"), {"first": first})
                )

        await until(long_over)

    async with working(queue, handler, lease_s=0.5), working(queue, handler, lease_s=0.5):
        record = await ended(queue, await add(queue))
    assert record.state is State.SUCCEEDED
    assert attempts == [1]


async def test_a_lost_lease_cancels_the_handler_and_its_end_is_not_written(queue: JobQueue, engine: AsyncEngine) -> None:
    handler, recorder = Hanging(), Recorder()
    async with working(queue, handler, on_end=recorder):
        job_id = await add(queue)
        await asyncio.wait_for(handler.entered.wait(), 10)
        async with engine.begin() as conn:  # as a worker elsewhere does once the lease has run out
            await conn.execute(
                text("UPDATE svc.job SET fencing_token = fencing_token + 1, attempt = 2, lease_until = now() + interval '1 hour'")
            )
        await asyncio.wait_for(handler.left.wait(), 10)
        assert handler.context is not None
        with pytest.raises(LeaseLost):
            handler.context.check()
    record = await queue.get(job_id)
    assert (record.state, record.fencing_token) == (State.RUNNING, 2)
    assert recorder.told == []


async def test_a_handler_that_learns_of_the_loss_from_its_own_write_is_left_alone(queue: JobQueue, engine: AsyncEngine) -> None:
    caught = asyncio.Event()

    async def handler(job: Job, ctx: JobContext) -> None:
        async with engine.begin() as conn:
            await conn.execute(
                text("UPDATE svc.job SET fencing_token = fencing_token + 1, attempt = 2, lease_until = now() + interval '1 hour'")
            )
        try:
            async with ctx.transaction() as conn:
                await ctx.complete(conn)
        finally:
            caught.set()

    async with working(queue, handler):
        job_id = await add(queue)
        await asyncio.wait_for(caught.wait(), 10)
    assert (await queue.get(job_id)).state is State.RUNNING


async def test_stopping_lets_work_end_within_its_grace(queue: JobQueue) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def handler(job: Job, ctx: JobContext) -> None:
        entered.set()
        await release.wait()

    async with working(queue, handler, grace_s=30) as worker:
        job_id = await add(queue)
        await asyncio.wait_for(entered.wait(), 10)
        second = await add(queue, "b")
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(stopping, 20)
        await asyncio.wait_for(worker.wait(), 5)
    assert (await queue.get(job_id)).state is State.SUCCEEDED
    assert (await queue.get(second)).state is State.QUEUED


async def test_what_does_not_end_in_time_is_handed_back_and_another_takes_it(queue: JobQueue) -> None:
    handler, recorder = Hanging(), Recorder()
    async with working(queue, handler, grace_s=0.05, on_end=recorder):
        job_id = await add(queue, max_attempts=1)
        await asyncio.wait_for(handler.entered.wait(), 10)
    record = await queue.get(job_id)
    assert (record.state, record.attempt) == (State.QUEUED, 0)
    assert handler.left.is_set()
    assert recorder.told == [("a", 1, State.QUEUED, "handed back")]

    async def finish(job: Job, ctx: JobContext) -> None: ...

    async with working(queue, finish):
        assert (await ended(queue, job_id)).state is State.SUCCEEDED


async def test_a_job_whose_worker_died_is_taken_over_or_buried(queue: JobQueue) -> None:
    again, last = await add(queue, "again", max_attempts=2), await add(queue, "last", max_attempts=1)
    for _ in range(2):
        assert await queue.claim(["train"], "dead", 60) is not None
    async with queue.engine.begin() as conn:
        await conn.execute(text("UPDATE svc.job SET lease_until = now() - interval '1 second'"))
    recorder = Recorder()

    async def handler(job: Job, ctx: JobContext) -> None: ...

    async with working(queue, handler, on_end=recorder):
        assert (await ended(queue, again)).state is State.SUCCEEDED
        assert (await ended(queue, last)).state is State.FAILED
    assert {(key, attempt, state) for key, attempt, state, _ in recorder.told} == {
        ("again", 2, State.SUCCEEDED),
        ("last", 1, State.FAILED),
    }


async def test_concurrency_is_bounded_and_used(queue: JobQueue) -> None:
    running = most = 0
    full = asyncio.Event()

    async def handler(job: Job, ctx: JobContext) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            full.set()
        await asyncio.wait_for(full.wait(), 20)
        running -= 1

    ids = [await add(queue, str(n)) for n in range(9)]
    async with working(queue, handler, concurrency=3):
        for job_id in ids:
            assert (await ended(queue, job_id)).state is State.SUCCEEDED
    assert most == 3


async def test_no_wake_up_is_lost(queue: JobQueue) -> None:
    """With an hour between polls, each job must be found by its notification or by the end of the one before."""

    async def handler(job: Job, ctx: JobContext) -> None: ...

    async with working(queue, handler, poll_s=3600, lease_s=3600 * 8):
        for n in range(50):
            job_id = await add(queue, str(n))
            if n % 5 == 0:
                await ended(queue, job_id)
        for record in await queue.list():
            await ended(queue, record.id)


async def test_several_workers_do_each_job_once(queue: JobQueue) -> None:
    done: list[str] = []

    async def handler(job: Job, ctx: JobContext) -> None:
        await asyncio.sleep(0)
        done.append(job.key)

    async with working(queue, handler, concurrency=4), working(queue, handler, concurrency=4), working(queue, handler, concurrency=4):
        ids = [await add(queue, str(n)) for n in range(60)]
        for job_id in ids:
            await ended(queue, job_id)
    assert sorted(done, key=int) == [str(n) for n in range(60)]


async def test_a_bug_in_on_end_stops_the_worker_loudly(queue: JobQueue) -> None:
    await add(queue, max_attempts=1)
    assert await queue.claim(["train"], "dead", 0.001) is not None

    async def broken(conn: AsyncConnection, job: Job, outcome: Ended) -> None:
        raise ZeroDivisionError

    async def handler(job: Job, ctx: JobContext) -> None: ...

    worker = Worker(queue, {"train": handler}, on_end=broken, poll_s=0.05)
    await worker.start()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(worker.wait(), 20)
    await worker.stop()
    assert (await queue.list())[0].state is State.RUNNING  # its transaction did not commit


async def test_an_end_that_cannot_be_recorded_leaves_the_job_to_its_lease(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    told = asyncio.Event()

    async def broken(conn: AsyncConnection, job: Job, outcome: Ended) -> None:
        told.set()
        raise ZeroDivisionError

    async def handler(job: Job, ctx: JobContext) -> None: ...

    async with working(queue, handler, on_end=broken, lease_s=3600):
        job_id = await add(queue)
        await asyncio.wait_for(told.wait(), 20)
    assert (await queue.get(job_id)).state is State.RUNNING
    assert "could not be recorded" in caplog.text


async def test_a_job_that_was_claimed_while_the_worker_stopped_is_handed_back(queue: JobQueue) -> None:
    claimed, go_on = asyncio.Event(), asyncio.Event()

    class SlowAnswer(JobQueue):
        async def claim(self, kinds: Collection[str], worker: str, lease_s: float) -> Job | None:
            job = await super().claim(kinds, worker, lease_s)
            if job is not None:
                claimed.set()
                await go_on.wait()
            return job

    slow = SlowAnswer(queue.engine, "svc", SystemClock(), SystemIds())

    async def handler(job: Job, ctx: JobContext) -> None:
        raise AssertionError("it was told to stop")

    async with working(slow, handler) as worker:
        job_id = await add(slow)
        await asyncio.wait_for(claimed.wait(), 20)
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait_for(stopping, 20)
    record = await queue.get(job_id)
    assert (record.state, record.attempt) == (State.QUEUED, 0)


async def test_it_survives_a_database_that_goes_and_comes(own_postgres: Callable[[], Any]) -> None:
    from jobs import Backoff, schema

    server = own_postgres()
    engine = create_engine(server.dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    queue = JobQueue(engine, "svc", SystemClock(), SystemIds(), Backoff(first_s=0, most_s=0))
    async with engine.begin() as conn:
        await conn.execute(text("CREATE SCHEMA svc"))
        await conn.run_sync(schema.create, "svc")
    entered, release, finished = asyncio.Event(), asyncio.Event(), 0

    async def handler(job: Job, ctx: JobContext) -> None:
        nonlocal finished
        entered.set()
        await release.wait()
        finished += 1

    async with working(queue, handler, lease_s=60) as worker:
        job_id = await add(queue)
        await asyncio.wait_for(entered.wait(), 10)
        crash(server)

        async def says_so() -> bool:
            return worker.ready() is not None

        await until(says_so)
        release.set()  # it ends while the database is away; the end is written when it is back

        async def is_finished() -> bool:
            return finished == 1

        await until(is_finished)
        await asyncio.to_thread(restart, server)

        async def is_ready() -> bool:
            return worker.ready() is None

        await until(is_ready)
        assert (await ended(queue, job_id)).state is State.SUCCEEDED
        release.set()
        assert (await ended(queue, await add(queue, "after"))).state is State.SUCCEEDED
    assert finished == 2
    await engine.dispose()


async def test_a_handler_is_stopped_when_no_heartbeat_gets_through(own_postgres: Callable[[], Any]) -> None:
    """With the database away for longer than the lease another worker may have the job: ours must not go on."""
    from jobs import schema

    server = own_postgres()
    engine = create_engine(server.dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    queue = JobQueue(engine, "svc", SystemClock(), SystemIds())
    async with engine.begin() as conn:
        await conn.execute(text("CREATE SCHEMA svc"))
        await conn.run_sync(schema.create, "svc")
    handler = Hanging()
    async with working(queue, handler, lease_s=1):
        await add(queue)
        await asyncio.wait_for(handler.entered.wait(), 10)
        crash(server)
        await asyncio.wait_for(handler.left.wait(), 20)
        assert handler.context is not None
        with pytest.raises(LeaseLost):
            handler.context.check()
    await engine.dispose()


async def test_the_work_is_a_trace_of_its_own_linked_to_who_asked(queue: JobQueue) -> None:
    spans = InMemorySpanExporter()
    active = telemetry.setup("trainer", ServiceSettings(trace_sample_ratio=1.0), span_exporters=[spans])

    async def handler(job: Job, ctx: JobContext) -> None: ...

    try:
        async with working(queue, handler):
            with telemetry.start_span("asking") as asking:
                job_id = await add(queue)
            await ended(queue, job_id)
    finally:
        active.shutdown()
    work = next(span for span in spans.get_finished_spans() if span.name == "job train")
    assert work.parent is None
    assert work.context.trace_id != asking.get_span_context().trace_id
    assert [link.context.span_id for link in work.links] == [asking.get_span_context().span_id]


def test_nonsense_is_refused(queue: JobQueue) -> None:
    for options in ({"concurrency": 0}, {"lease_s": 0}):
        with pytest.raises(ValueError):
            Worker(queue, {}, **options)  # type: ignore[arg-type]  # a table of keyword arguments
