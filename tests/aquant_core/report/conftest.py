"""One real report for all tests of its page."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reports


@pytest.fixture(scope="session")
def _finished() -> dict[str, Any]:
    return reports.run(compare=["qdrop"])


@pytest.fixture
def report(_finished: dict[str, Any]) -> dict[str, Any]:
    """Of AQuant beside QDrop, with labels; to be changed at will."""
    return copy.deepcopy(_finished)
