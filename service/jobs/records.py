"""The tables: jobs with artifacts, events and webhooks; uploads; workers seen; owners and their API keys; tallies."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, ForeignKey, Index, String, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from service.jobs.states import Device, JobState

ALIVE_SECONDS = 20.0
"""A worker that has not signed in for this long is not counted on; it does so every few seconds."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite drops the zone on the way, PostgreSQL answers in the zone of its session."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class IdColumn(TypeDecorator[str]):
    """A job's id, as a caller may have made it up: PostgreSQL has no text with a zero byte, so nor has an id."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}")


class StateColumn(TypeDecorator[JobState]):
    """A job state, stored as its word."""

    impl = String(16)
    cache_ok = True

    def process_bind_param(self, value: JobState | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> JobState | None:  # noqa: ARG002
        return None if value is None else JobState(value)


class Record(DeclarativeBase):
    """Declarative root of the service's tables."""

    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it from the class)
        datetime: UtcDateTime,
        JobState: StateColumn,
        dict[str, Any]: JSON(none_as_null=True),
        Device: String(8),
    }


class JobRecord(Record):
    """One job. The row is the truth; a message on the broker only says "try this one"."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_created_at_id", "created_at", "id"),
        Index("ix_jobs_state_created_at", "state", "created_at"),
        Index("ix_jobs_fingerprint", "fingerprint"),
        Index("ix_jobs_state_owner_created_at", "state", "owner", "created_at"),
    )

    id: Mapped[str] = mapped_column(IdColumn, primary_key=True)
    owner: Mapped[str | None] = mapped_column(String(64))
    """Whose it is; None where the service is open to all."""
    state: Mapped[JobState]
    device: Mapped[Device | None]
    """What it is to run on; None where either will do, until it is claimed: its blocks are good for one device."""
    stage: Mapped[str | None] = mapped_column(String(16))
    config: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    nudged_at: Mapped[datetime | None]
    """When the broker was last told of this job."""

    origin: Mapped[dict[str, Any] | None]
    """What brought the job: ``request_id``, its uploads' ``filenames``, the ``earlier_job`` whose model it took, and
    the context of the request's trace."""

    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """Digest of configuration and files: jobs with the same one do the same work."""

    attempt: Mapped[int] = mapped_column(default=0)
    """How often the job was claimed; also the fence that an outlived worker's writes fail at."""
    handed_on: Mapped[int] = mapped_column(default=0)
    """Of these, attempts that ended because the worker was told to end; they do not count against the job."""
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None]

    artifacts: Mapped[list[ArtifactRecord]] = relationship(
        lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )

    webhook: Mapped[WebhookRecord | None] = relationship(lazy="selectin", cascade="all", passive_deletes=True)

    def artifact(self, name: str) -> ArtifactRecord | None:
        """The artifact of this name, if the job has it."""
        return next((artifact for artifact in self.artifacts if artifact.name == name), None)


ONNX_PROBLEM = "onnx_problem"
"""Name of the artifact that a job has in place of ``onnx``: why there is none, as a problem document."""


class ArtifactRecord(Record):
    """One stored object of a job: an upload or a result. Several jobs may name the same object under ``uploads/``."""

    __tablename__ = "artifacts"
    __table_args__ = (Index("ix_artifacts_key", "key"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    key: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class EventRecord(Record):
    """Something that happened to a job, numbered from 1; written in the transaction that made it happen."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]


class WebhookRecord(Record):
    """Whom to tell that a job has ended, and how far that has come."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_due_at", "due_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    message_id: Mapped[str] = mapped_column(String(40))
    """The same in every attempt, so that its receiver can tell a repetition."""
    url: Mapped[str] = mapped_column(String(2048))
    secret: Mapped[str] = mapped_column(String(128))
    due_at: Mapped[datetime | None]
    """Not to be tried before, nor before the job has ended; None once there is nothing more to try."""
    tries: Mapped[int] = mapped_column(default=0)
    delivered_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(String(300))
    """Why the latest try came to nothing."""


class IdempotencyRecord(Record):
    """A submission that must not be carried out twice."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Digest of owner and key."""
    owner: Mapped[str | None] = mapped_column(String(64))
    """For people alone, as the digest does not tell whose it is."""
    fingerprint: Mapped[str] = mapped_column(String(64))
    """Digest of all that was asked for."""
    job_id: Mapped[str] = mapped_column(String(32))
    """The job that came of it; it may have been deleted since."""
    created_at: Mapped[datetime]


class UploadRecord(Record):
    """A file that is sent in pieces, or has been; kept once for each owner."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_touched_at", "touched_at"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Digest of owner and sha256, so that two owners never meet in one row."""
    owner: Mapped[str | None] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))
    place: Mapped[str] = mapped_column(String(32), unique=True)
    """Name of its folder in the store; drawn anew whenever the row is."""
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes it will have."""
    offset: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes it has."""
    key: Mapped[str | None] = mapped_column(String(255))
    """The whole file; None until it is complete."""
    created_at: Mapped[datetime]
    """When it was begun; for people alone."""
    touched_at: Mapped[datetime]
    """When it was last sent or added to, or named by a job."""


class UploadPieceRecord(Record):
    """A piece of an upload that is not complete."""

    __tablename__ = "upload_pieces"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    size: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str] = mapped_column(String(255))


class WorkerRecord(Record):
    """A worker process's sign of life."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    seen_at: Mapped[datetime]
    device: Mapped[Device]
    detail: Mapped[str] = mapped_column(String(255))
    """The device in words, or why it has no GPU."""

    def alive(self, at: datetime) -> bool:
        """Whether it has signed in lately."""
        return (at - self.seen_at).total_seconds() < ALIVE_SECONDS


class TallyRecord(Record):
    """Part of a counter or a histogram: how many observations fell into one bucket, and the seconds of all of them."""

    __tablename__ = "tallies"

    what: Mapped[str] = mapped_column(String(16), primary_key=True)
    method: Mapped[str] = mapped_column(String(32), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), primary_key=True)
    bucket: Mapped[str] = mapped_column(String(16), primary_key=True)
    """Its upper bound, as Prometheus writes it."""
    count: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]


class OwnerRecord(Record):
    """Whom jobs and keys belong to; "" is who comes without a key while there are none.

    The row is also what is locked while it is decided whether a limit allows for more. Limits that are NULL are those
    of the settings.
    """

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    max_jobs_queued: Mapped[int | None]
    max_jobs_running: Mapped[int | None]
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_upload_bytes: Mapped[int | None] = mapped_column(BigInteger)


class KeyRecord(Record):
    """An API key; of its secret there is only the digest. Rows stay when keys are revoked."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the whole key, in hex."""
    name: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str] = mapped_column(ForeignKey("owners.name"))
    scope: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """To within a minute."""
