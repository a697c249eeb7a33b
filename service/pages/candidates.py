"""What a job may be compared with, and how each is told from the others."""

from __future__ import annotations

from dataclasses import dataclass

from aquant_core.report.formats import percent
from service.jobs.schemas import JobDocument
from service.pages.render import title_of, when


@dataclass(frozen=True)
class Candidate:
    """A job that another may be compared with.

    Attributes:
        top1: its accuracy, where its report tells one.
        is_origin: whether the other took its files from it.
    """

    job: JobDocument
    top1: float | None
    is_origin: bool

    @property
    def words(self) -> str:
        """Name, task, preset, accuracy, time, and the beginning of the id that its page shows."""
        job = self.job
        reached = [] if self.top1 is None else [f"top-1 {percent(self.top1)}"]
        task = f"{title_of(job.config)}, {job.config.preset}"
        return ", ".join([job.name, task, *reached, when(job.created_at), job.id[:8]])
