"""The two images: what goes into each, as whom they run, and that the API's has no PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = ["api", "worker"]
HEAVY = re.compile(r"torch|torchvision|triton|numba|numpy|onnx|onnxruntime|cupy-.*|nvidia-.*|cuda-.*")

WITHOUT = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

absent, folder = set(json.loads(sys.argv[1])), sys.argv[2]

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from fastapi.testclient import TestClient
from service.main import create_app
from service.settings import Settings
import service.cli, uvicorn.protocols.http.h11_impl

with TestClient(create_app(Settings(data_dir=Path(folder), broker_url="redis://127.0.0.1:1/0"))) as web:
    print(json.dumps(web.get("/health/ready").json()["checks"]))
"""
"""Starts the API where some modules are not to be had, with a broker that is not there."""


def installed_extras(dockerfile: Any, target: str) -> set[str]:
    """The extras of this project that are installed for an image."""
    commands = [run for stage in dockerfile.sources(target).values() for run in stage.all("RUN")]
    lists = {extras for run in commands for extras in re.findall(r"\.whl\)\[([^]]+)\]", run)}
    return {extra for extras in lists for extra in extras.split(",")}


def needs_of(extras: set[str]) -> set[str]:
    """Names of every distribution that the base install and these extras pull in, as pyproject.toml and the
    metadata of what is installed say."""
    optional = PROJECT["project"]["optional-dependencies"]
    own = canonicalize_name(PROJECT["project"]["name"])
    waiting = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    waiting += [Requirement(line) for extra in extras for line in optional[extra]]
    done: set[tuple[str, str]] = set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        for extra in ["", *need.extras]:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            if name == own:
                lines = optional[extra] if extra else []
            else:
                try:
                    lines = metadata.requires(name) or []
                except metadata.PackageNotFoundError:
                    lines = []
            requirements = [Requirement(line) for line in lines]
            waiting += [r for r in requirements if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in done} - {own}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_from_the_base_image_that_was_asked_for(dockerfile: Any, target: str) -> None:
    assert dockerfile.arguments["BASE_IMAGE"]
    assert dockerfile.ancestry(target)[-1].parent == "${BASE_IMAGE}"


def test_the_api_image_installs_nothing_of_the_worker(dockerfile: Any) -> None:
    assert installed_extras(dockerfile, "api") == {"server", "telemetry"}
    assert "worker-dependencies" not in dockerfile.sources("api")
    assert "EXTRAS" not in dockerfile.declared("api")


def test_what_the_api_image_installs_needs_no_pytorch() -> None:
    needs = needs_of({"server", "telemetry"})
    assert {"fastapi", "starlette", "kombu", "pydantic"} <= needs
    assert not sorted(filter(HEAVY.fullmatch, needs))


def test_the_api_runs_on_what_its_image_installs(tmp_path: Path) -> None:
    present = needs_of({"server"})
    absent = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*present, "aquant-service"}
    ]
    assert {"torch", "numpy", "pytest"} <= set(absent)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(absent), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)
    assert (checks["database"], checks["broker"]) == ("ok", "unavailable")


def test_the_worker_image_installs_the_extras_it_is_given(dockerfile: Any) -> None:
    assert installed_extras(dockerfile, "worker") == {"${EXTRAS}", "telemetry"}
    defaults = dict(line.split("=") for line in dockerfile.stages["worker-dependencies"].all("ARG") if "=" in line)
    assert defaults == {"EXTRAS": "worker"}
    assert {"torch", "celery", "onnx"} <= needs_of({"worker"})
    assert "cupy-cuda13x" in needs_of({"worker", "gpu"}) - needs_of({"worker"})


@pytest.mark.parametrize("target", TARGETS)
def test_versions_are_the_pinned_ones(dockerfile: Any, target: str) -> None:
    commands = [run for stage in dockerfile.sources(target).values() for run in stage.all("RUN")]
    installs = [part for run in commands for part in run.split("&&") if re.search(r"\bpip\b.* install ", part)]
    assert len(installs) == 3  # the build's tools, the dependencies, this project
    for install in installs:
        assert "-c constraints.txt" in install or "--no-deps --no-index" in install


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_one_fixed_user_who_is_not_root(dockerfile: Any, target: str) -> None:
    assert dockerfile.stages[target].all("USER") == ["10001:10001"]
    creation = " ".join(run for stage in dockerfile.ancestry(target) for run in stage.all("RUN"))
    assert "groupadd --gid 10001" in creation
    assert "useradd --uid 10001" in creation


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_not_built_upon_the_stages_with_the_build_tools(dockerfile: Any, target: str) -> None:
    assert [stage.name for stage in dockerfile.ancestry(target)] == [target, "runtime", "python"]
    copied = [rest.split()[-2:] for rest in dockerfile.stages[target].all("COPY")]
    assert copied == [["/opt/venv", "/opt/venv"], ["/opt/aquant", "/opt/aquant"]]
    assert "python3 -m venv --without-pip /opt/venv" in dockerfile.stages["builder"].all("RUN")[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_a_health_check_and_a_command(dockerfile: Any, target: str) -> None:
    for word in ("HEALTHCHECK", "CMD"):
        assert len(dockerfile.stages[target].all(word)) == 1


def test_all_packages_are_copied_and_pass_the_ignore_file(dockerfile: Any) -> None:
    copies = [rest for stage in dockerfile.stages.values() for rest in stage.all("COPY") if "--from" not in rest]
    copied = {source for rest in copies for source in rest.split()[:-1]}
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert copied == {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
