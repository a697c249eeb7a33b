"""Attempts that a worker handed on because it was told to end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_handed_on"
down_revision = "0005_http"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("handed_on", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("jobs", "handed_on")
