"""Kernels without a GPU: what would be compiled for one is compiled for the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_cpu
import pytest

from cupy_kernels import compilation


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    """Kernels run on CPU tensors for the rest of the module; each is compiled once in a process."""
    if not cuda_on_cpu.available():
        pytest.skip("no g++, by which kernels are compiled for the CPU")
    compilation.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "compile_for_gpu", lambda text, entry, _: cuda_on_cpu.compile_for_cpu(text, entry))
        yield
    compilation.compiled.cache_clear()
