"""The evaluator's tables as SQLAlchemy Core sees them. The migrations make them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Index, MetaData, Table, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB

SCHEMA = "evaluator"
METADATA = MetaData(schema=SCHEMA)

model = Table(
    "model",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("last_sequence", BigInteger, nullable=False, server_default=text("0"), comment="of its events in headrace.evals"),
    Column("champion_version", BigInteger, comment="NULL: it has none"),
    Column("champion_sha256", Text),
    Column("champion_size_bytes", BigInteger),
    Column("champion_key", Text),
)

evaluation = Table(
    "evaluation",
    METADATA,
    Column("evaluation_id", Text, primary_key=True, comment="UUIDv7, so that they sort by age"),
    Column("journey_id", Text, nullable=False),
    Column("delivery", Text, nullable=False),
    Column("delivery_revision", BigInteger, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("candidate_sha256", Text, nullable=False, comment="of the candidate's file; empty when the run was skipped"),
    Column("replaces", Text, nullable=False, comment="the evaluation that this one takes the place of; empty: none"),
    Column("champion_at_least", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("candidate", JSONB),
    Column("policy", JSONB),
    Column("judgement", JSONB),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("finished_at", DateTime(timezone=True)),
    # A model of a run is judged once, and once more for every evaluation that went out of date.
    UniqueConstraint("run_id", "candidate_sha256", "replaces", name="evaluation_once"),
)
Index("evaluation_of_delivery", evaluation.c.delivery, evaluation.c.evaluation_id)
Index("evaluation_of_run", evaluation.c.run_id, evaluation.c.evaluation_id)
