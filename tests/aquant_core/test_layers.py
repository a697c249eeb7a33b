"""A quantized layer against plain convolutions of inputs quantized by an independent formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquant_core.config import BorderConfig
from aquant_core.layers import ActivationQuantizer, Dropping, QuantizedLayer
from aquant_core.quantizers import UniformGrid, WeightRounding, search_weight_grid

CHANNELS, BITS, SCALE = 4, 3, 0.23
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": [1, 1]},
    "stride": {"padding": [1, 1], "stride": [2, 2]},
    "dilation": {"padding": [2, 2], "dilation": [2, 2]},
    "groups": {"padding": [1, 1], "groups": 2},
    "depthwise": {"padding": [1, 1], "groups": CHANNELS},
    "depthwise_stride": {"padding": [1, 1], "stride": [2, 1], "groups": CHANNELS},
    "two_a_channel": {"padding": [1, 1], "groups": CHANNELS, "out": 2 * CHANNELS},
    "uneven": {"kernel": (3, 1), "padding": [1, 0], "stride": [1, 2]},
    "pointwise": {"kernel": (1, 1)},
}


def geometry(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A conv2d node's attributes and the shape of its weight."""
    changes = dict(GEOMETRIES[name])
    kernel, out = changes.pop("kernel", (3, 3)), changes.pop("out", CHANNELS)
    attributes = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1} | changes
    return attributes, (out, CHANNELS // attributes["groups"], *kernel)


def make_layer(name: str = "padded", zero_point: int = 0, bias: bool = True) -> tuple[QuantizedLayer, Tensor]:
    generator = torch.Generator().manual_seed(7)
    attributes, shape = geometry(name)
    weight = torch.randn(shape, generator=generator)
    layer = QuantizedLayer("conv2d", attributes, weight, torch.randn(shape[0], generator=generator) if bias else None)
    layer.quantize_activation(UniformGrid(torch.tensor(SCALE), torch.tensor(float(zero_point)), 2**BITS - 1), BITS)
    return layer, torch.randn(3, CHANNELS, 7, 8, generator=generator)


def nearest(x: Tensor, zero_point: int = 0, border: Tensor | float = 0.5) -> Tensor:
    codes = torch.clamp(torch.ceil(x / SCALE + zero_point - border), 0, 2**BITS - 1)
    return SCALE * (codes - zero_point)


def convolve(layer: QuantizedLayer, x: Tensor) -> Tensor:
    window = layer.window
    return F.conv2d(x, layer.float_weight, layer.bias, window.stride, window.padding, window.dilation, layer.groups)


def randomise(layer: QuantizedLayer, seed: int = 3, size: float = 0.6) -> None:
    assert layer.border is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        coefficients = layer.border.coefficients
        coefficients.copy_(size * torch.randn(coefficients.shape, generator=generator))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_unquantized_layer_is_the_convolution(name: str) -> None:
    layer, x = make_layer(name)
    layer.activation_scale = None
    assert torch.equal(layer(x), convolve(layer, x))


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("fusion", ["channel_mean", "none"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_border_of_zeros_is_rounding_to_nearest(name: str, fusion: Any, zero_point: int) -> None:
    layer, x = make_layer(name, zero_point)
    expected = convolve(layer, nearest(x, zero_point))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.add_border(BorderConfig(fusion=fusion))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["channel_mean", "none"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_border_against_unfold(name: str, fusion: Any) -> None:
    """Eq. 8 and Eq. 9 on F.unfold's columns; each group's product by its own matrix."""
    zero_point = 2
    layer, x = make_layer(name, zero_point)
    layer.add_border(BorderConfig(fusion=fusion))
    randomise(layer)
    assert layer.border is not None
    window, positions = layer.window, layer.window.positions
    how = {"dilation": window.dilation, "padding": window.padding, "stride": window.stride}
    columns = F.unfold(x, window.kernel_size, **how).reshape(len(x), CHANNELS, positions, -1)
    inside = F.unfold(torch.ones_like(x), window.kernel_size, **how).reshape(columns.shape)
    u = (columns / SCALE + zero_point).clamp(0, 2**BITS - 1) / (2**BITS - 1)
    b0, b1, b2 = (coefficient[None, :, :, None] for coefficient in layer.border.coefficients.detach())
    shift = torch.sigmoid(2.5 * (b2 * u * u + b1 * u + b0)) - 0.5
    if fusion == "channel_mean":
        shift = shift.mean(2, keepdim=True)
    quantized = nearest(columns, zero_point, 0.5 + shift) * inside
    per_group = CHANNELS // layer.groups
    weights = layer.float_weight.flatten(1).chunk(layer.groups)
    pieces = [
        weight @ quantized[:, index * per_group : (index + 1) * per_group].flatten(1, 2)
        for index, weight in enumerate(weights)
    ]
    assert layer.bias is not None
    expected = torch.cat(pieces, 1) + layer.bias[None, :, None]
    torch.testing.assert_close(layer(x).flatten(2), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(layer(x), convolve(layer, nearest(x, zero_point)), atol=1e-3)


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_channel_granularity_is_position_granularity_with_equal_coefficients(name: str, zero_point: int) -> None:
    by_channel, x = make_layer(name, zero_point)
    by_channel.add_border(BorderConfig(granularity="channel", fusion="none"))
    randomise(by_channel)
    by_position, _ = make_layer(name, zero_point)
    by_position.add_border(BorderConfig(fusion="none"))
    assert by_channel.border is not None
    assert by_position.border is not None
    with torch.no_grad():
        coefficients = by_position.border.coefficients
        coefficients.copy_(by_channel.border.coefficients.expand_as(coefficients))
    torch.testing.assert_close(by_channel(x), by_position(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 6, 6)])  # the last as behind a permutation
def test_linear(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    x = torch.randn(shape, generator=generator)
    layer = QuantizedLayer("linear", {}, weight, bias)
    assert torch.equal(layer(x), F.linear(x, weight, bias))
    layer.quantize_activation(UniformGrid(torch.tensor(SCALE), torch.tensor(3.0), 7), BITS)
    torch.testing.assert_close(layer(x), F.linear(nearest(x, 3), weight, bias), atol=1e-5, rtol=1e-5)
    layer.add_border(BorderConfig())
    torch.testing.assert_close(layer(x), F.linear(nearest(x, 3), weight, bias), atol=1e-5, rtol=1e-5)
    randomise(layer)
    assert layer.border is not None
    assert layer.border.coefficients.shape == (3, 6, 1)
    u = (x / SCALE + 3).clamp(0, 7) / 7
    b0, b1, b2 = layer.border.coefficients.detach()[:, :, 0]
    border = torch.sigmoid(2.5 * (b2 * u * u + b1 * u + b0))
    torch.testing.assert_close(layer(x), F.linear(nearest(x, 3, border), weight, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("b0", "expected"), [(0.0, [1, 1, 2]), (5.0, [0, 1, 1]), (-5.0, [1, 2, 2])])
def test_border_decides_up_or_down_by_hand(b0: float, expected: list[int]) -> None:
    # B is 1/2, almost 1 (everything goes down) and almost 0 (everything goes up), at t = 0.7, 1.2, 1.8.
    layer = QuantizedLayer("linear", {}, torch.eye(3), None)
    layer.quantize_activation(UniformGrid(torch.tensor(1.0), torch.tensor(0.0), 255), 8)
    layer.add_border(BorderConfig())
    assert layer.border is not None
    with torch.no_grad():
        layer.border.coefficients[0].fill_(b0)
    assert layer(torch.tensor([[0.7, 1.2, 1.8]])).tolist() == [expected]


@pytest.mark.parametrize("granularity", ["position", "channel"])
def test_at_the_schedules_start_the_input_is_clipped_and_not_rounded(granularity: Any) -> None:
    layer, x = make_layer(zero_point=2)
    fusion: Any = "channel_mean" if granularity == "position" else "none"
    layer.add_border(BorderConfig(granularity=granularity, fusion=fusion))
    randomise(layer)
    layer.rounding = 0.0
    clipped = SCALE * ((x / SCALE + 2).clamp(0, 7) - 2)
    torch.testing.assert_close(layer(x), convolve(layer, clipped), atol=1e-5, rtol=1e-5)


def test_quantized_weights_take_the_float_ones_place() -> None:
    layer, x = make_layer("groups")
    rounding = WeightRounding.nearest(layer.float_weight, search_weight_grid(layer.float_weight, 2))
    layer.weight = rounding
    layer.add_border(BorderConfig())
    window = layer.window
    expected = F.conv2d(nearest(x), rounding(), layer.bias, window.stride, window.padding, window.dilation, 2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["padded", "groups", "depthwise"])
def test_gradients_reach_everything_that_is_learned(name: str) -> None:
    layer, x = make_layer(name, zero_point=3)
    layer.weight = WeightRounding.nearest(layer.float_weight, search_weight_grid(layer.float_weight, 4))
    layer.weight.learn()
    layer.add_border(BorderConfig(alpha="learned"))
    randomise(layer)
    x.requires_grad_()
    layer(x).square().mean().backward()
    assert layer.border is not None
    learned = [x, layer.activation_scale, layer.weight.variable, *layer.border.tensors()]
    for tensor in learned:
        assert tensor is not None
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(("probability", "kept"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_dropping_mixes_element_by_element(probability: float, kept: float) -> None:
    dropping = Dropping(probability, torch.Generator().manual_seed(0))
    mixed = dropping(torch.zeros(100, 100), torch.ones(100, 100))
    assert set(mixed.unique().tolist()) <= {0.0, 1.0}
    assert float(mixed.mean()) == pytest.approx(kept, abs=0.02)
    again = Dropping(probability, torch.Generator().manual_seed(0))
    assert torch.equal(mixed, again(torch.zeros(100, 100), torch.ones(100, 100)))


def test_dropping_inside_a_layer_gives_float_inputs_back() -> None:
    layer, x = make_layer()
    layer.dropping = Dropping(1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), convolve(layer, x))


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (5, 6), (2, 3, 6), (0, 4, 5, 3), (0, 6)])
def test_a_value_is_quantized_whatever_its_shape(shape: tuple[int, ...], zero_point: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    part = ActivationQuantizer()
    assert part(x) is x
    part.quantize_activation(UniformGrid(torch.tensor(SCALE), torch.tensor(float(zero_point)), 2**BITS - 1), BITS)
    assert part.activation_bits == BITS
    torch.testing.assert_close(part(x).detach(), nearest(x, zero_point))
    part.dropping = Dropping(1.0, torch.Generator().manual_seed(0))
    assert torch.equal(part(x), x)
    part.dropping = Dropping(0.5, torch.Generator().manual_seed(0))
    mixed = part(x).detach()
    assert ((mixed == x) | torch.isclose(mixed, nearest(x, zero_point))).all()
    part.rounding = 0.0
    part.finish()
    torch.testing.assert_close(part(x).detach(), nearest(x, zero_point))


def test_a_values_step_gets_its_gradient() -> None:
    # s q with q = 1, 3 and the clipped 7: dx/ds = q - t inside (LSQ), q beyond.
    part = ActivationQuantizer()
    part.quantize_activation(UniformGrid(torch.tensor(0.5), torch.tensor(0.0), 7), 3)
    x = torch.tensor([[0.4], [1.6], [9.0]], requires_grad=True)
    part(x).sum().backward()
    assert part.activation_scale is not None
    assert part.activation_scale.grad is not None
    assert float(part.activation_scale.grad) == pytest.approx((1 - 0.8) + (3 - 3.2) + 7)
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 1, 0]


def test_projection_keeps_the_step_positive() -> None:
    layer, _ = make_layer()
    assert layer.activation_scale is not None
    with torch.no_grad():
        layer.activation_scale.fill_(-1.0)
    layer.project()
    assert float(layer.activation_scale.detach()) > 0


def test_finishing_ends_all_that_is_of_learning() -> None:
    layer, x = make_layer()
    layer.weight = WeightRounding.nearest(layer.float_weight, search_weight_grid(layer.float_weight, 4))
    layer.weight.learn()
    layer.add_border(BorderConfig())
    randomise(layer)
    layer.rounding, layer.dropping = 0.3, Dropping(0.5, torch.Generator().manual_seed(0))
    layer.finish()
    assert layer.weight.variable is None
    assert layer.border is not None
    assert torch.equal(layer.border.coefficients, layer.border.coefficients.half().float())
    assert layer.rounding == 1.0
    assert layer.dropping is None
    assert torch.equal(layer(x), layer(x))
