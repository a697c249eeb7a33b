"""Named errors say what was wrong and what to do, also in another process."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from aquant_core import errors
from aquant_core.errors import AQuantError, memory_is_full

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AQuantError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_to_another_process(kind: type[AQuantError]) -> None:
    error = pickle.loads(pickle.dumps(kind("The width is 9.", "Choose 2 to 8.")))
    assert type(error) is kind
    assert (error.detail, error.remedy, str(error)) == (
        "The width is 9.",
        "Choose 2 to 8.",
        "The width is 9. Choose 2 to 8.",
    )


def test_every_kind_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)


PEBI = 1 << 50


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(PEBI, dtype=torch.uint8),
        lambda: np.empty(PEBI, np.uint8),
        lambda: bytearray(PEBI),
        lambda: mmap.mmap(-1, PEBI),
    ],
)
def test_a_full_memory_is_told_by_whoever_meets_it(take: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, OSError, RuntimeError)) as caught:
        take()
    assert memory_is_full(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_do_not_tell_of_main_memory(error: Exception) -> None:
    assert not memory_is_full(error)
