"""The one door: what it refuses, who computes, and that gradients reach every input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cupy_kernels import cpu_loops, reference
from cupy_kernels.ops import border_codes, border_columns, implementation, reference_only
from cupy_kernels.specification import BorderSpecification, Window

WINDOW = Window((3, 3), padding=(1, 1))


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "x": torch.rand(1, 2, 5, 5), "scale": torch.tensor(0.3), "border": torch.zeros(3, 2, 9),
        "alpha": torch.ones(2, 9), "window": WINDOW, "spec": BorderSpecification(3), "rounding": 1.0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.rand(2, 5, 5)}, r"x must be .* not torch.float32 of shape \(2, 5, 5\)"),
        ({"x": torch.ones(1, 2, 5, 5, dtype=torch.int64)}, r"x must be a floating point .* torch.int64"),
        ({"scale": torch.rand(2)}, r"scale must be a scalar tensor, not of shape \(2,\)"),
        ({"scale": torch.rand(1)}, r"scale must be a scalar tensor, not of shape \(1,\)"),
        ({"border": torch.zeros(3, 2, 4)}, r"border must be \(2 or 3, 2, 9\), not \(3, 2, 4\)"),
        ({"border": torch.zeros(3, 1, 9)}, r"border must be .* not \(3, 1, 9\)"),
        ({"border": torch.zeros(1, 2, 9)}, r"border must be .* not \(1, 2, 9\)"),
        ({"border": torch.zeros(4, 2, 9)}, r"border must be .* not \(4, 2, 9\)"),
        ({"border": torch.tensor(0.0)}, r"border must be .* not \(\)"),
        ({"alpha": torch.ones(9, 2)}, r"alpha must be \(2, 9\).* got \(9, 2\)"),
        ({"border": None}, "alpha must be .* beside a fused border"),
        ({"spec": BorderSpecification(3, fused=False)}, "alpha must be .* beside a fused border"),
        (
            {"window": Window((7, 7)), "border": None, "alpha": None},
            r"window of \(7, 7\).*does not fit.*\(5, 5\)",
        ),
    ],
)
def test_refusals_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        border_columns(**arguments(**changes))


def test_who_computes() -> None:
    single, double = torch.rand(1), torch.rand(1, dtype=torch.float64)
    assert implementation(single) is cpu_loops
    assert implementation(double) is reference
    with reference_only():
        assert implementation(single) is reference
        with reference_only():
            pass
        assert implementation(single) is reference
    assert implementation(single) is cpu_loops


def test_reference_only_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert implementation(torch.rand(1)) is cpu_loops


def test_gradients_reach_every_input_by_both_implementations() -> None:
    g = torch.Generator().manual_seed(0)
    x, border = torch.randn(2, 2, 5, 5, generator=g), torch.randn(3, 2, 9, generator=g) * 0.2
    grads = []
    for forced in (True, False):
        leaves = [value.clone().requires_grad_() for value in (x, torch.tensor(0.3), border, torch.ones(2, 9))]
        if forced:
            with reference_only():
                border_columns(*leaves, WINDOW, BorderSpecification(3)).square().sum().backward()
        else:
            border_columns(*leaves, WINDOW, BorderSpecification(3)).square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
        grads.append([leaf.grad for leaf in leaves])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_codes_stand_behind_the_columns() -> None:
    given = arguments(x=torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)))
    columns = border_columns(**given)
    given.pop("rounding")
    assert torch.equal(border_codes(**given).float() * given["scale"], columns)
