"""The deployer's first tables, and those of eventing and jobs."""

from __future__ import annotations

from alembic import op
from eventing import schema as eventing_schema
from jobs import schema as jobs_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "deployer"

_TABLES = (
    """
    CREATE TABLE leader (
        id smallint PRIMARY KEY CHECK (id = 1),
        epoch bigint NOT NULL,
        holder text NOT NULL,
        since timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "INSERT INTO leader (id, epoch, holder) VALUES (1, 0, '')",
    """
    CREATE TABLE delivery (
        name text NOT NULL,
        revision bigint NOT NULL,
        endpoint text NOT NULL,
        section jsonb,
        deleted boolean NOT NULL,
        heard_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (name, revision)
    )
    """,
    """
    CREATE TABLE endpoint (
        name text PRIMARY KEY,
        delivery text NOT NULL,
        revision bigint NOT NULL DEFAULT 0,
        serving text,
        previous text,
        live uuid,
        waiting uuid,
        generation bigint NOT NULL DEFAULT 0,
        acknowledged bigint NOT NULL DEFAULT 0,
        watched boolean NOT NULL DEFAULT false,
        deploys_sequence bigint NOT NULL DEFAULT 0,
        routes_sequence bigint NOT NULL DEFAULT 0,
        publication bigint NOT NULL DEFAULT 0,
        published_at timestamptz,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE TABLE route (
        endpoint text NOT NULL REFERENCES endpoint,
        revision bigint NOT NULL,
        body jsonb NOT NULL,
        made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (endpoint, revision)
    )
    """,
    """
    CREATE TABLE arm (
        endpoint text NOT NULL REFERENCES endpoint,
        id text NOT NULL,
        version jsonb NOT NULL,
        runtime text NOT NULL,
        runtime_model text NOT NULL DEFAULT '',
        last_revision bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (endpoint, id)
    )
    """,
    """
    CREATE TABLE rollout (
        id uuid PRIMARY KEY,
        endpoint text NOT NULL REFERENCES endpoint,
        state text NOT NULL,
        body jsonb NOT NULL,
        baseline_version bigint NOT NULL DEFAULT 0,
        traceparent text NOT NULL,
        decisions bigint NOT NULL DEFAULT 0,
        deadline_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz
    )
    """,
    """
    CREATE UNIQUE INDEX rollout_one_live ON rollout (endpoint)
        WHERE state IN ('preparing', 'warming', 'shadowing', 'stepping', 'completing', 'aborting', 'reverting')
    """,
    "CREATE UNIQUE INDEX rollout_one_waiting ON rollout (endpoint) WHERE state = 'waiting'",
    "CREATE INDEX rollout_newest ON rollout (endpoint, id)",
    "CREATE INDEX rollout_deadline ON rollout (deadline_at) WHERE deadline_at IS NOT NULL",
    """
    CREATE TABLE decision (
        rollout_id uuid NOT NULL REFERENCES rollout,
        sequence bigint NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        from_state text NOT NULL,
        to_state text NOT NULL,
        reason text NOT NULL,
        evidence jsonb NOT NULL,
        PRIMARY KEY (rollout_id, sequence)
    )
    """,
    """
    CREATE TABLE runtime_model (
        name text PRIMARY KEY,
        runtime text NOT NULL,
        endpoint text NOT NULL,
        arm text NOT NULL,
        wanted boolean NOT NULL,
        state text NOT NULL CHECK (state IN ('intended', 'loaded', 'gone')),
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        FOREIGN KEY (endpoint, arm) REFERENCES arm
    )
    """,
    "CREATE INDEX runtime_model_there ON runtime_model (runtime) WHERE state <> 'gone'",
)


def upgrade() -> None:
    for statement in _TABLES:
        op.execute(statement)
    eventing_schema.create(op, SCHEMA)
    jobs_schema.create(op, SCHEMA)
