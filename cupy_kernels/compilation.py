"""From a ``.cu`` file and its constants to a kernel that torch tensors can be given to."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupy_kernels import specification

Compiled = Callable[[tuple[int, ...], int, Sequence[Any], int], None]
"""Launches: grid, threads a block, arguments as NumPy scalars, bytes of dynamic shared memory."""

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=true")
"""Every operation is rounded: the source says where it wants a fused one. CuPy has subnormal numbers flushed anyway."""

_MOST_BLOCKS = (2**31 // 1024, 65535)
"""Of the first axis, so that a thread's number fits into int32, and of the others."""

_FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_SHARED = ("SIGMOID_LIMIT", "SIGMOID_P0", "SIGMOID_P1", "SIGMOID_P2", "SIGMOID_Q1", "SIGMOID_Q2", "SCALE_OF_BOUND")


def source(file: str, constants: Mapping[str, int]) -> str:
    """One self-contained text: the constants, those of the specification, the file and what it includes."""
    defines = [f"#define {name} {int(value)}" for name, value in constants.items()]
    defines += [f"#define {name} {float(np.float32(getattr(specification, name)))!r}f" for name in _SHARED]
    return "\n".join([*defines, _text(file)])


def _text(file: str) -> str:
    return _INCLUDE.sub(lambda match: _text(match[1]), (_FOLDER / file).read_text())


def launch(
    file: str,
    constants: Mapping[str, int],
    grid: tuple[int, ...],
    threads: int,
    arguments: Sequence[Tensor | int | float | None],
    shared_bytes: int = 0,
) -> None:
    """Runs the kernel of ``file``, which bears its name, on torch's current stream.

    Args:
        file: of this folder, with its ending.
        constants: what the file's first lines ask for.
        grid: blocks.
        threads: of a block.
        arguments: the kernel's, in order: tensors by their address (None is a null pointer), int32, float32.
        shared_bytes: of dynamic shared memory.

    Raises:
        ValueError: a tensor is not contiguous in memory, or on another device than the rest, or more blocks or windows
            are asked for than a launch takes.
    """
    if grid[0] > _MOST_BLOCKS[0] or max(grid[1:], default=1) > _MOST_BLOCKS[1]:
        raise ValueError(f"{file} would need {grid} blocks, a launch takes {_MOST_BLOCKS}; give fewer images at a time")
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    _check(tensors)
    if 0 in grid:  # an empty batch
        return
    kernel = compiled(file, tuple(constants.items()), tensors[0].device)
    kernel(grid, threads, [_scalar(argument) for argument in arguments], shared_bytes)


def _check(tensors: Sequence[Tensor]) -> None:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"tensors on {device} and on {tensor.device} cannot meet in one kernel")
        dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        if not dense:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not contiguous")


def _scalar(argument: Tensor | int | float | None) -> Any:
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.int32(argument) if isinstance(argument, int) else np.float32(argument)


@functools.cache
def compiled(file: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> Compiled:
    """The kernel for one device, compiled when first asked for."""
    return compile_for_gpu(source(file, dict(constants)), file.removesuffix(".cu"), device)


def compile_for_gpu(text: str, entry: str, device: torch.device) -> Compiled:
    """Compiles by NVRTC through CuPy; launches on torch's current stream of ``device``."""
    if device.type != "cuda":
        raise ValueError(f"{entry} runs on a GPU, its tensors are on {device}")
    import cupy

    with cupy.cuda.Device(device.index):
        kernel = cupy.RawKernel(text, entry, options=OPTIONS)
        kernel.compile()
    granted = (48 << 10) - kernel.shared_size_bytes  # what a block gets without asking, less its static part

    def run(grid: tuple[int, ...], threads: int, arguments: Sequence[Any], shared_bytes: int) -> None:
        nonlocal granted
        stream = cupy.cuda.Stream.from_external(_TorchStream(torch.cuda.current_stream(device).cuda_stream))
        with cupy.cuda.Device(device.index), stream:
            if shared_bytes > granted:
                kernel.max_dynamic_shared_size_bytes = granted = shared_bytes
            kernel(grid, (threads,), tuple(arguments), shared_mem=shared_bytes)

    return run


class _TorchStream:
    """A stream of torch's by the protocol that CuPy asks for."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer
