"""Progress on stderr: bars on a terminal, a line for each step elsewhere, as a log has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from service.client.transfers import Transferred
    from service.jobs.schemas import JobDocument


def describe(job: JobDocument) -> str:
    """A job in one line."""
    words = [job.id, str(job.state)]
    if job.queue_position:
        words.append(f"({job.queue_position} ahead)")
    if job.state == "queued" and job.workers == 0:
        words.append("(no worker is there to take it)")
    if job.state == "running":
        words.append(job.stage or "")
        progress = job.progress
        if progress.block:
            words.append(f"block {progress.block} of {progress.blocks}, {progress.iteration}/{progress.iterations}")
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4g}")
        if progress.eta_seconds is not None:
            words.append(f"{progress.eta_seconds:.0f} s left")
    return " ".join(words)


def share_done(job: JobDocument) -> float | None:
    """How much of the blocks is learned, 0 to 1; None outside that."""
    progress = job.progress
    if job.state != "running" or not progress.block or not progress.blocks:
        return None
    within = progress.iteration / progress.iterations if progress.iterations else 0.0
    return min(1.0, (progress.block - 1 + within) / progress.blocks)


class JobDisplay:
    """Shows a job's documents as they come."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console, self._bars = console, bars
        self._task = bars.add_task("", total=None) if console.is_terminal else None
        self._told: tuple[object, ...] = ()

    def show(self, job: JobDocument) -> None:
        """The job as it is now; its end is for the caller to tell."""
        if job.finished:
            return
        if self._task is not None:
            share = share_done(job)
            total = None if share is None else 1.0
            self._bars.update(self._task, description=describe(job), total=total, completed=share or 0.0)
            return
        waits = job.queue_position, job.workers == 0
        step = (job.state, waits, job.stage, job.progress.block)  # not what counts up in between
        if step != self._told:
            self._console.print(describe(job), soft_wrap=True)
            self._told = step


@contextlib.contextmanager
def job_display() -> Iterator[JobDisplay]:
    """The display of one job."""
    console = Console(stderr=True)
    bars = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True)
    with bars if console.is_terminal else contextlib.nullcontext():
        yield JobDisplay(console, bars)


@contextlib.contextmanager
def transfer_display() -> Iterator[Transferred | None]:
    """Is told how far files are; None where nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def transferred(name: str, done: int, size: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=size)
            bars.update(tasks[name], completed=done, total=size)

        yield transferred
