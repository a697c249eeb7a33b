"""How an attempt at a job can end other than well, as the job's user is told."""

from __future__ import annotations

from service.jobs.schemas import Problem
from service.settings import Settings
from worker.lease import JobMemoryError, JobStopError, JobTimeoutError

STORE_LOST = Problem.of_job(
    "artifacts_unavailable",
    "The store of the service's files did not answer, each time the job was tried.",
    "Submit it again once the service is well; its operator finds the reason in the worker's log.",
)
GPU_LOST = Problem.of_job(
    "gpu_lost",
    "The GPU broke down while it ran this job, each time it was tried.",
    "Submit it again; the service's operator finds the GPU's error in the worker's log.",
)
GPU_FULL = Problem.of_job(
    "gpu_memory_exceeded",
    "The GPU's memory does not do for this job.",
    "Submit it with `device` cpu, or have the operator lower AQUANT_DEVICE_MEMORY_BYTES, from which on block inputs "
    "stay in the machine's memory.",
)
MEMORY_FULL = Problem.of_job(
    "memory_exceeded",
    "The memory of the worker's machine does not do for this job.",
    "Send fewer images or a smaller network, or have the operator lower AQUANT_MEMORY_BYTES, from which on block "
    "inputs go to disk, or give the worker more memory.",
)


def unexpected(error: Exception, job_id: str) -> Problem:
    """An error that nobody has thought of."""
    return Problem.of_job(
        "internal_error",
        f"The worker met an error it did not expect ({type(error).__name__}) in job {job_id}.",
        "Report it with the job's id: the worker's log has the details.",
    )


def problem_of(stop: JobStopError, settings: Settings) -> Problem | None:
    """Which limit a job went over; None where it was stopped for another reason."""
    if isinstance(stop, JobTimeoutError):
        return Problem.of_job(
            "time_limit_exceeded",
            f"The job ran for more than the {settings.job_seconds:.0f} seconds it is given.",
            "Choose a smaller preset or fewer iterations, or have the operator raise AQUANT_JOB_SECONDS.",
        )
    if isinstance(stop, JobMemoryError):
        return Problem.of_job(
            "memory_limit_exceeded",
            f"The job took more than the {settings.job_memory_bytes} bytes of memory it is given.",
            "Send fewer images or a smaller network, or have the operator raise AQUANT_JOB_MEMORY_BYTES or lower "
            "AQUANT_MEMORY_BYTES, from which on block inputs go to disk.",
        )
    return None
