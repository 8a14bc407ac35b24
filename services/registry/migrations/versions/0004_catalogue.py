"""What clients say of models and versions, deletion that keeps what was, and versions that no evaluation has looked at yet."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KEPT = ("model_id", "number", "created_at")
_FILE = ("blob_sha256", "blob_size", "blob_key", "format", "model_name", "deliverable", "run_id", "author", "traceparent")


def _row(which: str, columns: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"{which}.{column}" for column in columns) + ")"


_UP = (
    """
    ALTER TABLE model
        ADD COLUMN description text NOT NULL DEFAULT '',
        ADD COLUMN tags jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN updated_at timestamptz,
        ADD COLUMN deleted boolean NOT NULL DEFAULT false,
        ADD COLUMN previous bigint NOT NULL DEFAULT 0
    """,
    "UPDATE model SET updated_at = created_at",
    # The champion before the one there is, as the audit log knows it.
    """
    UPDATE model SET previous = coalesce((
        SELECT (audit.before->>'version')::bigint FROM audit
        WHERE audit.action = 'alias.set' AND audit.target = 'model/' || model.name || '@champion' ORDER BY audit.id DESC LIMIT 1), 0)
    """,
    "ALTER TABLE model ALTER COLUMN updated_at SET NOT NULL",
    # A name is free again when its model was deleted.
    "ALTER TABLE model DROP CONSTRAINT model_name",
    "CREATE UNIQUE INDEX model_name ON model (name) WHERE NOT deleted",
    """
    ALTER TABLE model_version
        ADD COLUMN source text NOT NULL DEFAULT '',
        ADD COLUMN path text NOT NULL DEFAULT '',
        ADD COLUMN logged_model text NOT NULL DEFAULT '',
        ADD COLUMN storage text NOT NULL DEFAULT '',
        ADD COLUMN run_link text NOT NULL DEFAULT '',
        ADD COLUMN registered_by text NOT NULL DEFAULT '',
        ADD COLUMN description text NOT NULL DEFAULT '',
        ADD COLUMN tags jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN updated_at timestamptz,
        ADD COLUMN deleted boolean NOT NULL DEFAULT false
    """,
    """
    UPDATE model_version SET updated_at = created_at, path = model_name,
        source = 'runs:/' || run_id || '/' || model_name, storage = 'runs:/' || run_id || '/' || model_name
    """,
    "ALTER TABLE model_version ALTER COLUMN updated_at SET NOT NULL",
    # A version that was only registered has no file yet.
    "ALTER TABLE model_version DROP CONSTRAINT model_version_once",
    "CREATE UNIQUE INDEX model_version_once ON model_version (model_id, run_id, blob_sha256) WHERE blob_sha256 <> ''",
    "CREATE INDEX model_version_run ON model_version (run_id) WHERE run_id <> ''",
    "CREATE INDEX model_version_logged ON model_version (logged_model) WHERE logged_model <> ''",
    "DROP TRIGGER what_it_is ON model_version",
    f"""
    CREATE TRIGGER what_it_is BEFORE UPDATE ON model_version FOR EACH ROW
    WHEN ({_row("OLD", _KEPT)} IS DISTINCT FROM {_row("NEW", _KEPT)}
          OR OLD.blob_sha256 <> '' AND {_row("OLD", _FILE)} IS DISTINCT FROM {_row("NEW", _FILE)})
    EXECUTE FUNCTION refuse_change()
    """,
    "CREATE TRIGGER stays_deleted BEFORE UPDATE ON model_version FOR EACH ROW WHEN (OLD.deleted AND NOT NEW.deleted) "
    "EXECUTE FUNCTION refuse_change()",
)


def upgrade() -> None:
    for statement in _UP:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER stays_deleted ON model_version")
    op.execute("DROP TRIGGER what_it_is ON model_version")
    op.execute("DROP INDEX model_version_once, model_version_run, model_version_logged, model_name")
    op.execute(
        "ALTER TABLE model_version DROP COLUMN source, DROP COLUMN path, DROP COLUMN logged_model, DROP COLUMN storage, "
        "DROP COLUMN run_link, DROP COLUMN registered_by, DROP COLUMN description, DROP COLUMN tags, DROP COLUMN updated_at, "
        "DROP COLUMN deleted, ADD CONSTRAINT model_version_once UNIQUE (model_id, run_id, blob_sha256)"
    )
    op.execute(
        "ALTER TABLE model DROP COLUMN description, DROP COLUMN tags, DROP COLUMN updated_at, DROP COLUMN deleted, DROP COLUMN previous, "
        "ADD CONSTRAINT model_name UNIQUE (name)"
    )
    old = ("model_id", "number", "run_id", "blob_sha256", "blob_size", "blob_key", "format", "model_name", "deliverable", "author",
           "traceparent", "created_at")  # fmt: skip
    op.execute(
        f"CREATE TRIGGER what_it_is BEFORE UPDATE ON model_version FOR EACH ROW "
        f"WHEN ({_row('OLD', old)} IS DISTINCT FROM {_row('NEW', old)}) EXECUTE FUNCTION refuse_change()"
    )
