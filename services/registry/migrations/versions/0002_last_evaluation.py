"""A version remembers its newest evaluation, and whether that took away what it stands on."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE model_version ADD COLUMN last_evaluation text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE model_version ADD COLUMN judged_unfit boolean NOT NULL DEFAULT false")


def downgrade() -> None:
    op.execute("ALTER TABLE model_version DROP COLUMN last_evaluation, DROP COLUMN judged_unfit")
