"""Logged models as MLflow has them. Artifacts belong to a run or to a logged model; a deliverable model says where it was logged, and may
have no sample rows."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_UP = (
    # An owner is a run or a logged model.
    "ALTER TABLE artifact DROP CONSTRAINT artifact_run_id_fkey",
    "ALTER TABLE artifact RENAME COLUMN run_id TO owner",
    "ALTER TABLE upload RENAME COLUMN run_id TO owner",
    "ALTER TABLE model ALTER COLUMN samples DROP NOT NULL",
    "ALTER TABLE model ADD COLUMN logged_model_id text NOT NULL DEFAULT ''",
    "ALTER TABLE model ALTER COLUMN logged_model_id DROP DEFAULT",
    "ALTER TABLE model ADD COLUMN folder text NOT NULL DEFAULT ''",
    "ALTER TABLE model ALTER COLUMN folder DROP DEFAULT",
    """
    CREATE TABLE logged_model (
        model_id text PRIMARY KEY CHECK (model_id ~ '^m-[0-9a-f]{32}$'),
        experiment_id bigint NOT NULL REFERENCES experiment,
        name text NOT NULL,
        model_type text NOT NULL,
        source_run_id text REFERENCES run,
        user_name text NOT NULL,
        status text NOT NULL,
        lifecycle_stage text NOT NULL,
        created_ms bigint NOT NULL,
        updated_ms bigint NOT NULL
    )
    """,
    "CREATE INDEX logged_model_newest ON logged_model (experiment_id, created_ms, model_id)",
    "CREATE INDEX logged_model_of ON logged_model (source_run_id)",
    """
    CREATE TABLE logged_model_param (
        model_id text NOT NULL REFERENCES logged_model,
        key text NOT NULL,
        value text NOT NULL,
        PRIMARY KEY (model_id, key)
    )
    """,
    """
    CREATE TABLE logged_model_tag (
        model_id text NOT NULL REFERENCES logged_model,
        key text NOT NULL,
        value text NOT NULL,
        PRIMARY KEY (model_id, key)
    )
    """,
)

_DOWN = (
    "DROP TABLE logged_model_tag",
    "DROP TABLE logged_model_param",
    "DROP TABLE logged_model",
    "ALTER TABLE model DROP COLUMN folder",
    "ALTER TABLE model DROP COLUMN logged_model_id",
    "DELETE FROM model WHERE samples IS NULL",
    "ALTER TABLE model ALTER COLUMN samples SET NOT NULL",
    "DELETE FROM upload WHERE owner LIKE 'm-%'",
    "ALTER TABLE upload RENAME COLUMN owner TO run_id",
    "DELETE FROM artifact WHERE owner LIKE 'm-%'",
    "ALTER TABLE artifact RENAME COLUMN owner TO run_id",
    "ALTER TABLE artifact ADD FOREIGN KEY (run_id) REFERENCES run",
)


def upgrade() -> None:
    for statement in _UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in _DOWN:
        op.execute(statement)
