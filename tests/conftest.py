"""What all tests share: GPU tests are skipped by name where there is none; databases and stores to choose from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import servers
from hypothesis import settings
from servers import Storage

if TYPE_CHECKING:
    from playwright.sync_api import Browser

settings.register_profile("patient", settings.default, deadline=None)  # a busy machine is not a slow law
settings.load_profile("patient")
settings.register_profile("long", max_examples=5_000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, help="folder for the pictures that tests/e2e/test_page.py makes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    missing = [
        name
        for name, found in (("a GPU", torch.cuda.is_available()), ("CuPy", importlib.util.find_spec("cupy")))
        if not found
    ]
    if missing:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[servers.PostgreSQL]:
    with servers.postgresql() as server:
        if isinstance(server, str):
            pytest.skip(server)
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[servers.S3]:
    with servers.s3() as server:
        if isinstance(server, str):
            pytest.skip(server)
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    import browser

    with browser.chromium() as found:
        if isinstance(found, str):
            pytest.skip(found)
        yield found


@pytest.fixture(params=["sqlite-folder", "postgresql-s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """A database and a store, both empty; a test that wants other pairs names them (``indirect``)."""
    database, store = request.param.split("-")
    artifacts_url = None
    if store == "s3":
        server = request.getfixturevalue("s3")
        artifacts_url = server.url()
        for name, value in server.environment().items():
            request.getfixturevalue("monkeypatch").setenv(name, value)
    database_url = request.getfixturevalue("postgresql").empty() if database == "postgresql" else None
    return Storage(database_url, artifacts_url)
