"""The states of a job and the moves between them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

Device = Literal["gpu", "cpu"]
"""What a worker computes on, and a job may ask for."""


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    # Back to queued: its worker died and attempts are left.
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    # A job whose last step outran the cancel request still ends as cancelled: the user was told so.
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

FINISHED = frozenset(state for state, onward in TRANSITIONS.items() if not onward)
"""States a job never leaves."""

HELD = frozenset({JobState.RUNNING, JobState.CANCELLING})
"""States in which a worker holds the job's lease."""


def sources(target: JobState) -> frozenset[JobState]:
    """The states from which ``target`` may be entered."""
    return frozenset(state for state, onward in TRANSITIONS.items() if target in onward)
