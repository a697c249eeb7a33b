"""Packed layers: the zero-points' identity, the layouts, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from border_cases import LAYERS, PLACES, layer_problem, tensors_of
from torch import Tensor

from cupy_kernels import packing
from cupy_kernels.packing import PackedLayer, Route, offset_of, pack, route_of
from cupy_kernels.specification import BorderSpecification, Window
from cupy_kernels.thresholds import derive

KERNELS: tuple[Route, ...] = ("columns", "implicit", "depthwise")


def packed(
    route: Route, codes: Tensor, zero_points: Tensor, weight_levels: int = 15, levels: int = 15, zero_point: int = 0,
    groups: int = 1, **changes: Any,
) -> PackedLayer:  # fmt: skip
    """A layer without a border; weights' codes and zero-points matter."""
    spec = BorderSpecification(levels, zero_point, fused=False)
    given = {
        "weight_scale": torch.ones(len(codes)), "bias": None, "scale": torch.tensor(0.5), "border": None,
        "alpha": None, "window": Window((codes.shape[2], codes.shape[3])), "spec": spec, "dtype": torch.float32,
    } | changes  # fmt: skip
    return pack(route, codes=codes, weight_zero_point=zero_points, weight_levels=weight_levels, groups=groups, **given)


def random_codes(shape: tuple[int, ...], levels: int, seed: int = 0) -> Tensor:
    return torch.randint(0, levels + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_the_identity_of_sums(weight_bits: int, bits: int) -> None:
    """sum (q - z)(w_q - z_w) = sum a w + constant + correction sum a, all of it in int8 and int32."""
    levels, weight_levels = 2**bits - 1, 2**weight_bits - 1
    slots = (6, 2, 3)
    for zero_point in {0, levels // 3, levels}:
        w = random_codes((5, *slots), weight_levels, zero_point)
        w[0], w[1] = 0, weight_levels
        z_w = torch.tensor([weight_levels, 0, weight_levels // 2, 1, weight_levels]).float()
        q = random_codes((20, *slots), levels, 1 + zero_point)
        q[0], q[1] = 0, levels
        layer = packed("columns", w, z_w, weight_levels, levels, zero_point)
        a, stored = q.long().flatten(1) - layer.offset, layer.weight[0, :5, :36].long()
        assert -128 <= int(a.min()) <= int(a.max()) <= 127
        wanted = (q - zero_point).double().flatten(1) @ (w - z_w.view(-1, 1, 1, 1)).double().flatten(1).t()
        found = a @ stored.t() + layer.constant
        if layer.correction is not None:
            found += a.sum(1, keepdim=True) * layer.correction
        assert torch.equal(found.double(), wanted)
        assert (layer.correction is None) == (weight_bits < 8)
        kept = tensors_of(layer)
        assert {kept[name].dtype for name in ("constant", "correction") if name in kept} == {torch.int32}


@pytest.mark.parametrize("levels", [1, 3, 7, 15, 31, 63, 127, 255])
def test_offsets_make_codes_fit_into_int8(levels: int) -> None:
    for zero_point in range(levels + 1):
        offset = offset_of(levels, zero_point)
        assert isinstance(offset, int)
        assert -128 <= 0 - offset <= levels - offset <= 127
        assert levels == 255 or offset == zero_point
    zero_points = torch.arange(levels + 1)
    of_each = offset_of(levels, zero_points)
    assert isinstance(of_each, Tensor)
    assert of_each.tolist() == [offset_of(levels, int(zero_point)) for zero_point in zero_points]


@pytest.mark.parametrize("route", ["reference", *KERNELS])
def test_sums_beyond_int32_are_refused(route: Route) -> None:
    largest = (2**31 - 1) // 255**2  # 33025 slots of 255 times 255
    groups = 1
    for slots in (largest, largest + 1):
        codes = torch.zeros(1, 1, 1, slots) if route == "depthwise" else torch.zeros(1, slots, 1, 1)
        if slots == largest:
            packed(route, codes, torch.zeros(1), 255, 255, 0, groups)
            continue
        with pytest.raises(ValueError, match="33026 products of codes up to 255 and 255 do not fit into int32"):
            packed(route, codes, torch.zeros(1), 255, 255, 0, groups)


@pytest.mark.parametrize(("outputs", "channels", "groups"), [(8, 32, 1), (20, 40, 1), (24, 24, 3), (2, 200, 2)])
def test_fragments_by_a_loop(outputs: int, channels: int, groups: int) -> None:
    """Lane 4 n + t holds, of output n of 8, channels 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3 of 32."""
    inputs, shape = channels // groups, (2, 3)
    w = random_codes((outputs, inputs, *shape), 15)
    layer = packed("implicit", w, torch.full((outputs,), 7.0), groups=groups)
    chunks, tiles, each = -(-inputs // 32), -(-(outputs // groups) // 8), outputs // groups
    assert layer.weight.shape == (groups, chunks, 6, tiles, 32, 8)
    wanted = torch.zeros_like(layer.weight)
    for group, output, channel, position in itertools.product(range(groups), range(each), range(inputs), range(6)):
        chunk, depth = divmod(channel, 32)
        half, quarter = divmod(depth, 16)
        lane, byte = output % 8 * 4 + quarter // 4, half * 4 + quarter % 4
        value = w[group * each + output, channel, position // 3, position % 3] - 7
        wanted[group, chunk, position, output // 8, lane, byte] = value
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("weight_levels", [15, 255])
def test_the_matrix_of_columns_by_a_loop(weight_levels: int) -> None:
    """Padded to 16 both ways; where there is a correction, the row after the weights' sums the codes."""
    w = random_codes((12, 3, 2, 2), weight_levels)
    layer = packed("columns", w, torch.full((12,), 3.0), weight_levels, groups=2)
    offset = 128 if weight_levels == 255 else 3
    wanted = torch.zeros(2, 16, 16, dtype=torch.int8)
    for output in range(12):
        wanted[output // 6, output % 6, :12] = (w[output].flatten() - offset).to(torch.int8)
    if weight_levels == 255:
        wanted[:, 6, :12] = 1
    rows = 7 if weight_levels == 255 else 6
    assert torch.equal(layer.weight[:, :rows, :12], wanted[:, :rows, :12])
    assert layer.weight.shape == wanted.shape
    assert not layer.weight[:, rows:].any()
    assert not layer.weight[:, : rows - 1, 12:].any()


def test_where_the_row_of_ones_needs_a_padding_of_its_own() -> None:
    layer = packed("columns", random_codes((16, 3, 1, 1), 255), torch.zeros(16), 255)
    assert layer.weight.shape == (1, 32, 16)
    assert layer.weight[0, 16, :3].tolist() == [1, 1, 1]


def test_the_taps_of_a_depthwise_layer() -> None:
    w = random_codes((5, 1, 2, 3), 15)
    layer = packed("depthwise", w, torch.arange(5.0), groups=5)
    assert torch.equal(layer.weight, (w.flatten(1) - torch.arange(5.0)[:, None]).t().to(torch.int8))


def test_the_reference_s_weight_is_centred() -> None:
    w = random_codes((5, 3, 2, 3), 255)
    layer = packed("reference", w, torch.arange(5.0), 255)
    assert torch.equal(layer.weight, (w - torch.arange(5.0).view(-1, 1, 1, 1)).to(torch.int16))


@pytest.mark.parametrize("route", KERNELS)
def test_parameters_of_channels_lie_by_fours(route: Route) -> None:
    """(K, C / 4, rows, 4): a thread takes four channels' rows one after another."""
    g = torch.Generator().manual_seed(0)
    channels = 6
    border, alpha = torch.randn(3, channels, 4, generator=g), torch.rand(channels, 4, generator=g)
    groups = channels if route == "depthwise" else 1
    w = random_codes((channels, channels // groups, 2, 2), 15)

    def by_fours(values: Tensor) -> Tensor:  # (rows, C, K)
        wanted = torch.zeros(4, 2, len(values), 4, dtype=values.dtype)
        for row, channel, position in itertools.product(range(len(values)), range(channels), range(4)):
            wanted[position, channel // 4, row, channel % 4] = values[row, channel, position]
        return wanted

    spec = BorderSpecification(15, 2)
    layer = packed(route, w, torch.zeros(channels), groups=groups, border=border, alpha=alpha, spec=spec)
    assert layer.thresholds is None
    assert layer.border is not None
    assert layer.alpha is not None
    assert torch.equal(layer.border, by_fours(border))
    assert torch.equal(layer.alpha, alpha.t())
    spec = BorderSpecification(15, 2, fused=False)
    changes: dict[str, Any] = {"border": border * 0.3, "spec": spec, "dtype": torch.float16}
    layer = packed(route, w, torch.zeros(channels), groups=groups, **changes)
    wanted = derive(border * 0.3, torch.tensor(0.5), spec, torch.float16)  # (K, Q, C)
    assert layer.thresholds is not None
    assert torch.equal(layer.thresholds, by_fours(wanted.permute(1, 2, 0)))
    of_all = packed(route, w, torch.zeros(channels), groups=groups, **changes | {"border": None})
    assert of_all.thresholds is not None
    assert of_all.thresholds.shape == (1, 1, 15, 4)
    halves = 0.5 * (torch.arange(15) + 0.5 - 2)
    assert torch.equal(of_all.thresholds, halves[:, None].expand(-1, 4)[None, None].half())


def test_thresholds_are_for_half_precision_and_kernels_and_the_layer_says_why_not() -> None:
    w, zeros = random_codes((4, 4, 1, 1), 15), torch.zeros(4)
    border, steep = torch.zeros(2, 4, 1), torch.zeros(2, 4, 1)
    steep[1, 3] = 15 / 0.625
    for route, dtype, given, why in (
        ("columns", torch.float16, border, None),
        ("columns", torch.float16, None, None),
        ("columns", torch.float32, border, "thresholds equal evaluation over fp16 inputs alone"),
        ("reference", torch.float16, border, "plain torch evaluates borders"),
        ("columns", torch.float16, steep, "the border of channel 3 at position 0 may rise with dB/dt = 1, 0.99 is the "
         "most (1 of 4 like it)"),
    ):  # fmt: skip
        layer = packed(route, w, zeros, border=given, dtype=dtype)  # type: ignore[arg-type]
        assert layer.evaluated_because == why
        assert (layer.thresholds is None) == (why is not None)
        assert layer.to(torch.device("cpu")).evaluated_because == why


def test_scales_and_biases() -> None:
    w, zeros = random_codes((4, 4, 1, 1), 15), torch.zeros(4)
    scales, bias = torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.arange(4.0, dtype=torch.float64)
    layer = packed("columns", w, zeros, weight_scale=scales, bias=bias)
    assert layer.multiplier.tolist() == [0.25, 0.5, 1.0, 1.5]
    assert (layer.bias.tolist(), layer.bias.dtype) == ([0.0, 1.0, 2.0, 3.0], torch.float32)
    assert packed("columns", w, zeros).bias.tolist() == [0.0] * 4
    assert layer.out_channels == 4


@pytest.mark.parametrize(
    ("shape", "groups", "route"),
    [
        ((32, 1, 3, 3), 32, "depthwise"),
        ((64, 1, 3, 3), 32, "columns"),  # two outputs a channel
        ((1, 1, 3, 3), 1, "depthwise"),
        ((64, 3, 7, 7), 1, "columns"),
        ((64, 16, 3, 3), 1, "implicit"),
        ((64, 12, 3, 3), 1, "columns"),
        ((64, 18, 3, 3), 1, "columns"),  # not in fours
        ((64, 20, 1, 1), 8, "implicit"),
        ((1000, 512, 1, 1), 1, "implicit"),
    ],
)
def test_the_route_of_a_shape(shape: tuple[int, ...], groups: int, route: Route) -> None:
    assert route_of(torch.Size(shape), groups) == route


@pytest.mark.parametrize(("name", "by_pixel"), [("pixel_thresholds_5x5", True), ("fused", False), ("nearest", False)])
def test_whose_pixels_have_one_code(name: str, by_pixel: bool) -> None:
    problem = layer_problem(LAYERS[name], PLACES["padded"])
    for route in ("reference", "columns", "implicit"):
        assert problem.packed(route).by_pixel == by_pixel  # type: ignore[arg-type]
    one = layer_problem(LAYERS["thresholds_1x1_4_bits"], PLACES["padded"])
    assert not one.packed("implicit").by_pixel  # a window is a pixel: nothing is gained


@pytest.mark.parametrize("name", ["thresholds_7x7", "fused_5x5_8_bits", "nearest"])
def test_a_layer_on_another_device(name: str) -> None:
    layer = layer_problem(LAYERS[name], PLACES["padded"]).packed("implicit")
    elsewhere = layer.to(torch.device("meta"))
    tensors = tensors_of(layer)
    assert "weight" in tensors
    for field in fields(PackedLayer):
        before, after = getattr(layer, field.name), getattr(elsewhere, field.name)
        if field.name in tensors:
            assert after.device.type == "meta"
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after == before
    back = layer.to(torch.device("cpu"))
    assert all(torch.equal(tensor, tensors[field]) for field, tensor in tensors_of(back).items())


def test_the_constants_of_the_formats() -> None:
    assert (packing.DEPTH, packing.TILE) == (32, 8)
