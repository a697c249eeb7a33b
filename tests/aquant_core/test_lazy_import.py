"""The service reads the configuration without paying for torch; the public names are there all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

import aquant_core

HEAVY = ("torch", "torchvision", "numpy", "numba", "onnx", "onnxruntime", "safetensors", "cupy")


@pytest.mark.parametrize(
    "module", ["", ".config", ".cli", ".errors", ".progress", ".methods", ".report.page", ".report.commands"]
)
def test_light_modules_load_no_torch(module: str) -> None:
    program = (
        f"import sys, aquant_core{module}; "
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", aquant_core.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(aquant_core, name)
    assert value.__name__ == name
    assert value.__module__.startswith("aquant_core.")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dequantize'"):
        aquant_core.dequantize  # noqa: B018 - the access is the test
