"""Thresholds give the code of every fp32 number, those included on which rounding falls back behind a threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquant_core.onnx_thresholds import Thresholds, thresholds_of
from cupy_kernels.reference import codes
from cupy_kernels.specification import BorderSpecification, Bound, Window

NEAR = 200
"""Neighbours on either side of a threshold that are looked at."""


def counted(x: Tensor, thresholds: Thresholds) -> Tensor:
    """Codes of (n, C) numbers by the thresholds, as the file has them."""
    values = x.numpy()
    count = sum((values > level).astype(np.int64) for level in thresholds.levels)
    count = count + sum(((values > first) ^ (values > last)).astype(np.int64) for first, last in thresholds.exceptions)
    return torch.from_numpy(np.asarray(count))


def direct(x: Tensor, border: np.ndarray | None, scale: np.float32, spec: BorderSpecification) -> Tensor:
    """Codes of (n, C) numbers by the specification."""
    coefficients = None if border is None else torch.from_numpy(border)
    maps = x[:, :, None, None]
    return codes(maps, torch.tensor(scale), coefficients, None, Window(), spec)[:, :, 0].to(torch.int64)


def numbers_near(thresholds: Thresholds, channels: int, neighbours: int = NEAR) -> Tensor:
    """(n, C): all fp32 numbers next to thresholds, and others over a wide range."""
    found = [np.broadcast_to(level, channels) for level in thresholds.levels]
    found += [part for pair in thresholds.exceptions for part in pair]
    near = []
    for values in found:
        up = down = np.where(np.isinf(values), np.float32(1), values).astype(np.float32)
        for _ in range(neighbours):
            near += [up, down]
            up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(-np.inf))
    wide = torch.randn(500, channels, generator=torch.Generator().manual_seed(0)) * 3
    return torch.cat([torch.from_numpy(np.stack(near)), wide, 1e-3 * wide, 1e3 * wide, torch.zeros(1, channels)])


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 3),
    bound=st.sampled_from(["steep", "stretched", "clip"]),
    zero_point=st.integers(0, 3),
    scale=st.floats(2**-10, 8, width=32),
    spread=st.sampled_from([0.05, 0.3, 1.0]),
    terms=st.sampled_from([2, 3]),
    seed=st.integers(0, 2**31),
)
def test_every_number_has_its_code(
    bits: int, bound: Bound, zero_point: int, scale: float, spread: float, terms: int, seed: int
) -> None:
    spec = BorderSpecification(2**bits - 1, zero_point, bound, fused=False)
    border = np.random.default_rng(seed).normal(0, spread, (terms, 24, 1)).astype(np.float16).astype(np.float32)
    thresholds = thresholds_of(border, np.float32(scale), spec)
    assume(thresholds is not None)  # B rises too steeply somewhere, or too near 0
    assert thresholds is not None
    x = numbers_near(thresholds, 24)
    assert torch.equal(counted(x, thresholds), direct(x, border, np.float32(scale), spec))


def test_where_rounding_falls_back_there_are_exceptions() -> None:
    spec = BorderSpecification(3, 0, "steep", fused=False)
    border = np.random.default_rng(0).normal(0, 0.3, (3, 4096, 1)).astype(np.float16).astype(np.float32)
    scale = np.float32(0.0837)
    thresholds = thresholds_of(border, scale, spec)
    assert thresholds is not None
    assert thresholds.exceptions
    x = numbers_near(thresholds, 4096, neighbours=8)
    expected = direct(x, border, scale, spec)
    assert torch.equal(counted(x, thresholds), expected)
    assert not torch.equal(counted(x, Thresholds(thresholds.levels, [])), expected)


@pytest.mark.parametrize("zero_point", [0, 1, 3])
def test_nearest_rounds_halves_down(zero_point: int) -> None:
    spec = BorderSpecification(3, zero_point, fused=False)
    thresholds = thresholds_of(None, np.float32(0.5), spec)
    assert thresholds is not None
    assert thresholds.exceptions == []
    expected = [0.25 - 0.5 * zero_point + 0.5 * level for level in range(3)]
    np.testing.assert_allclose(thresholds.levels[:, 0], expected, rtol=1e-6)  # x / s + z may be rounded onto a half
    x = numbers_near(thresholds, 1)
    assert torch.equal(counted(x, thresholds), direct(x, None, np.float32(0.5), spec))


@pytest.mark.parametrize(
    ("bits", "coefficients", "why"),
    [(4, [0.1, 0, 0], "more levels than pay"), (2, [0, 20, 0], "rises too steeply"), (2, [-9, 9, 0], "too near 0")],
)
def test_without_thresholds_there_is_none(bits: int, coefficients: list[float], why: str) -> None:
    border = np.array(coefficients, np.float32).reshape(3, 1, 1)
    bound: Bound = "clip" if why == "too near 0" else "steep"
    assert thresholds_of(border, np.float32(1), BorderSpecification(2**bits - 1, 0, bound, fused=False)) is None
