"""GPU tests are skipped by name where there is none."""

from __future__ import annotations

import importlib.util

import pytest


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
