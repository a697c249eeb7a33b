"""How `aquant` ends, for scripts: documented in docs/client.md."""

from __future__ import annotations

from enum import IntEnum

from service.jobs.states import JobState


class ExitCode(IntEnum):
    """2 is Click's, for what was typed; 130 the shell's, for Ctrl-C."""

    SUCCEEDED = 0
    FAILED = 1
    """The command: the service refused, does not answer, is not ready; a file cannot be read or written."""
    USAGE = 2
    JOB_FAILED = 3
    JOB_CANCELLED = 4
    TIMED_OUT = 5


OF_JOBS = {
    JobState.SUCCEEDED: ExitCode.SUCCEEDED,
    JobState.FAILED: ExitCode.JOB_FAILED,
    JobState.CANCELLED: ExitCode.JOB_CANCELLED,
}
"""The exit code of a command that followed a job to this end."""
