"""Rows of jobs in every state worth a look, as a worker would have left them, for tests of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from job_rows import MINUTE, finish, stored
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.events import Happening
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.schemas import Problem
from service.jobs.states import JobState

CONFIG: dict[str, Any] = {"weight_bits": 2, "activation_bits": 2, "preset": "fast"}
NO_FILES: Mapping[str, bytes] = MappingProxyType({})
BLOCKS = ["stem", "layer1.0", "layer2.0", "layer3.0", "fc"]


@dataclass
class PageJobs:
    """Puts jobs in; ids are numbers of 24 digits."""

    sessions: sessionmaker[Session]
    artifacts: Artifacts
    owner: str | None = None
    count: int = 0

    def queued(self, filename: str = "residual.onnx", config: Mapping[str, Any] = CONFIG) -> str:
        self.count += 1
        job_id = f"{self.count:024d}"
        sizes = {"model": (filename, 700_000), "calibration": ("calibration.npz", 300_000)}
        with self.sessions.begin() as session:
            JobRepository(session).add(
                JobRecord(
                    id=job_id,
                    owner=self.owner,
                    state=JobState.QUEUED,
                    config=dict(config),
                    created_at=now() - timedelta(hours=1) + timedelta(minutes=self.count),
                    origin={"filenames": {name: called for name, (called, _) in sizes.items()}},
                    attempt=0,
                    artifacts=[
                        ArtifactRecord(
                            job_id=job_id,
                            name=name,
                            key=f"jobs/{job_id}/{name}",
                            format="onnx" if name == "model" else "npz",
                            size=size,
                            sha256=f"{self.count:064x}",
                        )
                        for name, (_, size) in sizes.items()
                    ],
                )
            )
        return job_id

    def running(self, iteration: int = 140, **of_job: Any) -> str:
        job_id = self.queued(**of_job)
        self.go_on(job_id, iteration)
        return job_id

    def go_on(self, job_id: str, iteration: int, block: int = 3) -> None:
        """As the worker's lease writes it; two blocks are finished when it begins."""
        curve = {"iterations": list(range(9, iteration, 10)), "values": [5 / n for n in range(9, iteration, 10)]}
        progress = {
            "method": "aquant", "block": block, "blocks": len(BLOCKS), "iteration": iteration, "iterations": 300,
            "loss": 0.0213, "curve": curve, "eta_seconds": 42.0,
            "forecast": {
                "seconds": 60.0, "peak_bytes": 10**8,
                "blocks": [
                    {"name": name, "seconds": 12.0, "peak_bytes": 10**8, "placement": "memory"} for name in BLOCKS
                ],
            },
        }  # fmt: skip
        finished = [
            Happening("block", {"method": "aquant", "block": n, "blocks": len(BLOCKS), "loss": 0.01 * n, "attempt": 1})
            for n in (1, 2)
        ]
        with self.sessions.begin() as session:
            repository = JobRepository(session)
            claim = repository.claim(job_id, "worker", MINUTE * 60)
            if claim is None:
                session.get_one(JobRecord, job_id).progress = progress
            else:
                repository.renew(claim, MINUTE * 60, "reconstruct", progress, finished)

    def end(
        self, job_id: str, state: JobState, error: Problem | None = None, files: Mapping[str, bytes] = NO_FILES
    ) -> str:
        stage = "intake" if state == JobState.FAILED else "save"
        finish(self.sessions, job_id, state, stage, error, stored(self.artifacts, job_id, files))
        return job_id

    def succeeded(self, report: Mapping[str, Any], more: Mapping[str, bytes] = NO_FILES, **of_job: Any) -> str:
        files = {"report": json.dumps(report).encode(), "checkpoint": b"the checkpoint", **more}
        return self.end(self.queued(**of_job), JobState.SUCCEEDED, files=files)

    def failed(self, detail: str, **of_job: Any) -> str:
        problem = Problem.of_job("operator_unsupported", detail, "Replace it.")
        return self.end(self.queued(**of_job), JobState.FAILED, problem)
