"""The evaluator's first tables, with those of eventing and jobs."""

from __future__ import annotations

from alembic import op
from eventing import schema as eventing_schema
from jobs import schema as jobs_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "evaluator"

_TABLES = (
    """
    CREATE TABLE model (
        name text PRIMARY KEY,
        last_sequence bigint NOT NULL DEFAULT 0,
        champion_version bigint,
        champion_sha256 text,
        champion_size_bytes bigint,
        champion_key text
    )
    """,
    """
    CREATE TABLE evaluation (
        evaluation_id text PRIMARY KEY,
        journey_id text NOT NULL,
        delivery text NOT NULL,
        delivery_revision bigint NOT NULL,
        run_id text NOT NULL,
        model text NOT NULL,
        candidate_sha256 text NOT NULL,
        replaces text NOT NULL,
        champion_at_least bigint NOT NULL,
        status text NOT NULL,
        reason text NOT NULL,
        candidate jsonb,
        policy jsonb,
        judgement jsonb,
        created_at timestamptz NOT NULL,
        finished_at timestamptz,
        CONSTRAINT evaluation_once UNIQUE (run_id, candidate_sha256, replaces)
    )
    """,
    "CREATE INDEX evaluation_of_delivery ON evaluation (delivery, evaluation_id)",
    "CREATE INDEX evaluation_of_run ON evaluation (run_id, evaluation_id)",
)


def upgrade() -> None:
    for statement in _TABLES:
        op.execute(statement)
    eventing_schema.create(op, SCHEMA)
    jobs_schema.create(op, SCHEMA)


def downgrade() -> None:
    jobs_schema.drop(op, SCHEMA)
    eventing_schema.drop(op, SCHEMA)
    op.execute("DROP TABLE evaluation")
    op.execute("DROP TABLE model")
