"""What brought a job, and tallies of what has happened, which outlive the jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_observability"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("origin", sa.JSON))
    op.create_table(
        "tallies",
        sa.Column("what", sa.String(16), primary_key=True),
        sa.Column("method", sa.String(32), primary_key=True),
        sa.Column("state", sa.String(16), primary_key=True),
        sa.Column("bucket", sa.String(16), primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("tallies")
    op.drop_column("jobs", "origin")
