"""The trainer's first tables, and those of eventing and jobs."""

from __future__ import annotations

from alembic import op
from eventing import schema as eventing_schema
from jobs import schema as jobs_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "trainer"

_TABLES = (
    """
    CREATE TABLE training (
        training_id text PRIMARY KEY,
        status text NOT NULL,
        delivery text NOT NULL,
        experiment text NOT NULL,
        source jsonb NOT NULL,
        command jsonb NOT NULL,
        environment jsonb NOT NULL,
        resources jsonb NOT NULL,
        seed bigint NOT NULL,
        run_name text NOT NULL,
        submitted_by text NOT NULL,
        max_attempts integer NOT NULL,
        job_id text NOT NULL,
        run_id text NOT NULL,
        attempt integer NOT NULL,
        failures integer NOT NULL,
        reason text NOT NULL,
        cancelled_by text NOT NULL,
        created_at timestamptz NOT NULL,
        finished_at timestamptz,
        event_sequence bigint NOT NULL,
        requested_by text,
        request_id text,
        CONSTRAINT training_request UNIQUE (requested_by, request_id)
    )
    """,
    "CREATE INDEX training_newest ON training (created_at, training_id)",
    "CREATE INDEX training_of_delivery ON training (delivery, created_at, training_id)",
    """
    CREATE TABLE source_upload (
        upload_id text PRIMARY KEY,
        uploaded_by text NOT NULL,
        key text NOT NULL,
        size_bytes bigint NOT NULL,
        sha256 text NOT NULL,
        verified boolean NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT source_upload_content UNIQUE (uploaded_by, sha256)
    )
    """,
    """
    CREATE TABLE delivery (
        name text PRIMARY KEY,
        revision bigint NOT NULL,
        deleted boolean NOT NULL,
        experiment text NOT NULL,
        train_json text NOT NULL
    )
    """,
)


def upgrade() -> None:
    for statement in _TABLES:
        op.execute(statement)
    eventing_schema.create(op, SCHEMA)
    jobs_schema.create(op, SCHEMA)


def downgrade() -> None:
    jobs_schema.drop(op, SCHEMA)
    eventing_schema.drop(op, SCHEMA)
    for table in ("delivery", "source_upload", "training"):
        op.execute(f"DROP TABLE {table}")
