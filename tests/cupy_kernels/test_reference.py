"""The reference against an oracle of another make: im2col by F.unfold, gradients by ordinary autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cupy_kernels import reference
from cupy_kernels.ops import border_columns, reference_only
from cupy_kernels.specification import BorderSpecification, Bound, Window

BOUNDS: tuple[Bound, ...] = get_args(Bound)
WINDOWS = [
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((2, 3), (2, 1), (0, 2), (1, 2)),
    Window((1, 1), (2, 2), (0, 0), (1, 1)),
]
PIXEL = Window()


def linear_in(value: Tensor, slope: Tensor, variable: Tensor) -> Tensor:
    """``value`` with the given slope in ``variable``, for autograd."""
    return value.detach() + slope.detach() * (variable - variable.detach())


def sigmoid_minus_half(w: Tensor) -> Tensor:
    """The specification's rational, whose slope is by definition (1/2 + h)(1/2 - h)."""
    c = w.detach().clamp(-8, 8)
    p = 0.24998705089092255 + 0.00655454583466053 * c**2 + 1.182320647785673e-05 * c**4
    h = c * p / (1 + 0.10950659215450287 * c**2 + 0.0008509904146194458 * c**4)
    return linear_in(h, 0.25 - h**2, w)


def shift(v: Tensor, bound: Bound) -> Tensor:
    if bound == "steep":
        return sigmoid_minus_half(2.5 * v)
    if bound == "stretched":
        return (2.5 * sigmoid_minus_half(v)).clamp(-0.5, 0.5)
    return v.clamp(-0.5, 0.5)


def unfold(x: Tensor, window: Window) -> Tensor:
    """(N, C, K, L)"""
    columns = F.unfold(x, window.kernel_size, window.dilation, window.padding, window.stride)
    return columns.reshape(x.shape[0], x.shape[1], window.positions, -1)


def oracle(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
    rounding: float,
) -> Tensor:
    inside = unfold(torch.ones_like(x), window)
    t = unfold(x, window) / scale + spec.zero_point
    b: Tensor | float = 0.5
    if border is not None:
        u = t.clamp(0, spec.levels) / spec.levels
        u = u if spec.input_gradient else u.detach()
        e = shift(sum(c[:, :, None] * u**k for k, c in enumerate(border)), spec.bound)  # type: ignore[arg-type]
        if spec.fused:
            weighted = e if alpha is None else alpha[:, :, None] * e
            b = 0.5 + weighted.sum(2, keepdim=True) / window.positions
        else:
            b = 0.5 + e
    rounded = t - b + (torch.ceil(t - b) - (t - b)).detach()
    q = (t + rounding * (rounded - t)).clamp(0, spec.levels)
    return ((q - spec.zero_point) * scale * inside).flatten(1, 2)


def draw(window: Window, terms: int, learned_alpha: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, 6, 5, generator=g, dtype=dtype) * 1.2 + 0.4
    border = torch.randn(terms, 3, window.positions, generator=g, dtype=dtype) * 0.6
    alpha = torch.rand(3, window.positions, generator=g, dtype=dtype)
    scale = torch.tensor(0.37, dtype=dtype)
    return {"x": x, "scale": scale, "border": border, "alpha": alpha if learned_alpha else None}


