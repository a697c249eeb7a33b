"""Kernels without a GPU: CUDA C compiled as C++ by g++, run on the CPU over the memory of torch's CPU tensors.

What stands in for the device, and so is not tested here: PTX instructions (``rcp.approx``, f16 conversions and
comparisons, ``mma.sync``) have plain bodies; threads run one after another between barriers, so a missing barrier may
not show; limits of registers and shared memory do not bind.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
OPTIONS = (
    "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-attributes",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE",
)  # fmt: skip
_ENTRY = """
extern "C" void run(const unsigned* grid, const unsigned* block, void** arguments) {
  emulator::launch(%s, grid, block, arguments);
}
extern "C" void set_reciprocal_error(int sign) { emulator::reciprocal_error = sign; }
"""


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


@functools.cache
def _folder() -> Path:
    """Private, so that nothing but our own code is ever loaded from it."""
    return Path(tempfile.mkdtemp(prefix="cuda_on_cpu_"))


@functools.cache
def _header() -> Path:
    """The emulator, compiled once: nearly half of what a kernel's compilation would take."""
    path = _folder() / "cuda_on_cpu.h"
    _compile(["-x", "c++-header", str(HERE / path.name), "-o", f"{path}.gch"], "", "its header")
    return path


def _compile(arguments: Sequence[str], text: str, name: str) -> None:
    done = subprocess.run(["g++", *OPTIONS, *arguments], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ does not take {name}:\n{done.stderr[:4000]}")


@functools.cache
def library(text: str, entry: str) -> ctypes.CDLL:
    """The compiled kernel."""
    path = _folder() / f"{hashlib.sha256((entry + text).encode()).hexdigest()[:16]}.so"
    _compile(["-include", str(_header()), "-x", "c++", "-", "-o", str(path)], text + _ENTRY % entry, entry)
    return ctypes.CDLL(str(path))


def compile_for_cpu(text: str, entry: str, reciprocal_error: int = 0) -> Any:
    """A launcher as ``cupy_kernels.compilation.Compiled``."""
    loaded = library(text, entry)

    def run(grid: tuple[int, ...], threads: int, arguments: Sequence[np.generic], shared_bytes: int) -> None:
        assert shared_bytes <= 256 << 10
        loaded.set_reciprocal_error(reciprocal_error)
        blocks = (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3])
        held = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*[value.ctypes.data for value in held])
        loaded.run(blocks, (ctypes.c_uint * 3)(threads, 1, 1), pointers)

    return run
