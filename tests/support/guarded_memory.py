"""Memory that tells whether a kernel wrote all of what it was given, and nothing beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 8192
"""Elements before and after each tensor; a multiple of every alignment that a kernel counts on."""

FILL = 0x7F
"""Of each byte: no code of less than 8 bits, about 3e38 as fp32, NaN as fp16."""

_UNWRITTEN = ("aten::empty", "aten::new_empty", "aten::empty_like")


class GuardedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context whatever is allocated without values holds ``FILL``, and lies between guards.

    Raises:
        AssertionError: on leaving it, a guard has been overwritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._guarded(result) if func._schema.name in _UNWRITTEN and result.numel() else result

    def _guarded(self, given: Tensor) -> Tensor:
        whole = given.new_zeros(given.numel() + 2 * GUARD)
        whole.view(torch.uint8).fill_(FILL)
        self.held.append(whole)
        return whole.as_strided(given.shape, given.stride(), GUARD)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        if kind is None:
            for whole in self.held:
                for guard in (whole[:GUARD], whole[-GUARD:]):
                    assert bool((guard.view(torch.uint8) == FILL).all()), f"written beside a {whole.dtype} tensor"
