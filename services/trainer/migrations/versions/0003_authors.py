"""Who applied a delivery, and what started a training for its author."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ADDED = (("delivery", "applied_by"), ("training", "started_by"))


def upgrade() -> None:
    for table, column in _ADDED:
        op.execute(f"ALTER TABLE {table} ADD COLUMN {column} text NOT NULL DEFAULT ''")


def downgrade() -> None:
    for table, column in _ADDED:
        op.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
