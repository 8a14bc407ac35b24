"""What MLflow's API keeps of experiments and runs beyond what Headrace's own API does: tags of experiments, times of deletion, the data
sets and models that a run names as inputs and outputs, and metrics that belong to a model."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TABLES = (
    "ALTER TABLE experiment ADD COLUMN last_update_ms bigint",
    "UPDATE experiment SET last_update_ms = created_ms",
    "ALTER TABLE experiment ALTER COLUMN last_update_ms SET NOT NULL",
    """
    CREATE TABLE experiment_tag (
        experiment_id bigint NOT NULL REFERENCES experiment,
        key text NOT NULL,
        value text NOT NULL,
        PRIMARY KEY (experiment_id, key)
    )
    """,
    # 0: not deleted.
    "ALTER TABLE run ADD COLUMN deleted_ms bigint NOT NULL DEFAULT 0",
    "ALTER TABLE run ALTER COLUMN deleted_ms DROP DEFAULT",
    # Data sets as MLflow's clients describe them. Their source is a text that nobody opens; Headrace's own data sets are in run_input.
    """
    CREATE TABLE described_dataset (
        experiment_id bigint NOT NULL REFERENCES experiment,
        name text NOT NULL,
        digest text NOT NULL,
        source_type text NOT NULL,
        source text NOT NULL,
        schema text NOT NULL,
        profile text NOT NULL,
        PRIMARY KEY (experiment_id, name, digest)
    )
    """,
    """
    CREATE TABLE run_dataset (
        run_id text NOT NULL REFERENCES run,
        experiment_id bigint NOT NULL,
        name text NOT NULL,
        digest text NOT NULL,
        position bigint GENERATED ALWAYS AS IDENTITY,
        tags jsonb NOT NULL,
        PRIMARY KEY (run_id, name, digest),
        FOREIGN KEY (experiment_id, name, digest) REFERENCES described_dataset (experiment_id, name, digest)
    )
    """,
    "CREATE INDEX run_dataset_used ON run_dataset (experiment_id, name, digest)",
    # `direction` is input or output; an input has step 0.
    """
    CREATE TABLE run_model (
        run_id text NOT NULL REFERENCES run,
        direction text NOT NULL CHECK (direction IN ('input', 'output')),
        model_id text NOT NULL,
        step bigint NOT NULL,
        position bigint GENERATED ALWAYS AS IDENTITY,
        PRIMARY KEY (run_id, direction, model_id, step)
    )
    """,
    "CREATE INDEX run_model_of ON run_model (model_id)",
    # Points of a run's metrics that belong to a logged model, and to a data set when one is named.
    """
    CREATE TABLE model_metric (
        model_id text NOT NULL,
        key text NOT NULL,
        step bigint NOT NULL,
        timestamp_ms bigint NOT NULL,
        value double precision NOT NULL,
        run_id text NOT NULL,
        dataset_name text NOT NULL,
        dataset_digest text NOT NULL,
        PRIMARY KEY (model_id, key, step, timestamp_ms, value, run_id, dataset_name, dataset_digest)
    )
    """,
)


def upgrade() -> None:
    for statement in _TABLES:
        op.execute(statement)


def downgrade() -> None:
    for table in ("model_metric", "run_model", "run_dataset", "described_dataset", "experiment_tag"):
        op.execute(f"DROP TABLE {table}")
    op.execute("ALTER TABLE run DROP COLUMN deleted_ms")
    op.execute("ALTER TABLE experiment DROP COLUMN last_update_ms")
