"""Whose a job is, and the device it runs on; what each worker runs on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_devices"
down_revision = "0002_observability"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("owner", sa.String(64)))
    op.add_column("jobs", sa.Column("device", sa.String(8)))
    op.create_index("ix_jobs_state_owner_created_at", "jobs", ["state", "owner", "created_at"])
    # Workers sign in again within seconds.
    op.drop_table("workers")
    op.create_table(
        "workers",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.String(8), nullable=False),
        sa.Column("detail", sa.String(255), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.create_table(
        "workers",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.drop_index("ix_jobs_state_owner_created_at", "jobs")
    op.drop_column("jobs", "device")
    op.drop_column("jobs", "owner")
