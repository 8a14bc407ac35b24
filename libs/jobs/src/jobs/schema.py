"""The table of jobs in a service's schema: `create(op, schema)` makes it in an Alembic revision, `table(schema)` describes it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable


@lru_cache
def table(schema: str) -> Table:
    """The job table in `schema`, in a MetaData of its own. Touches no database. Raises ValueError for what is no plain name."""
    if not schema.isidentifier() or not schema.islower():
        raise ValueError(f"schema {schema!r} is not a plain lower-case name")  # it stands in SQL text
    job = Table(
        "job",
        MetaData(schema=schema),
        Column("id", UUID(as_uuid=True), primary_key=True),
        Column("kind", Text, nullable=False),
        Column("key", Text, nullable=False, comment="what the work is about; a second job of the same kind and key is the first"),
        Column("payload", JSONB, nullable=False),
        Column("state", Text, nullable=False, server_default=text("'queued'")),
        Column("attempt", Integer, nullable=False, server_default=text("0"), comment="attempts begun, handed back ones not counted"),
        Column("max_attempts", Integer, nullable=False),
        Column("run_after", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
        Column("fencing_token", BigInteger, nullable=False, server_default=text("0"), comment="grows with every claim"),
        Column("worker", Text, comment="who claimed it last"),
        Column("lease_until", DateTime(timezone=True), comment="by this clock; set while it runs"),
        Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
        Column("cause", Text, comment="why the last attempt failed, or why it ended without success"),
        Column("traceparent", Text, nullable=False, server_default=text("''"), comment="the trace context in which it was enqueued"),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
        Column("started_at", DateTime(timezone=True), comment="of the last attempt"),
        Column("ended_at", DateTime(timezone=True)),
        UniqueConstraint("kind", "key", name="job_kind_key"),
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="job_state"),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="job_lease"),
        CheckConstraint("(state IN ('succeeded', 'failed', 'cancelled')) = (ended_at IS NOT NULL)", name="job_ended"),
        CheckConstraint("attempt <= max_attempts AND max_attempts > 0", name="job_attempts"),
    )
    # Both stay as small as the work at hand: what has ended leaves them.
    Index("job_due", job.c.kind, job.c.run_after, postgresql_where=job.c.state == text("'queued'"))
    Index("job_leased", job.c.lease_until, postgresql_where=job.c.state == text("'running'"))
    return job


def create(op: Any, schema: str) -> None:
    """Makes the table in `schema`, which must exist. `op` is Alembic's, or anything with its `execute`."""
    job = table(schema)
    op.execute(CreateTable(job))
    for index in sorted(job.indexes, key=lambda one: str(one.name)):
        op.execute(CreateIndex(index))


def drop(op: Any, schema: str) -> None:
    """Drops the table: the inverse of `create`."""
    op.execute(DropTable(table(schema)))