def gradients(function: Any, inputs: dict[str, Any], *static: Any) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: None if value is None else value.clone().requires_grad_() for name, value in inputs.items()}
    out = function(*leaves.values(), *static)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    found = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items() if v is not None}
    return out.detach(), found


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("fused", "learned"), [(True, False), (True, True), (False, False)])
def test_forward_and_all_gradients_equal_the_oracle(bound: Bound, fused: bool, learned: bool) -> None:
    grid = itertools.product(WINDOWS, (2, 3), (0, 2), (0.0, 0.4, 1.0), (True, False))
    for window, terms, zero_point, rounding, input_gradient in grid:
        spec = BorderSpecification(7, zero_point, bound, fused, input_gradient)
        inputs = draw(window, terms, learned)
        expected, expected_grads = gradients(oracle, inputs, window, spec, rounding)
        actual, actual_grads = gradients(border_columns, inputs, window, spec, rounding)
        case = f"{window} {terms=} {zero_point=} {rounding=} {input_gradient=}"
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=case)
        for name, wanted in expected_grads.items():
            error = float((actual_grads[name] - wanted).abs().max())
            assert error <= 1e-5 * float(wanted.abs().max()) + 1e-12, f"{name}: {error} ({case})"


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("rounding", [0.0, 0.4, 1.0])
def test_without_a_border_too(window: Window, rounding: float) -> None:
    inputs = draw(window, 3, False) | {"border": None}
    static = window, BorderSpecification(3, 1), rounding
    expected, expected_grads = gradients(oracle, inputs, *static)
    actual, actual_grads = gradients(border_columns, inputs, *static)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    for name, wanted in expected_grads.items():
        torch.testing.assert_close(actual_grads[name], wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_in_float32_the_codes_are_the_oracle_s(bound: Bound) -> None:
    window, spec = WINDOWS[0], BorderSpecification(15, 3, bound)
    inputs = draw(window, 3, True, torch.float32)
    with reference_only():
        actual = border_columns(**inputs, window=window, spec=spec)
    expected = oracle(**inputs, window=window, spec=spec, rounding=1.0)
    # Sums in another order may move a value across a border, hardly ever: none does for this seed.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_float32_gradients_are_those_of_float64() -> None:
    window, spec = WINDOWS[0], BorderSpecification(15, 3)
    single = draw(window, 3, True, torch.float32)
    double = {name: None if value is None else value.double() for name, value in single.items()}
    with reference_only():
        _, actual = gradients(border_columns, single, window, spec, 1.0)
    _, expected = gradients(oracle, double, window, spec, 1.0)
    for name, wanted in expected.items():
        assert float((actual[name].double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_codes_are_what_forward_dequantizes(window: Window, fused: bool) -> None:
    spec = BorderSpecification(7, 2, "steep", fused)
    inputs = draw(window, 3, fused, torch.float32)
    codes = reference.codes(**inputs, window=window, spec=spec)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= 7
    columns = reference.forward(**inputs, window=window, spec=spec, rounding=1.0)
    assert torch.equal((codes.float() - 2) * inputs["scale"], columns)


@pytest.mark.parametrize("rounding", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_padded_slot_is_exactly_zero_and_takes_part_in_the_mean(fused: bool, rounding: float) -> None:
    window = Window((3, 3), padding=(2, 1))
    inputs = draw(window, 3, False, torch.float32)
    spec = BorderSpecification(7, 2, "steep", fused)
    padding = unfold(torch.ones_like(inputs["x"]), window).flatten(1, 2) == 0
    assert padding.any()
    columns = reference.forward(**inputs, window=window, spec=spec, rounding=rounding)
    assert (columns[padding] == 0).all()
    assert (reference.codes(**inputs, window=window, spec=spec)[padding] == 2).all()


def test_half_is_rounding_to_nearest_halves_down() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 0.51, 1.49, 1.5, 1.51, 2.5, 2.6, 3.5, 9.0]).reshape(1, 1, 1, -1)
    one = torch.tensor(1.0)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    for border in (None, torch.zeros(3, 1, 1)):
        columns = reference.forward(x, one, border, None, PIXEL, BorderSpecification(3), 1.0)
        assert torch.equal(columns.flatten(), expected)


def test_equation_9_by_hand() -> None:
    # s = 1, z = 0, Q = 3, one 2x2 window: t = .54 1.5 2.6 3, u = t / 3 = .18 .5 .8667 1.
    # v = b2 u^2 + b1 u + b0: .5 x .18 + .11 = .2;  .5 x .25 - .125 = 0;  .2;  -.4 + .2 = -.2.  clip(v) = v.
    # Fused: B = 1/2 + (.2 + 0 + .2 - .2) / 4 = .55;  t - B = -.01 .95 2.05 2.45;  ceil: 0 1 3 3.
    # Alpha 1 .5 0 .5: B = 1/2 + (.2 - .1) / 4 = .525;  t - B = .015 .975 2.075 2.475;  ceil: 1 1 3 3.
    # Not fused: B = .7 .5 .7 .3;  t - B = -.16 1 1.9 2.7;  ceil: 0 1 2 3.
    x = torch.tensor([[[[0.54, 1.5], [2.6, 3.0]]]])
    border = torch.tensor([[[0.11, -0.125, 0.2, 0.2]], [[0.5, 0, 0, -0.4]], [[0, 0.5, 0, 0]]])
    window, one = Window((2, 2)), torch.tensor(1.0)

    def codes(alpha: Tensor | None, fused: bool) -> list[int]:
        spec = BorderSpecification(3, 0, "clip", fused)
        found = reference.codes(x, one, border, alpha, window, spec).flatten().tolist()
        assert reference.forward(x, one, border, alpha, window, spec, 1.0).flatten().tolist() == found
        return [int(code) for code in found]

    assert codes(None, fused=True) == [0, 1, 3, 3]
    assert codes(torch.tensor([[1.0, 0.5, 0.0, 0.5]]), fused=True) == [1, 1, 3, 3]
    assert codes(None, fused=False) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fused", "last", "softened"), [(True, 3, 2.6625), (False, 2, 2.4125)], ids=["fused", "not_fused"]
)
def test_a_pixel_may_be_down_in_one_window_and_up_in_the_next(fused: bool, last: int, softened: float) -> None:
    # s = 1/2, z = 0, Q = 3, 1x2 windows over t = .66 1.5 2.55, so u = .22 .5 .85. e is .3 - 1.2 u at position 0 and
    # .4 u - .1 at position 1: in the first window .036 .1, in the second -.3 .24.
    # Fused: B = .568, t - B = .092 .932, ceil: 1 1;  then B = .47, t - B = 1.03 2.08, ceil: 2 3.
    # Not fused: B = .536 .6, t - B = .124 .9, ceil: 1 1;  then B = .2 .74, t - B = 1.3 1.81, ceil: 2 2.
    x, half = torch.tensor([[[[0.33, 0.75, 1.275]]]]), torch.tensor(0.5)
    border = torch.tensor([[[0.3, -0.1]], [[-1.2, 0.4]]])
    window, spec = Window((1, 2)), BorderSpecification(3, 0, "clip", fused)
    codes = reference.codes(x, half, border, None, window, spec)  # (1, K, L)
    assert codes[0].T.tolist() == [[1, 1], [2, last]]
    columns = reference.forward(x, half, border, None, window, spec, 1.0)
    assert columns[0].T.tolist() == [[0.5, 0.5], [1.0, last / 2]]
    # Appendix Eq. 2 at a = 1/4: t + (code - t) / 4, times s.
    quarter = reference.forward(x, half, border, None, window, spec, 0.25)[0].T
    torch.testing.assert_close(quarter, 0.5 * torch.tensor([[0.745, 1.375], [1.625, softened]]))


def element_wise_error(step: float, w: float, dw: float, x: float, e: float) -> float:
    """g of Eq. 6, for a rounding that moves x by ``step``."""
    return (w + dw) * step + dw * x + w * e


UNIT = st.floats(0.01, 0.99)
WEIGHTS = st.floats(0.05, 4.0) | st.floats(-4.0, -0.05)


@settings(max_examples=200, deadline=None)
@given(w=WEIGHTS, dw=st.floats(-1.0, 1.0), x=st.floats(0.0, 30.0), e=st.floats(-3.0, 3.0))
def test_equation_7_makes_both_errors_alike(w: float, dw: float, x: float, e: float) -> None:
    assume(abs(w + dw) >= 0.05)
    b = dw / (w + dw) * x + w / (w + dw) * e + 0.5
    down, up = (element_wise_error(step, w, dw, x, e) for step in (-b, 1 - b))
    size = 1e-9 * (1 + abs(w + dw) * abs(b) + abs(dw * x) + abs(w * e))
    assert abs(down) == pytest.approx(abs(up), abs=size)  # Definition 2.1
    assert down == pytest.approx(-up, abs=size)  # so that the mean over a uniform fraction is 0 (figure 1(b))


@settings(max_examples=200, deadline=None)
@given(w=WEIGHTS, dw=st.floats(-0.04, 0.04), t=st.floats(0.0, 15.0), b=UNIT)
def test_with_equation_7_as_border_the_code_of_less_error_is_taken(w: float, dw: float, t: float, b: float) -> None:
    # A linear border over u = t / 15 is Eq. 7 with this propagated error; s = 1, z = 0.
    e = ((b - 0.5) * (w + dw) - dw * t) / w
    border = torch.tensor([w / (w + dw) * e, 15 * dw / (w + dw)], dtype=torch.float64).reshape(2, 1, 1)
    x, one = torch.tensor([[[[t]]]], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    code = int(reference.codes(x, one, border, None, PIXEL, BorderSpecification(15, 0, "clip", fused=False)))
    assert code in (math.floor(t), math.ceil(t))
    other = math.floor(t) + math.ceil(t) - code
    taken, left = (abs(element_wise_error(q - t, w, dw, t, e)) for q in (code, other))
    assert taken <= left + 1e-9
    assert code == math.ceil(t - b) or abs(math.ceil(t - b) - (t - b)) < 1e-9  # the border is b


@settings(max_examples=100, deadline=None)
@given(w=WEIGHTS, t=st.floats(0.0, 15.0))
def test_without_any_error_equation_7_is_rounding_to_nearest(w: float, t: float) -> None:
    nearest = math.ceil(t - 0.5)
    errors = {q: abs(element_wise_error(q - t, w, 0.0, t, 0.0)) for q in (math.floor(t), math.ceil(t))}
    assert errors[nearest] == min(errors.values())
    x, one = torch.tensor([[[[t]]]], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for border in (None, torch.zeros(3, 1, 1, dtype=torch.float64)):
        assert int(reference.codes(x, one, border, None, PIXEL, BorderSpecification(15))) == nearest


def test_sigmoid_is_near_odd_and_bounded() -> None:
    w = torch.cat([torch.linspace(-12, 12, 48_001), torch.tensor([0.0, 1e30, -1e30, torch.inf, -torch.inf])])
    h = reference.sigmoid_minus_half(w)
    # Beyond its limit of 8 it stays constant, where the sigmoid has 3.4e-4 to go.
    inner = w.abs() <= 8
    assert float((h - (torch.sigmoid(w) - 0.5)).abs()[inner].max()) <= 6e-6
    assert torch.equal(reference.sigmoid_minus_half(-w), -h)
    assert float(h.abs().max()) <= 0.5
    assert (h[:48_001].diff() >= -1e-7).all()


@pytest.mark.parametrize(("bound", "value"), [("steep", 0.2310586), ("stretched", 0.2467189), ("clip", 0.4)])
def test_bounds_by_hand(bound: Bound, value: float) -> None:
    # v = 0.4: sigmoid(1) = 0.7310586; sigmoid(0.4) = 0.5986877, less 1/2, times 2.5 = 0.2467192.
    spec = BorderSpecification(3, 0, bound)
    v = torch.tensor([0.4, -0.4, 50.0, -50.0])
    e = reference.bounded_shift(v, spec)
    torch.testing.assert_close(e[:2], torch.tensor([value, -value]), rtol=0, atol=2e-5)
    assert (e.abs() <= 0.5).all()
    slope = reference.bounded_shift_slope(v, e, spec)
    assert (slope[2:].abs() < 1e-3).all()
    assert (slope[:2] > 0.4).all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_slope_of_the_shift_is_its_derivative(bound: Bound) -> None:
    spec = BorderSpecification(3, 0, bound)
    v = torch.linspace(-3, 3, 241, dtype=torch.float64)
    kinks = {"steep": 3.2, "stretched": 0.847, "clip": 0.5}[bound]
    v = v[(v.abs() - kinks).abs() > 1e-2]
    width = 1e-5
    e = reference.bounded_shift(v, spec)
    risen, fallen = reference.bounded_shift(v + width, spec), reference.bounded_shift(v - width, spec)
    # The slope is the sigmoid's, not exactly that of its rational stand-in.
    slope = reference.bounded_shift_slope(v, e, spec)
    torch.testing.assert_close(slope, (risen - fallen) / (2 * width), atol=1e-4, rtol=0)
    beyond = v.abs() > kinks
    if bound != "steep":
        assert (slope[beyond] == 0).all()
    assert (slope[~beyond] > 0).all()


def test_nan_passes_through() -> None:
    x = torch.tensor([[[[torch.nan, 1.0]]]])
    for border in (None, torch.full((3, 1, 1), 0.1)):
        for rounding in (0.0, 0.4, 1.0):
            spec = BorderSpecification(3)
            out = reference.forward(x, torch.tensor(0.5), border, None, PIXEL, spec, rounding).flatten()
            assert out.isnan().tolist() == [True, False]


@pytest.mark.parametrize("has_border", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradcheck_of_the_unrounded_path(window: Window, has_border: bool) -> None:
    inputs = draw(window, 3, False)
    x, scale = inputs["x"][:1, :2, :4, :3].clone().requires_grad_(), inputs["scale"].clone().requires_grad_()
    border = inputs["border"][:, :2].clone().requires_grad_() if has_border else None
    spec = BorderSpecification(7, 2)

    def columns(x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = border_columns(x, scale, border, None, window, spec, 0.0)
        return out

    assert torch.autograd.gradcheck(columns, (x, scale))
    columns(x, scale).square().sum().backward()
    if border is not None:
        assert border.grad is not None
        assert border.grad.count_nonzero() == 0  # what is not rounded needs no border


class _CeilAsIdentity(torch.autograd.Function):
    """The surrogate whose true gradient is the straight-through one: q = t - a B, far from the clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, border: Tensor, alpha: Tensor | None, *static: Any) -> Tensor:
        ctx.save_for_backward(x, scale, border, alpha)
        ctx.static = static
        window, spec, rounding = static
        t = unfold(x, window) / scale + spec.zero_point
        u = t / spec.levels
        v = sum(c[:, :, None] * u**k for k, c in enumerate(border))
        e = reference.bounded_shift(v, spec)  # type: ignore[arg-type]
        if spec.fused:
            e = (e if alpha is None else e * alpha[:, :, None]).mean(2, keepdim=True)
        return ((t - rounding * (0.5 + e) - spec.zero_point) * scale).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (*reference.backward(grads[0], *ctx.saved_tensors, *ctx.static), None, None, None)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck_of_the_border_through_a_surrogate(bound: Bound, learned: bool) -> None:
    g = torch.Generator().manual_seed(1)
    window, spec = Window((2, 2)), BorderSpecification(7, 2, bound, fused=learned)
    scale = torch.tensor(0.5, dtype=torch.float64)  # its gradient holds q itself, which the surrogate does not round
    x = (torch.rand(1, 2, 3, 3, generator=g, dtype=torch.float64) * 2 - 0.5).requires_grad_()  # t in [1, 5]
    border = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64) * 0.1).requires_grad_()
    alpha = torch.rand(2, 4, generator=g, dtype=torch.float64).requires_grad_() if learned else None
    # The slope (1/2 + h)(1/2 - h) is the sigmoid's, not exactly that of its rational stand-in.
    assert torch.autograd.gradcheck(
        _CeilAsIdentity.apply, (x, scale, border, alpha, window, spec, 0.4), atol=1e-4, rtol=1e-4
    )
