"""The unit of work on PostgreSQL: trainings, uploads, deliveries, and the outbox and the job queue within the same transaction."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from jobs import JobQueue, State
from sqlalchemy import RowMapping, Select, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from trainer.adapters import tables as t
from trainer.domain.conversion import Conversion
from trainer.domain.training import Event, Resources, Source, Status, Training
from trainer.ports import AppliedDelivery, RequestKey, Upload

KIND = "training"
"""The kind of the trainer's jobs; their key is the training's id."""

CONVERSION = "conversion"
"""The kind of the jobs that convert logged models; their key is `Conversion.key`, their payload its fields."""

CONVERSION_ATTEMPTS = 10
"""Whoever gets the last one only says that the model could not be converted."""

Encode = Callable[[Event], Envelope]
"""How a domain event is written for the wire; the entry points know that."""


class SqlTrainings:
    """Implements `ports.Trainings` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, training: Training, request: RequestKey | None) -> bool:
        row = {
            **_values(training),
            "training_id": training.training_id,
            "created_at": training.created_at,
            "requested_by": request.caller if request else None,
            "request_id": request.request_id if request else None,
        }
        statement = (
            upsert(t.training).values(**row).on_conflict_do_nothing(constraint="training_request").returning(t.training.c.training_id)
        )
        return (await self._conn.execute(statement)).first() is not None

    async def get(self, training_id: str) -> Training | None:
        return await self._one(select(t.training).where(t.training.c.training_id == training_id))

    async def lock(self, training_id: str) -> Training | None:
        return await self._one(select(t.training).where(t.training.c.training_id == training_id).with_for_update())

    async def by_request(self, request: RequestKey) -> Training | None:
        same = (t.training.c.requested_by == request.caller) & (t.training.c.request_id == request.request_id)
        return await self._one(select(t.training).where(same))

    async def save(self, training: Training) -> None:
        await self._conn.execute(update(t.training).where(t.training.c.training_id == training.training_id).values(**_values(training)))

    async def last_upload(self, delivery: str) -> Source | None:
        uploaded = (t.training.c.delivery == delivery) & (t.training.c.source["upload_id"].astext != "")
        newest = select(t.training.c.source).where(uploaded).order_by(t.training.c.created_at.desc(), t.training.c.training_id.desc())
        found = (await self._conn.execute(newest.limit(1))).scalar_one_or_none()
        return None if found is None else Source(**found)

    async def page(self, delivery: str, before: str, limit: int) -> Sequence[Training]:
        place = tuple_(t.training.c.created_at, t.training.c.training_id)
        statement = select(t.training).order_by(t.training.c.created_at.desc(), t.training.c.training_id.desc()).limit(limit)
        if delivery:
            statement = statement.where(t.training.c.delivery == delivery)
        if before:
            last = t.training.alias("last")
            statement = statement.where(
                place < select(last.c.created_at, last.c.training_id).where(last.c.training_id == before).scalar_subquery()
            )
        return [_training(row) for row in (await self._conn.execute(statement)).mappings()]

    async def _one(self, statement: Select[Any]) -> Training | None:
        row = (await self._conn.execute(statement)).mappings().first()
        return None if row is None else _training(row)


def _values(training: Training) -> dict[str, Any]:
    return {
        "status": training.status.value,
        "delivery": training.delivery,
        "experiment": training.experiment,
        "source": dataclasses.asdict(training.source),
        "command": list(training.command),
        "environment": dict(training.environment),
        "resources": dataclasses.asdict(training.resources),
        "seed": training.seed,
        "run_name": training.run_name,
        "submitted_by": training.submitted_by,
        "max_attempts": training.max_attempts,
        "job_id": training.job_id,
        "run_id": training.run_id,
        "attempt": training.attempt,
        "failures": training.failures,
        "reason": training.reason,
        "cancelled_by": training.cancelled_by,
        "finished_at": training.finished_at,
        "event_sequence": training.event_sequence,
        "started_by": training.started_by,
    }


