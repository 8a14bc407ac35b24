"""Until when the cron triggers of a delivery have been looked at."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE delivery ADD COLUMN scheduled_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE delivery DROP COLUMN scheduled_at")
