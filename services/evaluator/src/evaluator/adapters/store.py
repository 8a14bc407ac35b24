"""The unit of work on PostgreSQL: evaluations, champions, the queue of jobs and the outbox, in one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from jobs import JobQueue
from pydantic import TypeAdapter
from sqlalchemy import Row, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from evaluator.adapters import tables
from evaluator.domain.candidate import Blob, Candidate
from evaluator.domain.evaluation import Champion, Evaluation, Event, Journey, Judgement, RunSkipped, Status
from evaluator.domain.policy import Policy

EVALUATE = "evaluate"
"""The kind of the evaluator's jobs; the key is the evaluation's id."""

MAX_ATTEMPTS = 10_000
"""How often an evaluation is tried when what it needs is away: an outage, however long, is no verdict on a candidate. What the
model does to its own process ends its evaluation sooner (MAX_DEATHS)."""

Encode = Callable[[Event, int], Envelope]
"""How a domain event is written for the wire, given its model's next sequence number; the entry points know that."""

_candidate = TypeAdapter(Candidate)
_policy = TypeAdapter(Policy)
_judgement = TypeAdapter(Judgement)


class SqlEvaluations:
    """Implements `ports.Evaluations`."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, evaluation: Evaluation) -> bool:
        journey, candidate = evaluation.journey, evaluation.candidate
        result = await self._conn.execute(
            insert(tables.evaluation)
            .values(
                evaluation_id=evaluation.evaluation_id,
                journey_id=journey.journey_id,
                delivery=journey.delivery,
                delivery_revision=journey.delivery_revision,
                run_id=journey.run_id,
                model=evaluation.model,
                candidate_sha256=candidate.model.blob.sha256 if candidate else "",
                replaces=evaluation.replaces,
                champion_at_least=evaluation.champion_at_least,
                status=evaluation.status.value,
                reason=evaluation.reason,
                candidate=_json(_candidate, candidate),
                policy=_json(_policy, evaluation.policy),
                judgement=_json(_judgement, evaluation.judgement),
                created_at=evaluation.created_at,
                finished_at=evaluation.finished_at,
            )
            .on_conflict_do_nothing(constraint="evaluation_once")
        )
        return result.rowcount == 1

    async def get(self, evaluation_id: str) -> Evaluation | None:
        query = select(tables.evaluation).where(tables.evaluation.c.evaluation_id == evaluation_id)
        row = (await self._conn.execute(query)).one_or_none()
        return None if row is None else _evaluation(row)

    async def lock(self, evaluation_id: str) -> Evaluation | None:
        query = select(tables.evaluation).where(tables.evaluation.c.evaluation_id == evaluation_id).with_for_update()
        row = (await self._conn.execute(query)).one_or_none()
        return None if row is None else _evaluation(row)

    async def save(self, evaluation: Evaluation) -> None:
        await self._conn.execute(
            tables.evaluation.update()
            .where(tables.evaluation.c.evaluation_id == evaluation.evaluation_id)
            .values(
                status=evaluation.status.value,
                reason=evaluation.reason,
                judgement=_json(_judgement, evaluation.judgement),
                finished_at=evaluation.finished_at,
            )
        )

    async def page(self, delivery: str, run_id: str, before: str, limit: int) -> Sequence[Evaluation]:
        columns = tables.evaluation.c
        query = select(tables.evaluation).order_by(columns.evaluation_id.desc()).limit(limit)
        if delivery:
            query = query.where(columns.delivery == delivery)
        if run_id:
            query = query.where(columns.run_id == run_id)
        if before:
            query = query.where(columns.evaluation_id < before)
        return [_evaluation(row) for row in await self._conn.execute(query)]


class SqlUnitOfWork:
    """Implements `ports.UnitOfWork` on one connection."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, queue: JobQueue, encode: Encode) -> None:
        self.evaluations = SqlEvaluations(conn)
        self._conn = conn
        self._outbox = outbox
        self._queue = queue
        self._encode = encode

    async def champion(self, model: str) -> Champion | None:
        columns = tables.model.c
        query = select(columns.champion_version, columns.champion_sha256, columns.champion_size_bytes, columns.champion_key)
        row = (await self._conn.execute(query.where(columns.name == model))).one_or_none()
        if row is None or row.champion_version is None:
            return None
        return Champion(row.champion_version, Blob(row.champion_sha256, row.champion_size_bytes, row.champion_key))

    async def crown(self, model: str, champion: Champion | None) -> None:
        values = {
            "champion_version": champion.version if champion else None,
            "champion_sha256": champion.blob.sha256 if champion else None,
            "champion_size_bytes": champion.blob.size_bytes if champion else None,
            "champion_key": champion.blob.key if champion else None,
        }
        statement = insert(tables.model).values(name=model, **values)
        await self._conn.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))

    async def enqueue(self, evaluation: Evaluation) -> None:
        await self._queue.enqueue(self._conn, EVALUATE, evaluation.evaluation_id, {}, max_attempts=MAX_ATTEMPTS)

    async def emit(self, event: Event) -> None:
        name = event.model if isinstance(event, RunSkipped) else event.judgement.model
        # Holds the model's row until the end of the transaction: the order of the numbers is the order of the commits.
        numbered = (
            insert(tables.model)
            .values(name=name, last_sequence=1)
            .on_conflict_do_update(index_elements=["name"], set_={"last_sequence": tables.model.c.last_sequence + 1})
            .returning(tables.model.c.last_sequence)
        )
        sequence: int = (await self._conn.execute(numbered)).scalar_one()
        await self._outbox.append(self._conn, [self._encode(event, sequence)])


class SqlStore:
    """Implements `ports.Store`."""

    def __init__(self, engine: AsyncEngine, outbox: Outbox, queue: JobQueue, encode: Encode) -> None:
        self._engine = engine
        self._outbox = outbox
        self._queue = queue
        self._encode = encode

    def on(self, conn: AsyncConnection) -> SqlUnitOfWork:
        """A unit of work in a transaction that somebody else ends, who then calls `committed`."""
        return SqlUnitOfWork(conn, self._outbox, self._queue, self._encode)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        async with self._engine.begin() as conn:
            yield self.on(conn)
        self.committed()

    def committed(self) -> None:
        """Wakes who waits for new events and jobs."""
        self._outbox.committed()
        self._queue.notify()


def _json(adapter: TypeAdapter[Any], value: object) -> Any:
    return None if value is None else adapter.dump_python(value, mode="json")


def _evaluation(row: Row[Any]) -> Evaluation:
    return Evaluation(
        evaluation_id=row.evaluation_id,
        journey=Journey(row.journey_id, row.delivery, row.delivery_revision, row.run_id),
        model=row.model,
        status=Status(row.status),
        created_at=row.created_at,
        candidate=None if row.candidate is None else _candidate.validate_python(row.candidate),
        policy=None if row.policy is None else _policy.validate_python(row.policy),
        replaces=row.replaces,
        champion_at_least=row.champion_at_least,
        reason=row.reason,
        judgement=None if row.judgement is None else _judgement.validate_python(row.judgement),
        finished_at=row.finished_at,
    )
