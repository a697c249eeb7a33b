"""Alembic's entry: runs the revisions on the connection that service.jobs.database hands over."""

from __future__ import annotations

from alembic import context

from service.jobs.records import Record

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("Migrations run through service.jobs.database.migrate(), which hands over the connection.")
# render_as_batch: SQLite cannot alter a column, Alembic then copies the table.
context.configure(connection=connection, target_metadata=Record.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
