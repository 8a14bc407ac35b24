"""Newest snapshots are published again: with a sequence of their own, and times that say when it is their turn."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TABLES = ("delivery", "api_key")


def upgrade() -> None:
    for table in _TABLES:
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN sequence bigint, ADD COLUMN changed_at timestamptz, ADD COLUMN published_at timestamptz"
        )
        # Until now a revision was one event.
        op.execute(f"UPDATE {table} SET sequence = revision, changed_at = now(), published_at = now()")  # noqa: S608 - our own names
        for column in ("sequence", "changed_at", "published_at"):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL")


def downgrade() -> None:
    for table in _TABLES:
        op.execute(f"ALTER TABLE {table} DROP COLUMN sequence, DROP COLUMN changed_at, DROP COLUMN published_at")
