"""A-rounding against appendix A worked out by hand, and against a loop that takes one window at a time."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquant_core import a_rounding
from aquant_core.a_rounding import a_round, a_rounded_convolution
from aquant_core.layers import QuantizedLayer
from aquant_core.quantizers import UniformGrid
from cupy_kernels.specification import Window

EPS = 1e-5
PARTS = 1024
"""Fractions are multiples of 1 / 1024: every sum of them is exact, in whatever order."""


def rounded(*channels: list[float]) -> list[list[float]]:
    """One window of channels, each a list of its positions."""
    result: list[list[float]] = a_round(torch.tensor(channels)[:, :, None])[:, :, 0].tolist()
    return result


@pytest.mark.parametrize(("t", "nearest"), [(0.5, 0), (1.5, 1), (0.25, 0), (0.75, 1), (2.0, 2), (-0.5, -1), (-0.25, 0)])
def test_one_element_is_rounded_to_nearest_halves_down(t: float, nearest: float) -> None:
    assert rounded([t]) == [[nearest]]


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        # Errors -1/4, -3/8, -7/16, -1/8, in all -1.1875: one flip, of .4375, leaves -.1875.
        ([0.25, 0.375, 0.4375, 0.125], [0, 0, 1, 0]),
        # The same upside down: .25 + .375 + .4375 + .125.
        ([0.75, 0.625, 0.5625, 0.875], [1, 1, 0, 1]),
        # -1.71875: two flips leave .28125.
        ([0.25, 0.375, 0.4375, 0.34375, 0.3125], [0, 1, 1, 0, 0]),
        # -1/2 is small enough, -1.5 takes one flip and not two.
        ([0.25, 0.25], [0, 0]),
        ([0.375, 0.3125, 0.4375, 0.375], [0, 0, 1, 0]),
        # What counts is the fraction, wherever it lies: errors -.375, -.4375, .125.
        ([7.375, -3.5625, 4.875], [7, -3, 5]),
        # An error of the other sign is no candidate, however near its fraction is to one half.
        ([0.546875, 0.375, 0.25, 0.4375], [1, 0, 0, 1]),
        # Whole numbers stay, and count for nothing.
        ([3.0, 0.4375, 0.0, 0.375, -2.0], [3, 1, 0, 0, -2]),
    ],
)
def test_flips_in_one_channel(channel: list[float], expected: list[float]) -> None:
    assert rounded(channel) == [expected]


def test_channels_do_not_share_their_flips() -> None:
    # Sums -.8125 and .8125: one flip each, though the window's sum is 0.
    assert rounded([0.375, 0.4375], [0.625, 0.5625]) == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        # Sums -3/8 and -7/16, of the window -.8125: one flip, in the second channel.
        ([[0.375], [0.4375]], [[0], [1]]),
        # -.375 - .4375 - .40625 - .25, in all -1.46875: one flip leaves -.46875.
        ([[0.375], [0.4375], [0.40625], [0.25]], [[0], [1], [0], [0]]),
        # -1.75: two, in the channels whose candidates are nearest to one half.
        ([[0.375], [0.46875], [0.40625], [0.25], [0.25]], [[0], [1], [1], [0], [0]]),
        # A channel's candidate is the one nearest to one half.
        ([[0.203125, 0.28125], [0.125, 0.0]], [[0, 1], [0, 0]]),
        # Two flips are needed, and the first channel has the two best candidates: one flip a channel.
        (
            [[0.2421875, 0.234375], [0.21875, 0.1875], [0.203125, 0.171875], [0.1875, 0.15625]],
            [[1, 0], [1, 0], [0, 0], [0, 0]],
        ),
        # Upside down: errors 3/8 and 7/16.
        ([[0.625], [0.5625]], [[1], [0]]),
        # The window's sum, -1/2, is small enough.
        ([[0.25], [0.25]], [[0], [0]]),
        # A channel without a candidate is passed over: its only error has the other sign.
        ([[0.46875], [0.96875], [0.4375]], [[1], [1], [0]]),
    ],
)
def test_flips_over_the_window(channels: list[list[float]], expected: list[list[float]]) -> None:
    assert rounded(*channels) == expected


def test_a_channel_whose_sum_has_the_other_sign_is_left_alone() -> None:
    # The first channel's sum is -1.1875, so .4375 goes up and leaves -.1875; with the others' .4375 and .375 the
    # window's is .625. The first flip's error, .5625, is then the largest, but taking it back would leave -1.1875.
    assert rounded([0.25, 0.375, 0.4375, 0.125], [0.5625, 0, 0, 0], [0.625, 0, 0, 0]) == [
        [0, 0, 1, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


def fractions(channels: int, positions: int, windows: int) -> st.SearchStrategy[Tensor]:
    numbers = st.integers(-3 * PARTS, 9 * PARTS) | st.integers(-3, 9).map(lambda whole: whole * PARTS)
    count = channels * positions * windows
    return st.lists(numbers, min_size=count, max_size=count).map(
        lambda values: torch.tensor(values).reshape(channels, positions, windows) / PARTS
    )


COLUMNS = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3)).flatmap(lambda shape: fractions(*shape))


@settings(max_examples=100, deadline=None)
@given(COLUMNS)
def test_each_is_floor_or_ceil_and_a_windows_sum_is_small(t: Tensor) -> None:
    result = a_round(t)
    assert ((result == t.floor()) | (result == t.ceil())).all()
    assert torch.equal(result, result.round())
    assert (result - t).sum((0, 1)).abs().max() <= 0.5 + EPS
    # Sums of the channels, which the third step may move by one flip, through zero.
    assert (result - t).sum(1).abs().max() <= 1 + EPS


@settings(max_examples=100, deadline=None)
@given(COLUMNS)
def test_after_the_second_step_the_channels_sums_are_small(t: Tensor) -> None:
    result = torch.cat([a_round(channel[None]) for channel in t])  # alone, a channel is its window
    assert (result - t).sum(1).abs().max() <= 0.5 + EPS
    # No more is flipped than that takes, each flip moving the sum by one.
    nearest = torch.ceil(t - 0.5)
    needed = torch.ceil((nearest - t).sum(1).abs() - 0.5).clamp(min=0)
    assert torch.equal((result != nearest).sum(1).float(), needed)
    # Over the window at most one rounding a channel differs from that.
    assert (a_round(t) != result).sum(1).max() <= 1


def flips_needed(total: float) -> int:
    return max(math.ceil(abs(total) - 0.5), 0)


def a_round_one_window(window: list[list[float]]) -> list[list[float]]:
    """Appendix A, step by step, for channels of positions; no two candidates are alike."""
    result = [[float(math.ceil(t - 0.5)) for t in channel] for channel in window]

    def candidates(c: int, sign: float) -> list[tuple[float, int]]:
        """How far each element with an error of that sign is off, and its place, the farthest first."""
        found = [((result[c][k] - t) * sign, k) for k, t in enumerate(window[c])]
        return sorted((entry for entry in found if entry[0] > 0), reverse=True)

    def total(c: int) -> float:
        return sum(result[c][k] - t for k, t in enumerate(window[c]))

    for c in range(len(window)):
        whole = total(c)
        sign = math.copysign(1, whole)
        for _, k in candidates(c, sign)[: flips_needed(whole)]:
            result[c][k] -= sign
    whole = sum(total(c) for c in range(len(window)))
    sign = math.copysign(1, whole)
    offers = [(*candidates(c, sign)[0], c) for c in range(len(window)) if total(c) * sign > 0]
    for _, k, c in sorted(offers, reverse=True)[: flips_needed(whole)]:
        result[c][k] -= sign
    return result


def a_rounded_by_loops(
    x: Tensor, grid: UniformGrid, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    scale, zero = float(grid.scale), float(grid.zero_point)
    rows, columns = window.output_size(x.shape[2], x.shape[3])
    out, inside = torch.zeros(len(x), len(weight), rows, columns), x.shape[1] // groups

    def value(image: int, channel: int, y: int, z: int) -> float:
        if not (0 <= y < x.shape[2] and 0 <= z < x.shape[3]):
            return 0.0  # padding is the code of zero
        return min(max(float(x[image, channel, y, z]) / scale + zero, 0), grid.levels) - zero

    for image, group, row, column in product(range(len(x)), range(groups), range(rows), range(columns)):
        slots = list(product(range(window.kernel_size[0]), range(window.kernel_size[1])))
        places = [
            (
                row * window.stride[0] - window.padding[0] + i * window.dilation[0],
                column * window.stride[1] - window.padding[1] + j * window.dilation[1],
            )
            for i, j in slots
        ]
        channels = range(group * inside, (group + 1) * inside)
        x_hat = a_round_one_window([[value(image, channel, *place) for place in places] for channel in channels])
        per_group = len(weight) // groups
        for output in range(group * per_group, (group + 1) * per_group):
            products = (
                float(weight[output, c, i, j]) * scale * x_hat[c][k]
                for c in range(inside)
                for k, (i, j) in enumerate(slots)
            )
            out[image, output, row, column] = sum(products) + (0.0 if bias is None else float(bias[output]))
    return out


GEOMETRIES: dict[str, tuple[Window, int]] = {
    "plain": (Window((3, 3)), 1),
    "padded": (Window((3, 3), padding=(1, 1)), 1),
    "stride": (Window((3, 2), (2, 1), (1, 2)), 1),
    "dilation": (Window((2, 2), (1, 2), (1, 0), (2, 3)), 1),
    "groups": (Window((3, 3), padding=(1, 1)), 2),
    "depthwise": (Window((3, 3), (2, 2), (1, 1)), 4),
    "pointwise": (Window(), 1),
}


def distinct(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers from -2 to 6 whose fractions all differ, also in their distance to one half: (4 i + 1) / 1024."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(PARTS // 4, generator=generator)[: math.prod(shape)]
    whole = torch.randint(-2, 6, (len(numbers),), generator=generator)
    return (whole + (4 * numbers + 1) / PARTS).reshape(shape)


@pytest.mark.parametrize("zero_point", [0, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_rounds_each_window_for_itself(name: str, zero_point: int) -> None:
    window, groups = GEOMETRIES[name]
    grid = UniformGrid(torch.tensor(0.5), torch.tensor(float(zero_point)), 3)
    generator = torch.Generator().manual_seed(1)
    x = (distinct((2, 4, 5, 6), 3) - zero_point) * 0.5  # t from about -2 to 6, codes from 0 to 3
    weight = torch.randn(4, 4 // groups, *window.kernel_size, generator=generator)
    for bias in (None, torch.randn(4, generator=generator)):
        expected = a_rounded_by_loops(x, grid, weight, bias, window, groups)
        found = a_rounded_convolution(x, grid, weight, bias, window, groups)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = F.conv2d(
        torch.ceil((x / 0.5 + zero_point).clamp(0, 3) - 0.5).sub(zero_point) * 0.5,
        weight,
        bias,
        window.stride,
        window.padding,
        window.dilation,
        groups,
    )
    assert not torch.allclose(found, plain, atol=1e-3)  # there was something to flip


def test_images_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    window, grid = Window((3, 3), padding=(1, 1)), UniformGrid(torch.tensor(0.5), torch.tensor(0.0), 3)
    x, weight = distinct((5, 2, 5, 5), 0) * 0.5, torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = a_rounded_convolution(x, grid, weight, None, window, 1)
    taken: list[int] = []

    def noted(t: Tensor) -> Tensor:
        taken.append(len(t))
        return a_round(t)

    monkeypatch.setattr(a_rounding, "a_round", noted)
    for images, parts in ((2, [2, 2, 1]), (0.5, [1] * 5)):
        monkeypatch.setattr(a_rounding, "_COLUMN_BYTES", int(images * 2 * 9 * 25 * 4))
        torch.testing.assert_close(a_rounded_convolution(x, grid, weight, None, window, 1), whole)
        assert taken == parts
        taken.clear()


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
def test_of_a_linear_layer_each_feature_is_a_channel(shape: tuple[int, ...]) -> None:
    grid = UniformGrid(torch.tensor(0.25), torch.tensor(1.0), 7)
    generator = torch.Generator().manual_seed(0)
    x, weight = (distinct(shape, 5) - 1) * 0.25, torch.randn(4, 6, generator=generator)
    bias = torch.randn(4, generator=generator)
    t = (x / 0.25 + 1).clamp(0, 7) - 1
    rows = [a_round_one_window([[value] for value in row.tolist()]) for row in t.reshape(-1, 6)]
    expected = F.linear(0.25 * torch.tensor(rows).reshape(shape), weight, bias)
    found = a_rounded_convolution(x, grid, weight, bias, Window(), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_clipped_or_padded_is_no_error() -> None:
    # t = 3.4 and -.4 are clipped to the codes 3 and 0; with .375 they would call for a flip, alone it does not.
    grid = UniformGrid(torch.tensor(1.0), torch.tensor(0.0), 3)
    x = torch.tensor([3.4, -0.4, 0.375]).reshape(1, 1, 1, 3)
    for window in (Window((1, 3)), Window((3, 3), padding=(1, 0))):
        weight = torch.zeros(3, 1, *window.kernel_size)
        for output in range(3):
            weight[output, 0, window.kernel_size[0] // 2, output] = 1
        assert a_rounded_convolution(x, grid, weight, None, window, 1).flatten().tolist() == [3, 0, 0]


def test_no_images() -> None:
    weight, grid = torch.ones(2, 3, 3, 3), UniformGrid(torch.tensor(1.0), torch.tensor(0.0), 3)
    assert a_rounded_convolution(torch.zeros(0, 3, 5, 5), grid, weight, None, Window((3, 3)), 1).shape == (0, 2, 3, 3)
    assert a_rounded_convolution(torch.zeros(0, 3), grid, torch.ones(2, 3), None, Window(), 1).shape == (0, 2)


@pytest.mark.parametrize(("op", "shape"), [("conv2d", (4, 2, 3, 3)), ("linear", (4, 6))])
def test_a_layer_flips_only_what_it_quantizes(op: str, shape: tuple[int, ...]) -> None:
    attributes: dict[str, Any] = {"stride": [2, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(4, generator=generator)
    x = torch.randn((2, 4, 5, 5) if op == "conv2d" else (5, 6), generator=generator)
    layer = QuantizedLayer(op, attributes if op == "conv2d" else {}, weight, bias)
    as_float = layer(x)
    layer.a_rounding = True
    assert torch.equal(layer(x), as_float)
    grid = UniformGrid(torch.tensor(0.4), torch.tensor(1.0), 3)
    layer.quantize_activation(grid, 2)
    expected = a_rounded_convolution(x, grid, weight, bias, layer.window, layer.groups)
    assert torch.equal(layer(x), expected)
    layer.a_rounding = False
    assert not torch.equal(layer(x), expected)
