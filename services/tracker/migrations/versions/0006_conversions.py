"""Models that wait to be converted to what can be delivered."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE conversion (
            run_id text NOT NULL REFERENCES run,
            owner text NOT NULL,
            folder text NOT NULL,
            position bigint GENERATED ALWAYS AS IDENTITY,
            name text NOT NULL,
            flavors jsonb NOT NULL,
            settled boolean NOT NULL,
            PRIMARY KEY (run_id, owner, folder)
        )
        """
    )


def downgrade() -> None:
    op.execute("DROP TABLE conversion")
