"""The worker's one task: claim a job, take its uploads in, quantize, publish."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.config import QuantizationConfig
from aquant_core.errors import AQuantError, memory_is_full
from aquant_core.progress import Progress
from service.artifacts import ArtifactsDownError, blocks_prefix, job_prefix, open_artifacts
from service.jobs.announcement import announce
from service.jobs.database import DATABASE_DOWN, open_database
from service.jobs.queue import RUN_JOB, JobQueue, QueueDownError
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.schemas import Problem
from service.jobs.states import FINISHED, Device, JobState
from service.jobs.tallies import Tallies
from service.logs import about
from service.settings import Settings
from service.tracing import context_of, send, tracer_provider
from worker.admission import IntakeFailedError, IntakeLostError, admit
from worker.blocks import BlockStore
from worker.celery_app import app, settings
from worker.endings import GPU_FULL, GPU_LOST, MEMORY_FULL, STORE_LOST, problem_of, unexpected
from worker.lease import JobStopError, Lease, LeaseLostError, WorkerEndingError, told_to_end
from worker.presence import worker_name
from worker.reporting import publish, publish_plan
from worker.steps import BlockEnd, Steps
from worker.workplace import DISK_FULL, disk_is_full, workplace

log = logging.getLogger(__name__)

STORE_POLL_SECONDS = 5.0
"""How often a worker asks whether the artifact store is back."""


class JobRunner:
    """Runs jobs one after another, with the parts they share."""

    def __init__(self, settings: Settings, device: Device) -> None:
        self._settings, self._device = settings, device
        self._sessions: sessionmaker[Session] = sessionmaker(open_database(settings), expire_on_commit=False)
        self._artifacts = open_artifacts(settings.artifacts)
        self._queue = JobQueue(settings)
        self._tracing = tracer_provider(settings, "aquant-worker")
        self._tracer = self._tracing.get_tracer("aquant")

    def run(self) -> JobState | None:
        """Try the job whose turn it is; the state it was left in, or None if none waits or it was lost on the way.

        A worker that ends takes none.

        Without a database its row stays as it is, for the reaper: queued, or under a lease that runs out.
        """
        if told_to_end.is_set():
            return None
        try:
            claim = self._claim()
            return None if claim is None else self._try(claim)
        except DATABASE_DOWN as error:
            log.warning("jobs wait for the database and will be tried again: %s", error)
            return None

    def _try(self, claim: Claim) -> JobState | None:
        """Run the attempt under its names: those of log lines and of the trace."""
        job_id = claim.job_id
        with self._sessions() as session:
            job = JobRepository(session).get(job_id)
        origin = job.origin or {}
        with about(job_id=job_id, attempt=claim.attempt, request_id=origin.get("request_id")):
            try:
                with self._tracer.start_as_current_span(
                    "job attempt",
                    context_of(origin),
                    SpanKind.CONSUMER,
                    {"aquant.job.id": job_id, "aquant.job.attempt": claim.attempt},
                ) as span:
                    state = self._run(job, claim)
                    span.set_attribute("aquant.job.state", state or "lost")
                    handed_on = state == JobState.QUEUED and told_to_end.is_set()
                    if state in (None, JobState.QUEUED, JobState.FAILED) and not handed_on:
                        span.set_status(StatusCode.ERROR)
            finally:
                send(self._tracing)  # the process may be ended before its thread gets to it
        return state

    def _claim(self) -> Claim | None:
        owner = f"{worker_name()}:{secrets.token_hex(4)}"
        lease = timedelta(seconds=self._settings.lease_seconds)
        with self._sessions.begin() as session:
            return JobRepository(session).claim_next(owner, lease, self._device, self._settings.max_jobs_running)

    def _run(self, job: JobRecord, claim: Claim) -> JobState | None:
        log.info("job %s: attempt %d begins", job.id, claim.attempt)
        with (
            workplace(self._settings.work_dir, job.id, claim.attempt) as folder,
            Lease(claim, self._settings, self._sessions, self._end_process) as lease,
            Steps(self._tracer, functools.partial(self._end_block, lease)) as steps,
        ):
            state = self._attempt(job, claim, lease, steps, folder)
        if state in FINISHED:
            self._artifacts.discard(blocks_prefix(job.id))
        log.info("job %s: attempt %d ends: %s", job.id, claim.attempt, state or "lost to another attempt")
        return state

    def _attempt(self, job: JobRecord, claim: Claim, lease: Lease, steps: Steps, folder: Path) -> JobState | None:
        """One attempt; every way it can end is a row's state, none an exception but a database that is down."""
        try:
            try:
                return self._quantize(job, claim, lease, steps, folder)
            except ArtifactsDownError as error:
                log.warning("job %s: %s", job.id, error)
                self._wait_for_artifacts(lease)
                return self._give_back(lease, STORE_LOST)
        except JobStopError as stop:
            return self._stop(lease, stop)
        except IntakeLostError as error:
            return self._give_back(lease, error.problem)
        except IntakeFailedError as error:
            problem = error.problem
        except AQuantError as error:
            problem = Problem.of_job(error.code, error.detail, error.remedy)
        except DATABASE_DOWN:
            raise
        except Exception as error:
            if disk_is_full(error):
                log.warning("job %s: %s", job.id, error)
                return self._give_back(lease, DISK_FULL)
            if memory_is_full(error):
                log.warning("job %s: %r", job.id, error)
                return self._finish(lease, JobState.FAILED, MEMORY_FULL)
            from worker.device import gpu_is_full, gpu_is_lost  # torch: it is imported by now, or the error is another

            if gpu_is_lost(error):
                log.error("job %s: the GPU is lost, and this worker stops: %s", job.id, error)
                os.kill(os.getppid(), signal.SIGTERM)  # before it loses the next job; it starts with what is left
                return self._give_back(lease, GPU_LOST)
            if gpu_is_full(error):
                return self._finish(lease, JobState.FAILED, GPU_FULL)
            log.exception("job %s failed", job.id)
            problem = unexpected(error, job.id)
        return self._finish(lease, JobState.FAILED, problem)

    def _quantize(self, job: JobRecord, claim: Claim, lease: Lease, steps: Steps, folder: Path) -> JobState | None:
        intake = admit(job, lease, folder, self._artifacts, self._settings)
        blocks = BlockStore(job.id, folder / "blocks", self._artifacts)
        blocks.fetch()

        from aquant_core import CapturedModel, ImageSet, plan, quantize  # torch: only in the child, only from here on
        from worker.device import GpuMemory, resources

        granted = resources(self._settings, self._device, folder)
        memory = GpuMemory(granted.device)

        def report(progress: Progress) -> None:
            steps.see(progress)
            lease.report(progress, memory.read())
            blocks.store()

        model, calibration = CapturedModel.load(intake.captured), ImageSet.load(intake.calibration)
        evaluation = None if intake.evaluation is None else ImageSet.load(intake.evaluation)
        config = QuantizationConfig.model_validate(job.config)
        names = (job.origin or {}).get("filenames", {})
        if config.dry_run:
            document = plan(model, calibration, config, evaluation, report, resources=granted, names=names)
            lease.flush()
            return publish_plan(claim, document, intake.warnings, folder, self._artifacts, self._sessions)
        result = quantize(
            model, calibration, config, evaluation, report, resources=granted, resume_from=blocks.folder, names=names
        )
        report(Progress(stage="save"))
        lease.flush()
        return publish(claim, result, intake.warnings, folder, self._artifacts, self._sessions)

    def _end_block(self, lease: Lease, end: BlockEnd) -> None:
        lease.note_block(end.method, end.block, end.blocks, end.loss)
        try:
            with self._sessions.begin() as session:
                Tallies(session).add("block", end.seconds, end.method)
        except SQLAlchemyError:
            log.exception("the database did not take a block's duration")  # no reason to lose the job

    def _wait_for_artifacts(self, lease: Lease) -> None:
        """Return when the store answers again: until then no attempt at any job would do better.

        Raises:
            JobStopError: the job must stop meanwhile.
        """
        while True:
            lease.check()
            try:
                return self._artifacts.try_out(job_prefix(lease.claim.job_id))
            except ArtifactsDownError:
                time.sleep(STORE_POLL_SECONDS)

    def _stop(self, lease: Lease, stop: JobStopError) -> JobState | None:
        """End a job that was cancelled or went over a limit; one whose claim is lost is another's to end.

        Where it is the worker that ends, the job waits for another.
        """
        if isinstance(stop, LeaseLostError):
            return None
        if isinstance(stop, WorkerEndingError):
            return self._let_go(lease, lambda jobs: jobs.hand_on(lease.claim))
        problem = problem_of(stop, self._settings)
        return self._finish(lease, JobState.CANCELLED if problem is None else JobState.FAILED, problem)

    def _end_process(self, lease: Lease, stop: JobStopError) -> None:
        """As :meth:`_stop`, for work that does not stop when told to: what it holds, a GPU perhaps, is wanted."""
        try:
            if self._stop(lease, stop) in FINISHED:
                self._artifacts.discard(blocks_prefix(lease.claim.job_id))
        except SQLAlchemyError:
            log.exception("job %s: the database was not told; the reaper will end it", lease.claim.job_id)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # the worker starts another process, which clears up

    def _finish(self, lease: Lease, state: JobState, problem: Problem | None) -> JobState | None:
        lease.flush()
        with self._sessions.begin() as session:
            error = None if problem is None else problem.model_dump()
            return JobRepository(session).finish(lease.claim, state, lease.stage, error)

    def _give_back(self, lease: Lease, problem: Problem) -> JobState | None:
        error, attempts = problem.model_dump(), self._settings.max_attempts
        return self._let_go(lease, lambda jobs: jobs.give_back(lease.claim, attempts, error))

    def _let_go(self, lease: Lease, how: Callable[[JobRepository], JobState | None]) -> JobState | None:
        """End the attempt; if the job is back in the queue, tell the workers."""
        job_id = lease.claim.job_id
        lease.flush()
        with self._sessions.begin() as session:
            state = how(JobRepository(session))
        if state == JobState.QUEUED:
            try:
                announce(job_id, self._sessions, self._queue)
            except QueueDownError as error:
                log.warning("job %s is queued again but not announced: %s", job_id, error)
        return state


@functools.cache
def _runner() -> JobRunner:
    return JobRunner(settings, "gpu" if settings.device == "cuda" else "cpu")  # the parent has chosen


@app.task(name=RUN_JOB)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Job ``job_id`` waits, so it is some job's turn; may be called any number of times for the same one."""
    with about(announced_job_id=job_id):
        _runner().run()