def _training(row: RowMapping) -> Training:
    return Training(
        training_id=row["training_id"],
        status=Status(row["status"]),
        delivery=row["delivery"],
        experiment=row["experiment"],
        source=Source(**row["source"]),
        command=tuple(row["command"]),
        environment=row["environment"],
        resources=Resources(**row["resources"]),
        seed=row["seed"],
        run_name=row["run_name"],
        submitted_by=row["submitted_by"],
        max_attempts=row["max_attempts"],
        job_id=row["job_id"],
        run_id=row["run_id"],
        attempt=row["attempt"],
        failures=row["failures"],
        reason=row["reason"],
        cancelled_by=row["cancelled_by"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        event_sequence=row["event_sequence"],
        started_by=row["started_by"],
    )


class SqlUploads:
    """Implements `ports.Uploads` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, upload: Upload) -> Upload:
        made = upsert(t.source_upload).values(**dataclasses.asdict(upload)).on_conflict_do_nothing(constraint="source_upload_content")
        await self._conn.execute(made)
        same = (t.source_upload.c.uploaded_by == upload.uploaded_by) & (t.source_upload.c.sha256 == upload.sha256)
        return _upload((await self._conn.execute(select(t.source_upload).where(same))).mappings().one())

    async def get(self, upload_id: str) -> Upload | None:
        found = await self._conn.execute(select(t.source_upload).where(t.source_upload.c.upload_id == upload_id))
        row = found.mappings().first()
        return None if row is None else _upload(row)

    async def verified(self, upload_id: str) -> None:
        await self._conn.execute(update(t.source_upload).where(t.source_upload.c.upload_id == upload_id).values(verified=True))


def _upload(row: RowMapping) -> Upload:
    return Upload(row["upload_id"], row["uploaded_by"], row["key"], row["size_bytes"], row["sha256"], row["verified"])


class SqlDeliveries:
    """Implements `ports.Deliveries` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def remember(self, delivery: AppliedDelivery) -> None:
        row = dataclasses.asdict(delivery)
        made = upsert(t.delivery).values(**row)
        # One that was kept before it was known who applied it is completed when it is told again.
        completed = (t.delivery.c.revision == made.excluded.revision) & (t.delivery.c.applied_by == "") & (made.excluded.applied_by != "")
        newer = (t.delivery.c.revision < made.excluded.revision) | completed
        # What is new starts to count anew.
        changed = {**row, "scheduled_at": None}
        await self._conn.execute(made.on_conflict_do_update(index_elements=["name"], set_=changed, where=newer))

    async def get(self, name: str) -> AppliedDelivery | None:
        row = (await self._conn.execute(select(t.delivery).where(t.delivery.c.name == name))).mappings().first()
        return None if row is None else _delivery(row)

    async def claims(self, experiment: str) -> bool:
        claimed = select(t.delivery.c.name).where(t.delivery.c.experiment == experiment, ~t.delivery.c.deleted)
        return (await self._conn.execute(claimed.limit(1))).first() is not None

    async def scheduled(self) -> Sequence[tuple[AppliedDelivery, datetime | None]]:
        statement = select(t.delivery).where(~t.delivery.c.deleted, t.delivery.c.train_json != "").order_by(t.delivery.c.name)
        return [(_delivery(row), row["scheduled_at"]) for row in (await self._conn.execute(statement)).mappings()]

    async def looked_at(self, name: str, until: datetime) -> None:
        await self._conn.execute(update(t.delivery).where(t.delivery.c.name == name).values(scheduled_at=until))


def _delivery(row: RowMapping) -> AppliedDelivery:
    return AppliedDelivery(row["name"], row["revision"], row["deleted"], row["experiment"], row["train_json"], row["applied_by"])


class SqlJobs:
    """Implements `ports.Jobs` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection, queue: JobQueue) -> None:
        self._conn = conn
        self._queue = queue
        self.changed = False

    async def enqueue(self, training_id: str, max_attempts: int) -> str:
        self.changed = True
        return str(await self._queue.enqueue(self._conn, KIND, training_id, {}, max_attempts))

    async def convert(self, conversion: Conversion) -> None:
        self.changed = True
        await self._queue.enqueue(self._conn, CONVERSION, conversion.key, dataclasses.asdict(conversion), CONVERSION_ATTEMPTS)

    async def cancel(self, job_id: str) -> bool:
        self.changed = True
        return await self._queue.cancel(self._conn, UUID(job_id)) is State.CANCELLED


class SqlUnitOfWork:
    """Implements `ports.UnitOfWork` on one connection."""

    def __init__(self, conn: AsyncConnection, queue: JobQueue, outbox: Outbox, encode: Encode) -> None:
        self.trainings = SqlTrainings(conn)
        self.uploads = SqlUploads(conn)
        self.deliveries = SqlDeliveries(conn)
        self.jobs = SqlJobs(conn, queue)
        self.emitted = False
        self._conn = conn
        self._outbox = outbox
        self._encode = encode

    async def emit(self, event: Event) -> None:
        await self._outbox.append(self._conn, [self._encode(event)])
        self.emitted = True


class SqlStore:
    """Implements `ports.Store`."""

    def __init__(self, engine: AsyncEngine, queue: JobQueue, outbox: Outbox, encode: Encode) -> None:
        self._engine = engine
        self._queue = queue
        self._outbox = outbox
        self._encode = encode

    def on(self, conn: AsyncConnection) -> SqlUnitOfWork:
        """A unit of work within somebody else's transaction; call `committed` when that has committed."""
        return SqlUnitOfWork(conn, self._queue, self._outbox, self._encode)

    def committed(self) -> None:
        """Wakes the relay after a transaction of `on`."""
        self._outbox.committed()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        async with self._engine.begin() as conn:
            work = self.on(conn)
            yield work
        if work.emitted:
            self._outbox.committed()
        if work.jobs.changed:
            self._queue.notify()
