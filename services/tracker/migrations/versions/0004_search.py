"""What makes searches of many runs fast: the tables of params, tags and last metrics know experiment and start of their runs and are
indexed by value in the order in which MLflow answers; the history of metrics is partitioned; what an ended run has logged is kept whole."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

PARTITIONS = 16

_LOGGED = ("param", "tag", "metric_latest")

_KNOWN = tuple(
    statement.format(table=table)
    for table in _LOGGED
    for statement in (
        "ALTER TABLE {table} ADD COLUMN experiment_id bigint, ADD COLUMN started_ms bigint",
        """
        UPDATE {table} SET experiment_id = run.experiment_id, started_ms = run.started_ms
        FROM run WHERE run.run_id = {table}.run_id
        """,
        "ALTER TABLE {table} ALTER COLUMN experiment_id SET NOT NULL, ALTER COLUMN started_ms SET NOT NULL",
    )
)

_INDEXES = (
    "CREATE INDEX run_recent ON run (experiment_id, started_ms DESC, run_id)",
    # A row of an index holds 2,700 bytes at most, so of a long text its beginning stands there. Texts are ordered by their characters'
    # numbers, whatever the language of the database.
    'CREATE INDEX param_by_value ON param (experiment_id, key, (left(value, 100) COLLATE "C"), started_ms DESC, run_id)',
    'CREATE INDEX tag_by_value ON tag (experiment_id, key, (left(value, 100) COLLATE "C"), started_ms DESC, run_id)',
    "CREATE INDEX metric_by_value ON metric_latest (experiment_id, key, value, started_ms DESC, run_id)",
    # Keys have values of their own: taken for independent, a filter would seem to match far fewer runs than it does.
    'CREATE STATISTICS param_values (mcv) ON experiment_id, key, (left(value, 100) COLLATE "C") FROM param',
    'CREATE STATISTICS tag_values (mcv) ON experiment_id, key, (left(value, 100) COLLATE "C") FROM tag',
    "CREATE STATISTICS metric_keys (mcv) ON experiment_id, key FROM metric_latest",
)

_HISTORY = (
    "ALTER TABLE metric_point RENAME TO metric_point_whole",
    "ALTER INDEX metric_point_pkey RENAME TO metric_point_whole_pkey",
    """
    CREATE TABLE metric_point (
        run_id text NOT NULL,
        key text NOT NULL,
        step bigint NOT NULL,
        timestamp_ms bigint NOT NULL,
        value double precision NOT NULL,
        PRIMARY KEY (run_id, key, step, timestamp_ms, value)
    ) PARTITION BY HASH (run_id)
    """,
    *(
        f"CREATE TABLE metric_point_{part} PARTITION OF metric_point FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {part})"
        for part in range(PARTITIONS)
    ),
    "INSERT INTO metric_point SELECT * FROM metric_point_whole",
    "DROP TABLE metric_point_whole",
)

_WHOLE = """
    CREATE TABLE run_logged (
        run_id text PRIMARY KEY REFERENCES run,
        metrics text NOT NULL,
        params text NOT NULL,
        tags text NOT NULL
    )
"""


def upgrade() -> None:
    for statement in (*_KNOWN, *_INDEXES, *_HISTORY, _WHOLE):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE run_logged")
    op.execute("ALTER TABLE metric_point RENAME TO metric_point_parts")
    op.execute("ALTER INDEX metric_point_pkey RENAME TO metric_point_parts_pkey")
    op.execute("CREATE TABLE metric_point (LIKE metric_point_parts INCLUDING ALL)")
    op.execute("INSERT INTO metric_point SELECT * FROM metric_point_parts")
    op.execute("DROP TABLE metric_point_parts")
    for statistics in ("metric_keys", "tag_values", "param_values"):
        op.execute(f"DROP STATISTICS {statistics}")
    op.execute("DROP INDEX run_recent")
    for table in _LOGGED:
        op.execute(f"ALTER TABLE {table} DROP COLUMN started_ms, DROP COLUMN experiment_id")
