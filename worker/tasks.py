"""The worker's one task: claim a job, take its uploads in, quantize, publish."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from datetime import timedelta
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from aquant_core.config import QuantizationConfig
from aquant_core.errors import AQuantError
from aquant_core.progress import Progress
from service.artifacts import ArtifactsDownError, blocks_prefix, open_artifacts
from service.jobs.database import DATABASE_DOWN, open_database
from service.jobs.queue import RUN_JOB, JobQueue, QueueDownError
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.schemas import Problem
from service.jobs.states import FINISHED, JobState
from service.settings import Settings
from worker.admission import IntakeFailedError, IntakeLostError, admit
from worker.blocks import BlockStore
from worker.celery_app import app, settings
from worker.lease import JobCancelledError, JobTimeoutError, Lease, LeaseLostError
from worker.presence import worker_name
from worker.reporting import publish
from worker.workplace import workplace

log = logging.getLogger(__name__)

STORE_POLL_SECONDS = 5.0
"""How often a worker asks whether the artifact store is back."""


STORE_LOST = Problem.of_job(
    "artifacts_unavailable",
    "The store of the service's files did not answer, each time the job was tried.",
    "Submit it again once the service is well; its operator finds the reason in the worker's log.",
)


class JobRunner:
    """Runs jobs one after another, with the parts they share."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions: sessionmaker[Session] = sessionmaker(open_database(settings), expire_on_commit=False)
        self._artifacts = open_artifacts(settings.artifacts)
        self._queue = JobQueue(settings)

    def run(self, job_id: str) -> JobState | None:
        """Try a job; the state it was left in, or None if it was not to be had or was lost on the way.

        Without a database its row stays as it is, for the reaper: queued, or under a lease that runs out.
        """
        try:
            return self._run(job_id)
        except DATABASE_DOWN as error:
            log.warning("job %s waits for the database and will be tried again: %s", job_id, error)
            return None

    def _run(self, job_id: str) -> JobState | None:
        owner = f"{worker_name()}:{secrets.token_hex(4)}"
        with self._sessions.begin() as session:
            repository = JobRepository(session)
            claim = repository.claim(job_id, owner, timedelta(seconds=self._settings.lease_seconds))
            if claim is None:
                log.info("job %s is not there to be taken", job_id)
                return None
            job = repository.get(job_id)
        log.info("job %s: attempt %d begins", job_id, claim.attempt)
        with (
            workplace(self._settings.work_dir, job_id, claim.attempt) as folder,
            Lease(claim, self._settings, self._sessions) as lease,
        ):
            state = self._attempt(job, claim, lease, folder)
        if state in FINISHED:
            self._artifacts.discard(blocks_prefix(job_id))
        log.info("job %s: attempt %d ends: %s", job_id, claim.attempt, state or "lost to another attempt")
        return state

    def _attempt(self, job: JobRecord, claim: Claim, lease: Lease, folder: Path) -> JobState | None:
        """One attempt; every way it can end is a row's state, none an exception but a database that is down."""
        try:
            try:
                return self._quantize(job, claim, lease, folder)
            except ArtifactsDownError as error:
                log.warning("job %s: %s", job.id, error)
                self._wait_for_artifacts(lease)
                return self._give_back(claim, STORE_LOST)
        except LeaseLostError:
            return None
        except JobCancelledError:
            return self._finish(lease, JobState.CANCELLED, None)
        except JobTimeoutError:
            problem = Problem.of_job(
                "time_limit_exceeded",
                f"The job ran for more than the {self._settings.job_seconds:.0f} seconds it is given.",
                "Choose a smaller preset or fewer iterations, or have the operator raise AQUANT_JOB_SECONDS.",
            )
        except IntakeLostError as error:
            return self._give_back(claim, error.problem)
        except IntakeFailedError as error:
            problem = error.problem
        except AQuantError as error:
            problem = Problem.of_job(error.code, error.detail, error.remedy)
        except DATABASE_DOWN:
            raise
        except Exception as error:
            log.exception("job %s failed", job.id)
            problem = Problem.of_job(
                "internal_error",
                f"The worker met an error it did not expect ({type(error).__name__}) in job {job.id}.",
                "Report it with the job's id: the worker's log has the details.",
            )
        return self._finish(lease, JobState.FAILED, problem)

    def _quantize(self, job: JobRecord, claim: Claim, lease: Lease, folder: Path) -> JobState | None:
        intake = admit(job, lease, folder, self._artifacts, self._settings)
        blocks = BlockStore(job.id, folder / "blocks", self._artifacts)
        blocks.fetch()

        from aquant_core import CapturedModel, ImageSet, quantize  # torch: only in the child, only from here on
        from worker.device import resources

        def report(progress: Progress) -> None:
            lease.report(progress)
            blocks.store()

        result = quantize(
            CapturedModel.load(intake.captured),
            ImageSet.load(intake.calibration),
            QuantizationConfig.model_validate(job.config),
            evaluation=None if intake.evaluation is None else ImageSet.load(intake.evaluation),
            on_progress=report,
            resources=resources(self._settings, folder),
            resume_from=blocks.folder,
        )
        lease.report(Progress(stage="save"))
        return publish(claim, result, intake.warnings, folder, self._artifacts, self._sessions)

    def _wait_for_artifacts(self, lease: Lease) -> None:
        """Return when the store answers again: until then no attempt at any job would do better.

        Raises:
            JobStopError: the job must stop meanwhile.
        """
        while True:
            lease.check()
            try:
                return self._artifacts.check()
            except ArtifactsDownError:
                time.sleep(STORE_POLL_SECONDS)

    def _finish(self, lease: Lease, state: JobState, problem: Problem | None) -> JobState | None:
        with self._sessions.begin() as session:
            error = None if problem is None else problem.model_dump()
            return JobRepository(session).finish(lease.claim, state, lease.stage, error)

    def _give_back(self, claim: Claim, problem: Problem) -> JobState | None:
        with self._sessions.begin() as session:
            state = JobRepository(session).give_back(claim, self._settings.max_attempts, problem.model_dump())
        if state == JobState.QUEUED:
            try:
                self._queue.announce(claim.job_id)
            except QueueDownError as error:
                log.warning("job %s is queued again but not announced: %s", claim.job_id, error)
        return state


@functools.cache
def _runner() -> JobRunner:
    return JobRunner(settings)


@app.task(name=RUN_JOB)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Try job ``job_id``; may be called any number of times for the same one."""
    _runner().run(job_id)
