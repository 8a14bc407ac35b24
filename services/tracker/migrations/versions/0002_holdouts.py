"""Versions of data sets that are holdouts."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE dataset_version ADD COLUMN holdout boolean NOT NULL DEFAULT false")
    op.execute("ALTER TABLE dataset_version ALTER COLUMN holdout DROP DEFAULT")
    op.execute("CREATE INDEX dataset_version_holdout ON dataset_version (sha256) WHERE holdout")


def downgrade() -> None:
    op.execute("ALTER TABLE dataset_version DROP COLUMN holdout")
