"""What the deployment files say: the compose file as its values, the Dockerfile as its stages."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@dataclass
class Stage:
    """One stage of the Dockerfile: what it starts from and its instructions as (word, rest)."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == word]

    @property
    def copies_from(self) -> set[str]:
        return {name for rest in self.all("COPY") for name in re.findall(r"--from=(\S+)", rest)}

    @property
    def environment(self) -> dict[str, str]:
        pairs = (word.partition("=") for rest in self.all("ENV") for word in shlex.split(rest))
        return {name: value for name, _, value in pairs}


@dataclass
class Dockerfile:
    """The arguments before the first stage, and the stages by name."""

    arguments: dict[str, str]
    stages: dict[str, Stage]

    def ancestry(self, name: str) -> list[Stage]:
        """A stage and all it is built upon, itself first."""
        chain = [self.stages[name]]
        while chain[-1].parent in self.stages:
            chain.append(self.stages[chain[-1].parent])
        return chain

    def sources(self, name: str) -> dict[str, Stage]:
        """Every stage something of which is in the image ``name``."""
        found: dict[str, Stage] = {}
        waiting = [name]
        while waiting:
            for stage in self.ancestry(waiting.pop()):
                if stage.name not in found:
                    found[stage.name] = stage
                    waiting.extend(stage.copies_from)
        return found

    def environment(self, name: str) -> dict[str, str]:
        return {k: v for stage in reversed(self.ancestry(name)) for k, v in stage.environment.items()}

    def declared(self, name: str) -> set[str]:
        """Names of the build arguments that the image can be given."""
        stages = self.sources(name).values()
        return {*self.arguments, *(rest.partition("=")[0] for stage in stages for rest in stage.all("ARG"))}


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def _read_dockerfile(path: Path) -> Dockerfile:
    dockerfile = Dockerfile({}, {})
    stage: Stage | None = None
    for word, rest in _instructions(path.read_text()):
        if word == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert match, f"a stage without a name: FROM {rest}"
            stage = Stage(name=match[2], parent=match[1])
            dockerfile.stages[stage.name] = stage
        elif stage is None:
            assert word == "ARG"
            name, _, value = rest.partition("=")
            dockerfile.arguments[name] = value
        else:
            stage.instructions.append((word, rest))
    return dockerfile


def _substitute(value: Any) -> Any:
    """The compose file as it reads where the user's environment sets nothing."""
    if isinstance(value, str):
        return _VARIABLE.sub(r"\2", value)
    if isinstance(value, dict):
        return {key: _substitute(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner) for inner in value]
    return value


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return _read_dockerfile(ROOT / "Dockerfile")


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    document = _substitute(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="session")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found = compose["services"]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting of the machine that runs the tests shows through."""
    for name in os.environ:
        if name.startswith("AQUANT_") or name == "REDIS_URL":
            monkeypatch.delenv(name)
    return monkeypatch
