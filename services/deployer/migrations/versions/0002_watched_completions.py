"""Endpoints know which completed rollout is being watched."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE deployer.endpoint ADD COLUMN watching uuid")


def downgrade() -> None:
    op.execute("ALTER TABLE deployer.endpoint DROP COLUMN watching")
