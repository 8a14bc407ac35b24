"""The tables of eventing in a service's schema: outbox, outbox_cluster, consumer_offset, consumer_key, parked_event.

A service makes them in its first Alembic revision with `create(op, schema)`; the code reaches them through `tables(schema)`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable


class Tables(NamedTuple):
    """The tables of one schema."""

    outbox: Table
    outbox_cluster: Table
    consumer_offset: Table
    consumer_key: Table
    parked_event: Table

    @property
    def schema(self) -> str:
        return str(self.outbox.schema)


@lru_cache
def tables(schema: str) -> Tables:
    """The tables of eventing in `schema`, in a MetaData of their own. Touches no database."""
    if not schema.isidentifier() or not schema.islower():
        raise ValueError(f"schema {schema!r} is not a plain lower-case name")  # it stands in SQL text, and in a channel's name
    metadata = MetaData(schema=schema)
    outbox = Table(
        "outbox",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("shard", SmallInteger, nullable=False, server_default=text("0")),
        Column("topic", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("sequence", BigInteger, nullable=False, comment="the key's own count in its topic, from 1; 0: a notice, not counted"),
        Column("event_id", UUID(as_uuid=True), nullable=False),
        Column("type", Text, nullable=False),
        Column("subject", Text, nullable=False),
        Column("traceparent", Text, nullable=False, comment="the trace context in which the event was made"),
        Column("must_understand", Boolean, nullable=False),
        Column("time", DateTime(timezone=True), nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
        Column("sent_at", DateTime(timezone=True), comment="when the broker acknowledged it; NULL: waits for the relay"),
    )
    # What the relay reads. A row leaves this index when it is marked, so the index stays as small as the backlog.
    Index("outbox_unsent", outbox.c.shard, outbox.c.id, postgresql_where=outbox.c.sent_at.is_(None))
    Index("outbox_sequence", outbox.c.topic, outbox.c.key, outbox.c.sequence, unique=True, postgresql_where=outbox.c.sequence > 0)
    outbox_cluster = Table(
        "outbox_cluster",
        metadata,
        Column("shard", SmallInteger, primary_key=True, autoincrement=False),
        Column("cluster_id", Text, nullable=False, comment="the Kafka cluster that has the sent events"),
    )
    consumer_offset = Table(
        "consumer_offset",
        metadata,
        Column("consumer", Text, primary_key=True),
        Column("topic", Text, primary_key=True),
        Column("partition", Integer, primary_key=True),
        Column("next_offset", BigInteger, nullable=False),
        Column("cluster_id", Text, nullable=False, comment="the Kafka cluster that the offset counts in"),
        Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    )
    consumer_key = Table(
        "consumer_key",
        metadata,
        Column("consumer", Text, primary_key=True),
        Column("topic", Text, primary_key=True),
        Column("key", Text, primary_key=True),
        Column("sequence", BigInteger, nullable=False, comment="the last event applied, skipped or parked"),
        Column("parked", Boolean, nullable=False, comment="events of the key wait in parked_event, later ones queue behind them"),
    )
    parked_event = Table(
        "parked_event",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("consumer", Text, nullable=False),
        Column("topic", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("sequence", BigInteger, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("offset", BigInteger, nullable=False),
        Column("cluster_id", Text, nullable=False),
        Column("event_id", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("headers", LargeBinary, nullable=False, comment="all headers of the record, as eventing.records packs them"),
        Column("payload", LargeBinary, nullable=False),
        Column("reason", Text, nullable=False),
        Column("attempts", Integer, nullable=False, server_default=text("1")),
        Column("parked_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
        UniqueConstraint("consumer", "topic", "key", "sequence", name="parked_event_once"),
    )
    return Tables(outbox, outbox_cluster, consumer_offset, consumer_key, parked_event)


def create(op: Any, schema: str) -> None:
    """Creates the tables in `schema`, which must exist. `op` is `alembic.op` (or anything with `execute`). Not repeatable."""
    made = tables(schema)
    for table in made:
        op.execute(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            op.execute(CreateIndex(index))
    # Rows of a queue die young: by default autovacuum waits until a fifth of the table is dead.
    op.execute(
        text(
            f"ALTER TABLE {schema}.outbox SET (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000,"
            " autovacuum_vacuum_cost_delay = 0)"
        )
    )
    # These rows are updated in place for ever: room on the page keeps the updates off the indexes.
    op.execute(text(f"ALTER TABLE {schema}.consumer_offset SET (fillfactor = 30, autovacuum_vacuum_threshold = 1000)"))
    op.execute(text(f"ALTER TABLE {schema}.consumer_key SET (fillfactor = 70)"))


def drop(op: Any, schema: str) -> None:
    """Drops the tables: the downgrade of `create`."""
    for table in reversed(tables(schema)):
        op.execute(DropTable(table))
