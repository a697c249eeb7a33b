"""The table of states is what the rest relies on."""

from __future__ import annotations

from service.jobs.states import FINISHED, HELD, TRANSITIONS, JobState, sources


def test_table_is_complete_and_ends() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == FINISHED
    assert not FINISHED & HELD


def test_only_a_running_job_succeeds_and_only_a_queued_one_is_claimed() -> None:
    assert sources(JobState.SUCCEEDED) == {JobState.RUNNING}
    assert sources(JobState.RUNNING) == {JobState.QUEUED}
    assert sources(JobState.CANCELLED) == {JobState.QUEUED, JobState.CANCELLING}
