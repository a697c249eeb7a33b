"""What the HTTP surface keeps: events, webhooks, idempotency keys, resumable uploads, what jobs have in common."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_http"
down_revision = "0004_keys"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("fingerprint", sa.String(64)))
    op.create_index("ix_jobs_fingerprint", "jobs", ["fingerprint"])
    op.create_index("ix_artifacts_key", "artifacts", ["key"])
    events = op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    _begin_streams(events)
    op.create_table(
        "webhooks",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("message_id", sa.String(40), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("secret", sa.String(128), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True)),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.String(300)),
    )
    op.create_index("ix_webhooks_due_at", "webhooks", ["due_at"])
    op.create_table(
        "idempotency_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64)),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("place", sa.String(32), nullable=False, unique=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("key", sa.String(255)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_uploads_touched_at", "uploads", ["touched_at"])
    op.create_table(
        "upload_pieces",
        sa.Column("upload_id", sa.String(32), sa.ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
    )


def downgrade() -> None:
    for table in ("upload_pieces", "uploads", "idempotency_keys", "webhooks", "job_events"):
        op.drop_table(table)
    op.drop_index("ix_artifacts_key", "artifacts")
    op.drop_index("ix_jobs_fingerprint", "jobs")
    op.drop_column("jobs", "fingerprint")


def _begin_streams(events: sa.Table) -> None:
    """Jobs that are there already get one event: the state they are in."""
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String),
        sa.column("state", sa.String),
        sa.column("stage", sa.String),
        sa.column("attempt", sa.Integer),
        sa.column("error", sa.JSON),
        sa.column("created_at", sa.DateTime(timezone=True)),
        sa.column("started_at", sa.DateTime(timezone=True)),
        sa.column("finished_at", sa.DateTime(timezone=True)),
    )
    rows = [
        {
            "job_id": job.id,
            "number": 1,
            "at": job.finished_at or job.started_at or job.created_at,
            "kind": "state",
            "data": {"state": job.state, "stage": job.stage, "attempt": job.attempt, "error": job.error},
        }
        for job in op.get_bind().execute(sa.select(jobs))
    ]
    if rows:
        op.bulk_insert(events, rows)
