"""The queue of jobs: one table in PostgreSQL. All time is the database's, so that no two machines' clocks are compared."""

from __future__ import annotations

import builtins
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from servicekit import telemetry
from servicekit.clock import Clock, Ids
from servicekit.db import is_transient, translate
from servicekit.errors import Conflict, Invalid, NotFound
from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from jobs.schema import table


class State(StrEnum):
    """Where a job is. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class LeaseLost(Conflict):
    """The job is no longer this holder's: its lease ran out and another took it, or it has ended. Stop, and write nothing more for it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job. `fencing_token` is greater than that of every earlier claim of it: whoever stores something on behalf of a job
    stores the token too and refuses a smaller one. `attempt` counts from 1."""

    id: UUID
    kind: str
    key: str
    payload: dict[str, Any] = field(hash=False)
    attempt: int
    fencing_token: int
    max_attempts: int = 1
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it stands in the table."""

    id: UUID
    kind: str
    key: str
    payload: dict[str, Any] = field(hash=False)
    state: State
    attempt: int
    max_attempts: int
    fencing_token: int
    worker: str | None
    cancel_requested: bool
    cause: str | None
    run_after: datetime
    lease_until: datetime | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a job waits after a failed attempt: doubling from `first_s` up to `most_s`, then spread over half of that to all of it,
    so that jobs that failed together do not come back together."""

    first_s: float = 1.0
    most_s: float = 300.0
    random: Callable[[], float] = random.random

    def after(self, attempt: int) -> float:
        """Seconds to wait after this attempt (from 1 on)."""
        full = min(self.most_s, self.first_s * 2.0 ** min(attempt - 1, 60))
        return full * (0.5 + 0.5 * self.random())


_RECORD = (
    "id, kind, key, payload, state, attempt, max_attempts, fencing_token, worker, cancel_requested, cause, "
    "run_after, lease_until, created_at, started_at, ended_at"
)
_JOB = "id, kind, key, payload, attempt, fencing_token, max_attempts, traceparent"


class JobQueue:
    """Jobs of one service. Methods with a connection work in its transaction: what they do happens if and only if that commits.

    The others use a transaction of their own and raise Unavailable when the database is away. Nothing here waits for work: a
    Worker does, or whoever calls `claim`.
    """

    def __init__(self, engine: AsyncEngine, schema: str, clock: Clock, ids: Ids, backoff: Backoff | None = None) -> None:
        self.engine = engine
        self.clock = clock
        self._ids = ids
        self._backoff = backoff or Backoff()
        self._table = f'"{table(schema).schema}".job'
        self._listeners: list[Callable[[], None]] = []

    async def enqueue(
        self,
        conn: AsyncConnection,
        kind: str,
        key: str,
        payload: dict[str, Any],
        max_attempts: int = 3,
        run_after: datetime | None = None,
    ) -> UUID:
        """Adds a job, to run at `run_after` (aware) or at once, and returns its id; a job of this kind and key that exists, ended or
        not, is left as it is and its id returned, so this may be repeated. Call `notify` after the commit."""
        if max_attempts < 1:
            raise Invalid("a job has at least one attempt")
        inserted = await conn.scalar(
            self._sql(
                "INSERT INTO {job} (id, kind, key, payload, max_attempts, run_after, traceparent) "
                "VALUES (:id, :kind, :key, CAST(:payload AS jsonb), :max_attempts, "
                "coalesce(CAST(:run_after AS timestamptz), clock_timestamp()), :traceparent) "
                "ON CONFLICT (kind, key) DO NOTHING RETURNING id"
            ),
            {
                "id": self._ids.uuid7(),
                "kind": kind,
                "key": key,
                "payload": json.dumps(payload),
                "max_attempts": max_attempts,
                "run_after": run_after,
                "traceparent": telemetry.current_traceparent(),
            },
        )
        if inserted is None:
            # A statement of its own, so that it sees what a concurrent transaction has committed while the insert waited for it.
            inserted = await conn.scalar(self._sql("SELECT id FROM {job} WHERE kind = :kind AND key = :key"), {"kind": kind, "key": key})
        if not isinstance(inserted, UUID):
            raise NotFound(f"the job {kind} {key} was deleted at this moment")
        return inserted

    async def claim(self, kinds: Collection[str], worker: str, lease_s: float) -> Job | None:
        """Takes the job that is due for longest: one that waits, or one whose holder let its lease run out. None: nothing is due.

        The lease ends `lease_s` seconds of the database's time after the claim. A job whose last attempt ran out is not given
        out again: see `bury`.
        """
        rows = await self._execute(
            "UPDATE {job} AS job SET state = 'running', attempt = attempt + 1, fencing_token = fencing_token + 1, "
            "worker = :worker, lease_until = clock_timestamp() + make_interval(secs => :lease_s), started_at = clock_timestamp() "
            "WHERE id = (SELECT id FROM {job} WHERE kind = ANY(:kinds) AND NOT cancel_requested AND attempt < max_attempts "
            "AND (state = 'queued' AND run_after <= clock_timestamp() OR state = 'running' AND lease_until < clock_timestamp()) "
            "ORDER BY run_after, id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING {job_columns}",
            {"kinds": [*kinds], "worker": worker, "lease_s": lease_s},
        )
        return _job(rows[0]) if rows else None

    async def heartbeat(self, job: Job, lease_s: float) -> bool:
        """Renews the lease to `lease_s` seconds from now; True when the job shall be cancelled. Raises LeaseLost.

        A lease that has run out is renewed all the same as long as nobody else took the job.
        """
        answers = await self.renew([job], lease_s)
        if job.id not in answers:
            raise LeaseLost(f"the job {job.kind} {job.key} is no longer ours")
        return answers[job.id]

    async def renew(self, jobs: Sequence[Job], lease_s: float) -> dict[UUID, bool]:
        """Heartbeats of several jobs at once: {id: shall be cancelled}; those that are lost are missing."""
        rows = await self._execute(
            "UPDATE {job} AS job SET lease_until = clock_timestamp() + make_interval(secs => :lease_s) "
            "FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS held (held_id, token) "
            "WHERE id = held_id AND fencing_token = token AND state = 'running' RETURNING id, cancel_requested",
            {"lease_s": lease_s, "ids": [job.id for job in jobs], "tokens": [job.fencing_token for job in jobs]},
        )
        return {row.id: row.cancel_requested for row in rows}

    async def peek(self, jobs: Sequence[Job]) -> dict[UUID, bool]:
        """What `renew` answers, without renewing."""
        rows = await self._execute(
            "SELECT id, cancel_requested FROM {job} "
            "JOIN unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS held (held_id, token) ON id = held_id "
            "WHERE fencing_token = token AND state = 'running'",
            {"ids": [job.id for job in jobs], "tokens": [job.fencing_token for job in jobs]},
        )
        return {row.id: row.cancel_requested for row in rows}

    async def complete(self, conn: AsyncConnection, job: Job) -> None:
        """Ends the job with success. Raises LeaseLost, upon which the caller's transaction must not commit."""
        await self._end(conn, job, "state = 'succeeded', cause = NULL, ended_at = clock_timestamp()", {})

    async def fail(self, conn: AsyncConnection, job: Job, cause: str, retry: bool) -> State:
        """Ends the attempt. With `retry` and attempts left the job waits for its backoff and is queued again, else it has failed;
        returns which. When it was asked to be cancelled meanwhile, it is cancelled. Raises LeaseLost like `complete`."""
        again = retry and job.attempt < job.max_attempts
        changed = await self._end(
            conn,
            job,
            "state = CASE WHEN cancel_requested THEN 'cancelled' WHEN :again THEN 'queued' ELSE 'failed' END, cause = :cause, "
            "ended_at = CASE WHEN :again AND NOT cancel_requested THEN NULL ELSE clock_timestamp() END, "
            "run_after = CASE WHEN :again THEN clock_timestamp() + make_interval(secs => :delay_s) ELSE run_after END",
            {"again": again, "cause": cause, "delay_s": self._backoff.after(job.attempt)},
        )
        return State(changed.state)

    async def end_cancelled(self, conn: AsyncConnection, job: Job, cause: str = "cancelled") -> None:
        """Ends a claimed job as cancelled: what its holder does when a heartbeat told it so. Raises LeaseLost like `complete`."""
        await self._end(conn, job, "state = 'cancelled', cause = :cause, ended_at = clock_timestamp()", {"cause": cause})

    async def release(self, conn: AsyncConnection, job: Job) -> State:
        """Hands the job back unfinished, to be claimed at once by another; the attempt is not counted. When it was asked to be
        cancelled meanwhile, it is cancelled; returns which. Raises LeaseLost like `complete`."""
        changed = await self._end(
            conn,
            job,
            "state = CASE WHEN cancel_requested THEN 'cancelled' ELSE 'queued' END, attempt = attempt - 1, "
            "ended_at = CASE WHEN cancel_requested THEN clock_timestamp() END, run_after = clock_timestamp()",
            {},
        )
        return State(changed.state)

    async def cancel(self, conn: AsyncConnection, job_id: UUID, cause: str = "cancelled") -> State:
        """Cancels a job at any time and returns its state: one that waits is cancelled now; one that runs is asked to, by its holder's
        next heartbeat; one that has ended stays as it ended. Raises NotFound. Call `notify` after the commit."""
        changed = await conn.scalar(
            self._sql(
                "UPDATE {job} SET cancel_requested = true, cause = :cause, "
                "state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END, "
                "ended_at = CASE state WHEN 'queued' THEN clock_timestamp() ELSE ended_at END "
                "WHERE id = :id AND state IN ('queued', 'running') RETURNING state"
            ),
            {"id": job_id, "cause": cause},
        )
        if changed is None:
            changed = await conn.scalar(self._sql("SELECT state FROM {job} WHERE id = :id"), {"id": job_id})
        if changed is None:
            raise NotFound(f"there is no job {job_id}")
        return State(changed)

    async def bury(self, conn: AsyncConnection, kinds: Collection[str]) -> builtins.list[tuple[Job, State, str]]:
        """Ends the jobs whose holder let the lease run out and that nobody may take again: failed when that was the last attempt,
        cancelled when they were asked to be. Returns each with its state and cause, for the caller to draw its consequences in
        the same transaction."""
        rows = await conn.execute(
            self._sql(
                "UPDATE {job} AS job SET state = CASE WHEN cancel_requested THEN 'cancelled' ELSE 'failed' END, "
                "cause = CASE WHEN cancel_requested THEN coalesce(cause, 'cancelled') "
                "ELSE 'its worker ' || worker || ' died or lost touch in attempt ' || attempt END, "
                "fencing_token = fencing_token + 1, lease_until = NULL, ended_at = clock_timestamp() "
                "WHERE id IN (SELECT id FROM {job} WHERE kind = ANY(:kinds) AND state = 'running' "
                "AND lease_until < clock_timestamp() AND (cancel_requested OR attempt >= max_attempts) "
                "ORDER BY id FOR UPDATE SKIP LOCKED) RETURNING {job_columns}, state, cause"
            ),
            {"kinds": [*kinds]},
        )
        return [(_job(row), State(row.state), row.cause) for row in rows]

    async def get(self, job_id: UUID) -> JobRecord:
        """The job as it stands. Raises NotFound."""
        rows = await self._execute("SELECT {record_columns} FROM {job} WHERE id = :id", {"id": job_id})
        if not rows:
            raise NotFound(f"there is no job {job_id}")
        return _record(rows[0])

    async def list(
        self,
        kinds: Collection[str] | None = None,
        states: Collection[State] | None = None,
        limit: int = 100,
        before: UUID | None = None,
    ) -> builtins.list[JobRecord]:
        """Jobs, newest first; give the last id as `before` for the next page."""
        rows = await self._execute(
            "SELECT {record_columns} FROM {job} "
            "WHERE (CAST(:kinds AS text[]) IS NULL OR kind = ANY(:kinds)) AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states)) "
            "AND (CAST(:before AS uuid) IS NULL OR id < :before) ORDER BY id DESC LIMIT :limit",
            {
                "kinds": None if kinds is None else [*kinds],
                "states": None if states is None else [str(state) for state in states],
                "before": before,
                "limit": limit,
            },
        )
        return [_record(row) for row in rows]

    def notify(self) -> None:
        """Wakes the workers of this process: call it after the commit of `enqueue` or `cancel`. Others find the change by polling."""
        for listener in self._listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` upon every `notify`, until the function that this returns is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def _end(self, conn: AsyncConnection, job: Job, assignments: str, parameters: dict[str, Any]) -> Row[Any]:
        result = await conn.execute(
            self._sql(
                "UPDATE {job} SET lease_until = NULL, {assignments} "
                "WHERE id = :id AND fencing_token = :token AND state = 'running' RETURNING state",
                assignments=assignments,
            ),
            {**parameters, "id": job.id, "token": job.fencing_token},
        )
        row = result.one_or_none()
        if row is None:
            raise LeaseLost(f"the job {job.kind} {job.key} is no longer ours")
        return row

    def _sql(self, template: str, **more: str) -> TextClause:
        return text(template.format(job=self._table, job_columns=_JOB, record_columns=_RECORD, **more))

    async def _execute(self, sql: str, parameters: dict[str, Any]) -> Sequence[Row[Any]]:
        try:
            async with self.engine.begin() as conn:
                return (await conn.execute(self._sql(sql), parameters)).all()
        except Exception as error:
            if is_transient(error):
                raise translate(error) from error
            raise


def _job(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,
        key=row.key,
        payload=row.payload,
        attempt=row.attempt,
        fencing_token=row.fencing_token,
        max_attempts=row.max_attempts,
        traceparent=row.traceparent,
    )


def _record(row: Row[Any]) -> JobRecord:
    return JobRecord(**{**row._mapping, "state": State(row.state)})
