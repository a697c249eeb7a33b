"""The search for steps and zero-points, and learned weight rounding, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquant_core.quantizers import (
    SEARCH_NORM,
    UniformGrid,
    WeightRounding,
    largest_code,
    rectified_sigmoid,
    search_activation_grid,
    search_weight_grid,
)

BITS = range(2, 9)


def on_grid(values: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    return (torch.clamp(torch.round(values / scale) + zero_point, 0, levels) - zero_point) * scale


def error(values: Tensor, grid: UniformGrid) -> Tensor:
    """|x - x_hat|^2.4 summed over the last dimension, in float64."""
    values = values.double()
    approximate = on_grid(values, grid.scale.double(), grid.zero_point.double(), grid.levels)
    return (approximate - values).abs().pow(SEARCH_NORM).sum(-1)


def min_max_grid(low: Tensor, high: Tensor, bits: int) -> UniformGrid:
    levels = largest_code(bits)
    scale = ((high - low) / levels).clamp(min=1e-8)
    return UniformGrid(scale, torch.round(-low / scale).clamp(0, levels), levels)


@pytest.mark.parametrize(("bits", "code"), [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_largest_code(bits: int, code: int) -> None:
    assert largest_code(bits) == code


def test_two_bit_weights_that_lie_on_a_grid_are_found_exactly() -> None:
    # s (q - z) for q = 0..3 with (s, z) = (1/2, 1), (1, 0) and (1/4, 3), one a channel.
    weight = torch.tensor([[-0.5, 0.0, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0], [-0.75, -0.5, -0.25, 0.0]])
    grid = search_weight_grid(weight, 2)
    torch.testing.assert_close(grid.scale, torch.tensor([[0.5], [1.0], [0.25]]))
    assert grid.zero_point.tolist() == [[1.0], [0.0], [3.0]]
    rounding = WeightRounding.nearest(weight, grid)
    assert rounding.codes.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    torch.testing.assert_close(rounding(), weight)


def test_rounding_to_nearest_by_hand() -> None:
    # s = 1/2, z = 1: W / s = -18, -0.6, 0.4, 0.52, 18 -> codes -17, 0, 1, 2, 19, then clipped to 0..3.
    weight = torch.tensor([[-9.0, -0.3, 0.2, 0.26, 9.0]])
    rounding = WeightRounding.nearest(weight, UniformGrid(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3))
    assert rounding.codes.tolist() == [[0.0, 0.0, 1.0, 2.0, 3.0]]
    assert rounding().tolist() == [[-0.5, -0.5, 0.0, 0.5, 1.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(BITS), st.sampled_from([0.01, 1.0, 50.0]), st.booleans())
def test_weight_search_is_never_worse_than_the_full_range(seed: int, bits: int, size: float, heavy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, 3, 3, generator=generator) * size
    if heavy:
        weight = weight**3
    flat = weight.flatten(1)
    low, high = flat.amin(1, keepdim=True).clamp(max=0), flat.amax(1, keepdim=True).clamp(min=0)
    found = search_weight_grid(weight, bits)
    assert found.scale.shape == found.zero_point.shape == (3, 1)
    assert (found.scale > 0).all()
    assert ((found.zero_point >= 0) & (found.zero_point <= found.levels)).all()
    full = error(flat, min_max_grid(low, high, bits))
    assert (error(flat, found) <= full * (1 + 1e-3) + 1e-12).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["relu", "normal", "heavy"])
def test_activation_search_is_not_worse_than_the_full_range(bits: int, kind: str) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(bits))
    values = {"relu": values.relu(), "normal": values, "heavy": values**3}[kind]
    found = search_activation_grid(values, bits)
    assert found.scale.shape == found.zero_point.shape == ()
    full = min_max_grid(values.min().clamp(max=0), values.max(), bits)
    assert float(error(values, found)) <= float(error(values, full)) * 1.02
    assert 0 <= float(found.zero_point) <= found.levels
    if kind == "relu":
        assert float(found.zero_point) == 0
    if bits == 2:  # four codes for a bell: the tails are given up
        assert float(found.scale) < 0.9 * float(full.scale)


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_is_zero_where_nothing_is_negative(bits: int) -> None:
    values = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    assert float(search_activation_grid(values, bits).zero_point) == 0


def test_symmetric_values_get_a_central_zero_point() -> None:
    values = torch.linspace(-1, 1, 10_001)
    assert float(search_activation_grid(values, 8).zero_point) == pytest.approx(127.5, abs=1.5)
    assert float(search_activation_grid(values, 2).zero_point) in (1.0, 2.0)


def test_constant_zero_needs_no_special_case() -> None:
    for grid in (search_activation_grid(torch.zeros(100), 4), search_weight_grid(torch.zeros(2, 9), 4)):
        assert (grid.scale > 0).all()
        assert torch.isfinite(grid.scale).all()
    rounding = WeightRounding.nearest(torch.zeros(2, 9), search_weight_grid(torch.zeros(2, 9), 4))
    assert rounding().abs().max() == 0


def test_one_outlier_does_not_take_the_grid() -> None:
    values = torch.cat([torch.rand(50_000, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0])])
    assert float(search_activation_grid(values, 4).scale) < 2.0 / 15


def test_rectified_sigmoid_golden_numbers() -> None:
    # 1.2 sigmoid(1) - 0.1 = 1.2 x 0.731058579 - 0.1 = 0.777270294
    values = rectified_sigmoid(torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.222729706, 0.5, 0.777270294, 1.0]))


def learned_rounding(bits: int = 3, seed: int = 0) -> tuple[Tensor, WeightRounding]:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    low, high = weight.flatten(1).amin(1, keepdim=True), weight.flatten(1).amax(1, keepdim=True)
    levels = largest_code(bits)
    scale = (high - low) / (levels - 2)  # a code is free at either end, so nothing is clipped
    rounding = WeightRounding.nearest(weight, UniformGrid(scale, torch.round(-low / scale) + 1, levels))
    rounding.learn()
    return weight, rounding


def test_learning_starts_at_the_float_weight() -> None:
    weight, rounding = learned_rounding()
    torch.testing.assert_close(rounding(), weight, atol=1e-5, rtol=1e-5)


def test_hardening_at_once_is_rounding_to_nearest() -> None:
    _, rounding = learned_rounding()
    nearest = rounding.codes.clone()
    rounding.harden()
    assert rounding.variable is None
    assert torch.equal(rounding.codes, nearest)
    rounding.harden()
    assert torch.equal(rounding.codes, nearest)


def test_hardening_follows_the_variable() -> None:
    # W / s = 1.3 and z = 1: up is code 3, down is code 2; 3.3 would be code 5 and is clipped to 3.
    grid = UniformGrid(torch.tensor([[1.0]]), torch.tensor([[1.0]]), 3)
    rounding = WeightRounding.nearest(torch.tensor([[1.3, 1.3, 1.3, 3.3, -1.3]]), grid)
    rounding.learn()
    assert rounding.variable is not None
    with torch.no_grad():
        rounding.variable.copy_(torch.tensor([[2.0, -2.0, 0.0, 2.0, -2.0]]))
    rounding.harden()
    assert rounding.codes.tolist() == [[3.0, 2.0, 3.0, 3.0, 0.0]]
    assert rounding().tolist() == [[2.0, 1.0, 2.0, 2.0, -1.0]]


def test_gradient_reaches_the_variable_but_not_through_the_clip() -> None:
    grid = UniformGrid(torch.tensor([[2.0]]), torch.tensor([[0.0]]), 3)
    rounding = WeightRounding.nearest(torch.tensor([[2.5, 20.0]]), grid)
    rounding.learn()
    assert rounding.variable is not None
    rounding().sum().backward()
    # dW'/dV = s (zeta - gamma) sigma' with h = 0.25: sigma = 0.35 / 1.2.
    sigma = 0.35 / 1.2
    expected = torch.tensor([[2.0 * 1.2 * sigma * (1 - sigma), 0.0]])
    torch.testing.assert_close(rounding.variable.grad, expected)


@pytest.mark.parametrize("beta", [2.0, 16.0])
def test_regulariser_golden_number(beta: float) -> None:
    grid = UniformGrid(torch.tensor([[1.0]]), torch.tensor([[0.0]]), 3)
    rounding = WeightRounding.nearest(torch.tensor([[0.5, 0.5, 0.5]]), grid)
    rounding.learn()
    assert rounding.variable is not None
    with torch.no_grad():
        rounding.variable.copy_(torch.tensor([[0.0, 10.0, 1.0]]))
    # h = 0.5, 1, 0.777270294: the terms are 1, 0 and 1 - 0.554540588^beta.
    expected = 1 + 0 + 1 - math.pow(0.554540588, beta)
    assert float(rounding.regulariser(beta).detach()) == pytest.approx(expected, rel=1e-5)


def test_codes_without_fractions_cannot_be_learned() -> None:
    grid = UniformGrid(torch.tensor([[1.0]]), torch.tensor([[0.0]]), 3)
    rounding = WeightRounding(torch.tensor([[1.0]]), grid, torch.Size((1, 1)))
    with pytest.raises(AssertionError, match="no fractions"):
        rounding.learn()
