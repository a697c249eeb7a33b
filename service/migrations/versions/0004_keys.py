"""API keys, and the owners they belong to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_keys"
down_revision = "0003_devices"
branch_labels = None
depends_on = None


def upgrade() -> None:
    owners = op.create_table(
        "owners",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("max_jobs_queued", sa.Integer),
        sa.Column("max_jobs_running", sa.Integer),
        sa.Column("max_stored_bytes", sa.BigInteger),
        sa.Column("max_upload_bytes", sa.BigInteger),
    )
    op.bulk_insert(owners, [{"name": ""}])  # who comes without a key while there are none
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), sa.ForeignKey("owners.name"), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
    )


def downgrade() -> None:
    op.drop_table("api_keys")
    op.drop_table("owners")
