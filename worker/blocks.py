"""Carries a job's finished blocks from one attempt to the next, by way of the artifact store."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from service.artifacts import Artifacts, blocks_prefix


class BlockStore:
    """The finished blocks of one job: a folder here, copied to the store file by file.

    Any attempt writes the same bytes under the same name, so that one which has outlived its lease does no harm.
    """

    def __init__(self, job_id: str, folder: Path, artifacts: Artifacts) -> None:
        self.folder = folder
        # Another version may learn differently; its attempt begins from the start.
        self._prefix = f"{blocks_prefix(job_id)}{version('aquant-service')}/"
        self._artifacts = artifacts
        self._stored: set[str] = set()
        folder.mkdir()

    def fetch(self) -> None:
        """Brings what earlier attempts have finished."""
        for key in self._artifacts.keys(self._prefix):
            name = key.rpartition("/")[2]
            self._artifacts.get_file(key, self.folder / name)
            self._stored.add(name)

    def store(self) -> None:
        """Copies what has been finished since the last call."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._stored:
                self._artifacts.put_file(self._prefix + path.name, path)
                self._stored.add(path.name)
