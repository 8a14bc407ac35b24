"""What the queue of jobs promises, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from jobs import Backoff, Job, JobQueue, LeaseLost, State
from servicekit.clock import SystemClock, SystemIds
from servicekit.errors import Invalid, NotFound, Unavailable
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


async def add(queue: JobQueue, key: str = "a", kind: str = "train", max_attempts: int = 3, run_after: datetime | None = None) -> UUID:
    async with queue.engine.begin() as conn:
        return await queue.enqueue(conn, kind, key, {"n": key}, max_attempts, run_after)


async def take(queue: JobQueue, kind: str = "train", lease_s: float = 60) -> Job:
    job = await queue.claim([kind], "me", lease_s)
    assert job is not None
    return job


async def complete(queue: JobQueue, job: Job) -> None:
    async with queue.engine.begin() as conn:
        await queue.complete(conn, job)


async def fail(queue: JobQueue, job: Job, retry: bool, cause: str = "because") -> State:
    async with queue.engine.begin() as conn:
        return await queue.fail(conn, job, cause, retry)


async def cancel(queue: JobQueue, job_id: UUID) -> State:
    async with queue.engine.begin() as conn:
        return await queue.cancel(conn, job_id)


async def bury(queue: JobQueue) -> list[tuple[Job, State, str]]:
    async with queue.engine.begin() as conn:
        return await queue.bury(conn, ["train"])


async def lapse(engine: AsyncEngine) -> None:
    """Lets all leases and waits run out, without waiting."""
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE svc.job SET lease_until = lease_until - interval '1 day', run_after = run_after - interval '1 day'")
        )


async def test_a_job_is_done_once(queue: JobQueue) -> None:
    job_id = await add(queue)
    job = await take(queue)
    assert (job.id, job.kind, job.key, job.payload, job.attempt, job.fencing_token) == (job_id, "train", "a", {"n": "a"}, 1, 1)
    assert await queue.claim(["train"], "other", 60) is None
    await complete(queue, job)
    record = await queue.get(job_id)
    assert (record.state, record.cause, record.lease_until, record.worker) == (State.SUCCEEDED, None, None, "me")
    assert record.ended_at is not None
    assert await queue.claim(["train"], "other", 60) is None


async def test_it_exists_if_and_only_if_the_transaction_commits(queue: JobQueue) -> None:
    async with queue.engine.connect() as conn:
        await queue.enqueue(conn, "train", "a", {})
        assert await queue.claim(["train"], "me", 60) is None  # not committed yet
        await conn.rollback()
    assert await queue.list() == []
    await add(queue)
    job = await take(queue)
    async with queue.engine.connect() as conn:
        await queue.complete(conn, job)
        await conn.rollback()
    assert (await queue.get(job.id)).state is State.RUNNING


async def test_the_same_kind_and_key_is_the_same_job_for_ever(queue: JobQueue) -> None:
    job_id = await add(queue)
    assert await add(queue) == job_id
    job = await take(queue)
    await complete(queue, job)
    assert await add(queue) == job_id
    assert await queue.claim(["train"], "me", 60) is None
    assert await add(queue, kind="evaluate") != job_id


async def test_many_enqueue_the_same_at_once(queue: JobQueue) -> None:
    ids = await asyncio.gather(*(add(queue) for _ in range(20)))
    assert len(set(ids)) == 1
    assert len(await queue.list()) == 1


async def test_many_claim_at_once_and_none_gets_anothers(queue: JobQueue) -> None:
    added = {await add(queue, str(n)) for n in range(30)}
    claims = await asyncio.gather(*(queue.claim(["train"], f"w{n}", 60) for n in range(40)))
    got = [job.id for job in claims if job is not None]
    assert len(got) == len(set(got))
    while (job := await queue.claim(["train"], "last", 60)) is not None:
        got.append(job.id)
    assert set(got) == added
    assert len(got) == 30


async def test_only_kinds_asked_for_and_the_longest_due_first(queue: JobQueue) -> None:
    now = datetime.now(UTC)
    await add(queue, "late", run_after=now - timedelta(minutes=1))
    await add(queue, "early", run_after=now - timedelta(minutes=2))
    await add(queue, "future", run_after=now + timedelta(hours=1))
    await add(queue, "other", kind="evaluate")
    assert [(await take(queue)).key, (await take(queue)).key] == ["early", "late"]
    assert await queue.claim(["train"], "me", 60) is None
    assert (await queue.claim(["deploy"], "me", 60)) is None
    assert (await take(queue, "evaluate")).key == "other"


async def test_a_lease_that_ran_out_gives_the_job_to_another(queue: JobQueue, engine: AsyncEngine) -> None:
    await add(queue)
    first = await take(queue)
    await lapse(engine)
    second = await take(queue)
    assert (second.id, second.attempt) == (first.id, 2)
    assert second.fencing_token > first.fencing_token
    with pytest.raises(LeaseLost):
        await queue.heartbeat(first, 60)
    with pytest.raises(LeaseLost):
        await complete(queue, first)
    for retry in (True, False):
        with pytest.raises(LeaseLost):
            await fail(queue, first, retry)
    async with queue.engine.connect() as conn:
        with pytest.raises(LeaseLost):
            await queue.release(conn, first)
        with pytest.raises(LeaseLost):
            await queue.end_cancelled(conn, first)
    assert not await queue.heartbeat(second, 60)
    await complete(queue, second)
    with pytest.raises(LeaseLost):
        await queue.heartbeat(second, 60)


async def test_a_heartbeat_keeps_the_job_by_the_databases_time(queue: JobQueue, engine: AsyncEngine) -> None:
    await add(queue)
    job = await take(queue, lease_s=5)
    before = (await queue.get(job.id)).lease_until
    await queue.heartbeat(job, 3600)
    after = (await queue.get(job.id)).lease_until
    assert before is not None
    assert after is not None
    assert after - before > timedelta(minutes=50)
    # Late, but nobody took it: still ours.
    await lapse(engine)
    await queue.heartbeat(job, 60)
    assert await queue.claim(["train"], "other", 60) is None


async def test_renewing_many_tells_which_are_lost_and_which_to_cancel(queue: JobQueue, engine: AsyncEngine) -> None:
    for key in "abc":
        await add(queue, key)
    jobs = [await take(queue) for _ in range(3)]
    await complete(queue, jobs[0])
    await cancel(queue, jobs[1].id)
    expected = {jobs[1].id: True, jobs[2].id: False}
    assert await queue.peek(jobs) == expected
    assert await queue.renew(jobs, 60) == expected
    assert await queue.renew([], 60) == {}


async def test_retry_by_cause(queue: JobQueue) -> None:
    await add(queue, max_attempts=3)
    assert await fail(queue, await take(queue), retry=True) is State.QUEUED
    assert (await queue.list())[0].cause == "because"
    assert await fail(queue, await take(queue), retry=True) is State.QUEUED
    last = await take(queue)
    assert last.attempt == 3
    assert await fail(queue, last, retry=True, cause="still not") is State.FAILED
    record = await queue.get(last.id)
    assert (record.state, record.cause, record.attempt) == (State.FAILED, "still not", 3)
    await add(queue, "b")
    assert await fail(queue, await take(queue), retry=False) is State.FAILED


async def test_a_failed_attempt_waits_for_its_backoff(engine: AsyncEngine) -> None:
    queue = JobQueue(engine, "svc", SystemClock(), SystemIds(), Backoff(first_s=1000, most_s=10_000, random=lambda: 1.0))
    await add(queue)
    await fail(queue, await take(queue), retry=True)
    assert await queue.claim(["train"], "me", 60) is None
    async with engine.connect() as conn:
        seconds = await conn.scalar(text("SELECT extract(epoch FROM run_after - clock_timestamp()) FROM svc.job"))
    assert 900 < seconds <= 1000


async def test_a_job_handed_back_is_there_at_once_and_has_lost_no_attempt(queue: JobQueue) -> None:
    await add(queue, max_attempts=1)
    first = await take(queue)
    async with queue.engine.begin() as conn:
        await queue.release(conn, first)
    second = await take(queue)
    assert second.attempt == 1
    assert second.fencing_token > first.fencing_token
    with pytest.raises(LeaseLost):
        await complete(queue, first)


async def test_cancelling_what_waits_runs_and_has_ended(queue: JobQueue) -> None:
    waiting = await add(queue, "waiting")
    assert await cancel(queue, waiting) is State.CANCELLED
    assert await cancel(queue, waiting) is State.CANCELLED
    assert await queue.claim(["train"], "me", 60) is None

    await add(queue, "running")
    job = await take(queue)
    assert await cancel(queue, job.id) is State.RUNNING
    assert await queue.heartbeat(job, 60) is True
    async with queue.engine.begin() as conn:
        await queue.end_cancelled(conn, job)
    assert (await queue.get(job.id)).state is State.CANCELLED

    await add(queue, "done")
    done = await take(queue)
    await complete(queue, done)
    assert await cancel(queue, done.id) is State.SUCCEEDED
    with pytest.raises(NotFound):
        await cancel(queue, uuid4())


async def test_a_cancelled_job_is_not_tried_again(queue: JobQueue) -> None:
    await add(queue)
    job = await take(queue)
    await cancel(queue, job.id)
    assert await fail(queue, job, retry=True) is State.CANCELLED
    assert await queue.claim(["train"], "me", 60) is None


async def test_a_cancelled_job_that_is_handed_back_is_cancelled(queue: JobQueue) -> None:
    await add(queue)
    job = await take(queue)
    await cancel(queue, job.id)
    async with queue.engine.begin() as conn:
        assert await queue.release(conn, job) is State.CANCELLED
    assert (await queue.get(job.id)).state is State.CANCELLED


async def test_work_that_was_finished_before_the_cancellation_reached_it_succeeds(queue: JobQueue) -> None:
    await add(queue)
    job = await take(queue)
    await cancel(queue, job.id)
    await complete(queue, job)
    assert (await queue.get(job.id)).state is State.SUCCEEDED


async def test_a_cancelled_job_whose_worker_died_is_buried(queue: JobQueue, engine: AsyncEngine) -> None:
    await add(queue)
    job = await take(queue)
    await cancel(queue, job.id)
    await lapse(engine)
    assert await queue.claim(["train"], "me", 60) is None
    ((buried, state, _),) = await bury(queue)
    assert (buried.id, state) == (job.id, State.CANCELLED)
    with pytest.raises(LeaseLost):
        await complete(queue, job)


async def test_a_job_whose_worker_died_in_the_last_attempt_is_buried(queue: JobQueue, engine: AsyncEngine) -> None:
    await add(queue, max_attempts=2)
    await take(queue)
    assert await bury(queue) == []
    await lapse(engine)
    assert await bury(queue) == []  # one attempt is left
    last = await take(queue)
    await lapse(engine)
    assert await queue.claim(["train"], "me", 60) is None
    ((buried, state, cause),) = await bury(queue)
    assert (buried.id, buried.attempt, state) == (last.id, 2, State.FAILED)
    assert "me" in cause
    assert await bury(queue) == []
    with pytest.raises(LeaseLost):
        await queue.heartbeat(last, 60)


async def test_several_bury_at_once_and_each_grave_is_dug_once(queue: JobQueue, engine: AsyncEngine) -> None:
    for n in range(10):
        await add(queue, str(n), max_attempts=1)
        await take(queue)
    await lapse(engine)
    found = [job.id for graves in await asyncio.gather(*(bury(queue) for _ in range(8))) for job, _, _ in graves]
    assert len(found) == len(set(found)) == 10


async def test_listing_in_pages(queue: JobQueue) -> None:
    ids = [await add(queue, str(n), kind="train" if n % 2 else "evaluate") for n in range(6)]
    page = await queue.list(limit=4)
    assert [record.id for record in page] == ids[::-1][:4]
    assert [record.id for record in await queue.list(before=page[-1].id)] == ids[::-1][4:]
    assert {record.kind for record in await queue.list(kinds=["train"])} == {"train"}
    await complete(queue, await take(queue))
    assert len(await queue.list(states=[State.SUCCEEDED])) == 1
    assert len(await queue.list(states=[State.QUEUED], kinds=["train"])) == 2
    with pytest.raises(NotFound):
        await queue.get(uuid4())


async def test_a_job_has_an_attempt(queue: JobQueue) -> None:
    with pytest.raises(Invalid):
        await add(queue, max_attempts=0)


async def test_a_database_that_is_away_is_unavailable() -> None:
    engine = create_async_engine("postgresql+asyncpg://nobody:x@127.0.0.1:1/none")
    queue = JobQueue(engine, "svc", SystemClock(), SystemIds())
    with pytest.raises(Unavailable):
        await queue.claim(["train"], "me", 60)
    with pytest.raises(Unavailable):
        await queue.get(uuid4())
    await engine.dispose()


async def test_the_tables_own_rules_hold(queue: JobQueue, engine: AsyncEngine) -> None:
    from sqlalchemy.exc import IntegrityError

    await add(queue)
    for nonsense in ("state = 'lost'", "state = 'running'", "state = 'failed'", "attempt = 4", "lease_until = now()", "ended_at = now()"):
        async with engine.connect() as conn:
            with pytest.raises(IntegrityError):
                await conn.execute(text(f"UPDATE svc.job SET {nonsense}"))
