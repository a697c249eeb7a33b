"""Files that a submission names in place of sending them: uploads, and files of the owner's earlier jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.artifacts import UPLOADS, Artifacts, Stored, job_prefix
from service.jobs.errors import FormError, JobFileMissingError, JobNotFoundError
from service.jobs.repository import JobRepository
from service.jobs.schemas import FILE_REFERENCE, UploadName


def read_reference(name: UploadName, text: str) -> str:
    """What a field says in place of a file.

    Raises:
        FormError: it names none.
    """
    if re.fullmatch(FILE_REFERENCE, text) is None:
        raise FormError(
            f"`{name}` is neither a file nor the name of one: {text[:80]!r}.",
            "Send it as a part with a file name, or name an upload as sha256: and its digest in hex, or an earlier "
            "job with the same file as job: and its id.",
        )
    return text


@dataclass(frozen=True)
class References:
    """What a submission names.

    Attributes:
        uploads: sha256 in hex of uploads.
        jobs: ids of jobs that have the file under the same name.
    """

    uploads: Mapping[UploadName, str]
    jobs: Mapping[UploadName, str]

    @classmethod
    def of(cls, named: Mapping[UploadName, str]) -> References:
        """From references as they are written."""
        pairs = {name: text.partition(":") for name, text in named.items()}
        return cls(
            uploads={name: value for name, (kind, _, value) in pairs.items() if kind == "sha256"},
            jobs={name: value for name, (kind, _, value) in pairs.items() if kind == "job"},
        )


@dataclass(frozen=True)
class EarlierFile:
    """A file of an earlier job, and what it was called where it came from."""

    job_id: str
    name: UploadName
    stored: Stored
    filename: str | None

    @property
    def is_shared(self) -> bool:
        """Whether it is an upload, which several jobs may name; else it is the job's own, and goes with it."""
        return self.stored.key.startswith(UPLOADS)

    def copy(self, artifacts: Artifacts, job_id: str) -> Stored:
        """Give another job one of its own.

        Raises:
            JobFileMissingError: its job has been deleted meanwhile.
        """
        key = job_prefix(job_id) + self.name
        try:
            artifacts.copy(self.stored.key, key)
        except FileNotFoundError as error:
            raise JobFileMissingError(self.name, self.job_id) from error
        return Stored(key, self.stored.size, self.stored.sha256)


def earlier_files(session: Session, owner: str | None, jobs: Mapping[UploadName, str]) -> list[EarlierFile]:
    """The files of these jobs of the owner.

    Raises:
        JobFileMissingError: the owner has no such job, or it has no such file.
    """
    repository = JobRepository(session).of(owner)
    found = []
    for name, job_id in jobs.items():
        try:
            job = repository.get(job_id)
        except JobNotFoundError as error:
            raise JobFileMissingError(name, job_id) from error
        artifact = job.artifact(name)
        if artifact is None:
            raise JobFileMissingError(name, job_id)
        stored = Stored(artifact.key, artifact.size, artifact.sha256)
        found.append(EarlierFile(job_id, name, stored, (job.origin or {}).get("filenames", {}).get(name)))
    return found
