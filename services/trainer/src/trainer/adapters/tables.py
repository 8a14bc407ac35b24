"""The trainer's tables as SQLAlchemy Core sees them. The migrations make them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Index, Integer, MetaData, Table, Text, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB

SCHEMA = "trainer"
METADATA = MetaData(schema=SCHEMA)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


training = Table(
    "training",
    METADATA,
    Column("training_id", Text, primary_key=True),
    _text("status"),
    _text("delivery"),
    _text("experiment"),
    Column("source", JSONB, nullable=False),
    Column("command", JSONB, nullable=False),
    Column("environment", JSONB, nullable=False),
    Column("resources", JSONB, nullable=False),
    Column("seed", BigInteger, nullable=False),
    _text("run_name"),
    _text("submitted_by"),
    Column("max_attempts", Integer, nullable=False),
    _text("job_id"),
    _text("run_id"),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    _text("reason"),
    _text("cancelled_by"),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("finished_at", DateTime(timezone=True)),
    Column("event_sequence", BigInteger, nullable=False),
    _text("started_by"),
    Column("requested_by", Text),
    Column("request_id", Text),
    UniqueConstraint("requested_by", "request_id", name="training_request"),
)
Index("training_newest", training.c.created_at, training.c.training_id)
Index("training_of_delivery", training.c.delivery, training.c.created_at, training.c.training_id)

source_upload = Table(
    "source_upload",
    METADATA,
    Column("upload_id", Text, primary_key=True),
    _text("uploaded_by"),
    _text("key"),
    Column("size_bytes", BigInteger, nullable=False),
    _text("sha256"),
    Column("verified", Boolean, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    UniqueConstraint("uploaded_by", "sha256", name="source_upload_content"),
)

delivery = Table(
    "delivery",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    _text("experiment"),
    _text("train_json"),
    _text("applied_by"),
    Column("scheduled_at", DateTime(timezone=True)),
)
