"""Metrics for Prometheus at ``GET /metrics``: what the database knows, and how long this process's requests took.

Who observes what: jobs run in a child of a worker, on any machine, and their rows may be deleted. So nothing of a job
is counted in a process's memory. States, ages, leases and workers are read from the rows when Prometheus asks;
durations of jobs and blocks, and further attempts, are tallied in the database by whoever brings them about
(``service.jobs.tallies``); a worker on a GPU writes its memory into the row of the job it is at, with the progress.
Hence any API process gives the same answer, nothing is lost at a restart, workers need no port of their own, and
four small queries are all it takes. Only requests are counted by the process that serves them, as each knows but its
own: their histogram starts anew with it, which Prometheus expects of a counter.

Every application has a registry of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.metadata import version
from typing import get_args

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Histogram, Info, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.api.auth import WatcherDep
from service.api.deps import PartsDep
from service.api.problems import REFUSALS, responses
from service.jobs.queue import JobQueue, QueueDownError
from service.jobs.records import JobRecord, WorkerRecord
from service.jobs.repository import JobRepository, StateCount, now
from service.jobs.states import Device, JobState
from service.jobs.tallies import Series, Tallies

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])

REQUEST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""A status takes milliseconds, a long poll up to 20 seconds, an upload or a download as long as its network."""


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "The metrics",
            "content": {
                kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
            },
        },
        **responses(*REFUSALS, "database_unavailable"),
    },
    dependencies=[WatcherDep],
)
def metrics(request: Request, parts: PartsDep) -> Response:
    """Metrics in Prometheus's text format."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(parts.registry), headers={"Content-Type": media_type})


def new_registry() -> tuple[CollectorRegistry, Histogram]:
    """The registry of one application, and its histogram of requests."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Info("aquant_build", "The version that answers.", registry=registry).info({"version": version("aquant-service")})
    requests = Histogram(
        "aquant_http_request_duration_seconds",
        "From the first byte of a request to the last of its answer.",
        ["method", "route", "status"],
        buckets=REQUEST_BOUNDS,
        registry=registry,
    )
    return registry, requests


class ServiceCollector(Collector):
    """Asks database and broker, each time it is asked."""

    def __init__(self, sessions: sessionmaker[Session], queue: JobQueue) -> None:
        self._sessions, self._queue = sessions, queue

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; without those of the database where it does not answer."""
        yield from self._broker()
        up = GaugeMetricFamily("aquant_database_up", "1 if the database answers.")
        try:
            found = list(self._database())
        except SQLAlchemyError:
            log.exception("the database could not be asked for metrics")
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            yield from found
        yield up

    def _broker(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("aquant_broker_up", "1 if the broker answers.")
        waiting = GaugeMetricFamily("aquant_broker_messages", "Messages that wait for a worker.", labels=["device"])
        try:
            for device in get_args(Device):
                waiting.add_metric([device], self._queue.depth(device))
        except QueueDownError:
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            yield waiting
        yield up

    def _database(self) -> Iterator[Metric]:
        at = now()
        with self._sessions() as session:
            repository = JobRepository(session)
            yield from _states(repository.counts(), at)
            yield from _held(repository.held(), at)
            yield _workers(repository.workers(), at)
            yield from _tallied(Tallies(session).all())


def _workers(workers: Iterable[WorkerRecord], at: datetime) -> Metric:
    alive = GaugeMetricFamily("aquant_workers_alive", "Workers that have signed in lately.", labels=["device"])
    for device in get_args(Device):
        alive.add_metric([device], sum(worker.alive(at) for worker in workers if worker.device == device))
    return alive


def _states(counts: list[StateCount], at: datetime) -> Iterator[Metric]:
    found = {one.state: one for one in counts}
    jobs = GaugeMetricFamily("aquant_jobs", "Jobs by state; deleted ones are not among them.", labels=["state"])
    for state in JobState:
        jobs.add_metric([state], found[state].count if state in found else 0)
    yield jobs
    oldest = found.get(JobState.QUEUED)
    yield GaugeMetricFamily(
        "aquant_queue_oldest_job_age_seconds",
        "Age of the oldest job that is queued; 0 if none is.",
        0 if oldest is None else (at - oldest.oldest).total_seconds(),
    )


def _held(jobs: Iterable[JobRecord], at: datetime) -> Iterator[Metric]:
    # Until expiry, not since renewal: below zero means the same whatever the lease's length, and no job should be.
    left = [(job.lease_expires_at - at).total_seconds() for job in jobs if job.lease_expires_at is not None]
    shortest = GaugeMetricFamily(
        "aquant_lease_remaining_seconds",
        "Until the first lease of a running job expires; below 0 its worker is silent. None without running jobs.",
    )
    if left:
        shortest.add_metric([], min(left))
    yield shortest
    for name, what in (
        ("used", "Memory in use on the GPU of a worker that is at a job, by whomever."),
        ("total", "Memory of that GPU."),
        ("peak", "The most that its tensors took at a time since the current block began, or in the last one."),
    ):
        memory = GaugeMetricFamily(f"aquant_gpu_memory_{name}_bytes", what, labels=["worker"])
        for job in jobs:
            gpu = (job.progress or {}).get("gpu")
            if gpu is not None and job.lease_owner is not None:
                memory.add_metric([job.lease_owner.rpartition(":")[0]], gpu[f"{name}_bytes"])
        yield memory


def _tallied(all_series: list[Series]) -> Iterator[Metric]:
    retries = sum(series.count for series in all_series if series.what == "retry")
    yield CounterMetricFamily("aquant_job_retries", "Attempts beyond a job's first.", retries)
    jobs = HistogramMetricFamily(
        "aquant_job_duration_seconds",
        "From a job's first start to its end, by the state it ended in.",
        labels=["method", "state"],
    )
    blocks = HistogramMetricFamily("aquant_block_duration_seconds", "To reconstruct one block.", labels=["method"])
    for series in all_series:
        if series.what == "job":
            jobs.add_metric([series.method, series.state], list(series.buckets()), series.seconds)
        elif series.what == "block":
            blocks.add_metric([series.method], list(series.buckets()), series.seconds)
    yield jobs
    yield blocks
