"""Pages of a list of jobs: the cursor that stands for the last job of one, after which the next begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from service.jobs.errors import CursorError
from service.jobs.records import JobRecord


@dataclass(frozen=True)
class Page:
    """A page of jobs and the cursor of the next, if there is one."""

    jobs: Sequence[JobRecord]
    cursor: str | None


def write_cursor(job: JobRecord) -> str:
    """A cursor: when the job was made and its id, in letters that an address may have."""
    return base64.urlsafe_b64encode(f"{job.created_at.isoformat()} {job.id}".encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[datetime, str]:
    """What ``write_cursor`` was given.

    Raises:
        CursorError: it was not written by that.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        created_at, job_id = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split(" ")
        return datetime.fromisoformat(created_at).astimezone(UTC), job_id
    except (ValueError, binascii.Error, OverflowError) as error:
        raise CursorError(
            f"{cursor!r} is not a page cursor of this service.", "Follow the `next` link of a page as it is."
        ) from error
