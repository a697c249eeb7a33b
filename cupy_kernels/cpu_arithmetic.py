"""What all fused loops share: how they are compiled, on how many threads they run, how they sum and round."""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba import njit

# error_model="numpy": without Python's check for a zero divisor the loops vectorise.
loop: Any = partial(njit, error_model="numpy")
inline: Any = partial(njit, error_model="numpy", inline="always")

# float32: a Python float would lift the whole expression to float64.
_ZERO = np.float32(0)
_MAGIC = np.float32(1.5 * 2**23)


def _most_threads() -> int:
    """Numba's threads. Starting them sets OpenMP's number, which is torch's, too, to all cores: torch gets its own
    back, or what it computes would depend on whether a loop has run before.
    """
    of_torch = torch.get_num_threads()
    most = numba.get_num_threads()
    torch.set_num_threads(of_torch)
    return int(most)


_MOST_THREADS = _most_threads()


def use_torchs_threads() -> None:
    """The loops run on as many threads as torch, so far as there are."""
    numba.set_num_threads(min(torch.get_num_threads(), _MOST_THREADS))


@inline()
def round_to_even(value):
    """The nearest integer to a value well below 2^22, by an addition; a library function would be called each time."""
    return (value + _MAGIC) - _MAGIC


@loop(fastmath={"reassoc", "nsz"})
def total(values):
    """A sum whose order is the compiler's: vectorised, the same on one kind of machine."""
    result = _ZERO
    for i in range(values.shape[0]):
        result += values[i]
    return result


@loop(fastmath={"reassoc", "nsz"})
def total_of_products(a, b):
    """A dot product, summed as ``total`` does."""
    result = _ZERO
    for i in range(a.shape[0]):
        result += a[i] * b[i]
    return result
