"""Border quantization for CPUs: the reference's arithmetic in fused loops, compiled by numba when first used.

One (image, channel) plane at a time stays in cache from the padded map to the finished columns. Each operation is
rounded as the reference rounds it (no fast-math, no contraction), so codes are equal bit for bit; gradients differ in
the order of their sums alone. Planes are independent and their partial sums are added in a fixed order, so the
number of threads changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from cupy_kernels.cpu_arithmetic import inline, loop, round_to_even, total, total_of_products, use_torchs_threads
from cupy_kernels.cpu_windows import (
    add_to_elements,
    add_windows,
    elements,
    layout,
    read_windows,
    windows_inside,
    write_windows,
)
from cupy_kernels.reference import Gradients
from cupy_kernels.specification import (
    NUMBER_OF_BOUND,
    SCALE_OF_BOUND,
    SIGMOID_LIMIT,
    SIGMOID_P0,
    SIGMOID_P1,
    SIGMOID_P2,
    SIGMOID_Q1,
    SIGMOID_Q2,
    BorderSpecification,
    Window,
)

# float32 constants: a Python float would lift the whole expression to float64.
_ZERO, _QUARTER, _HALF, _ONE, _TWO = (np.float32(value) for value in (0.0, 0.25, 0.5, 1.0, 2.0))
_FACTOR, _LIMIT = np.float32(SCALE_OF_BOUND), np.float32(SIGMOID_LIMIT)
_P0, _P1, _P2 = np.float32(SIGMOID_P0), np.float32(SIGMOID_P1), np.float32(SIGMOID_P2)
_Q1, _Q2 = np.float32(SIGMOID_Q1), np.float32(SIGMOID_Q2)
_STEEP, _STRETCHED = NUMBER_OF_BOUND["steep"], NUMBER_OF_BOUND["stretched"]


@inline()
def _clamp(value, low, high):
    # Written so that a NaN passes through, as it does in torch.
    value = high if value > high else value
    return low if value < low else value


@inline()
def _ceil(value):
    nearest = round_to_even(value)
    return nearest if nearest >= value else nearest + _ONE


@inline()
def _sigmoid_minus_half(w):
    w = _clamp(w, -_LIMIT, _LIMIT)
    z = w * w
    return (((z * _P2 + _P1) * z + _P0) * w) / ((z * _Q2 + _Q1) * z + _ONE)


@loop()
def _shifts(u, b, bound, e):
    """e of every window for one position, from the position's u and its (b0, b1, b2)."""
    b0, b1, b2 = b[0], b[1], b[2]
    if bound == _STEEP:
        for i in range(e.shape[0]):
            e[i] = _sigmoid_minus_half(((u[i] * b2 + b1) * u[i] + b0) * _FACTOR)
    elif bound == _STRETCHED:
        for i in range(e.shape[0]):
            e[i] = _clamp(_sigmoid_minus_half((u[i] * b2 + b1) * u[i] + b0) * _FACTOR, -_HALF, _HALF)
    else:
        for i in range(e.shape[0]):
            e[i] = _clamp((u[i] * b2 + b1) * u[i] + b0, -_HALF, _HALF)


@loop()
def _multiply_by_slopes(u, e, b, bound, of_e):
    """Turns the gradient of e into that of v, in place."""
    if bound == _STEEP:
        for i in range(e.shape[0]):
            of_e[i] *= (_QUARTER - e[i] * e[i]) * _FACTOR
    elif bound == _STRETCHED:
        for i in range(e.shape[0]):
            h = e[i] / _FACTOR
            of_e[i] *= (_QUARTER - h * h) * _FACTOR if abs(e[i]) < _HALF else _ZERO
    else:
        b0, b1, b2 = b[0], b[1], b[2]
        for i in range(e.shape[0]):
            of_e[i] *= _ONE if abs((u[i] * b2 + b1) * u[i] + b0) <= _HALF else _ZERO


@loop()
def _fill_plane(x, scale, zero_point, levels, pads, t, u):
    """Padded maps of t and u of one (H, W) plane; t is cut off where it is far outside the codes anyway."""
    inverse = _ONE / levels
    t[:] = zero_point
    for row in range(x.shape[0]):
        source, target = x[row], t[row + pads[0], pads[1] : pads[1] + x.shape[1]]
        for column in range(x.shape[1]):
            target[column] = _clamp(source[column] / scale + zero_point, -_TWO, levels + _TWO)
    flat_t, flat_u = t.reshape(-1), u.reshape(-1)
    for i in range(flat_t.shape[0]):
        flat_u[i] = _clamp(flat_t[i], _ZERO, levels) * inverse


@loop()
def _fuse(u, border, alpha, geometry, bound, size, scratch, shifts, b):
    """Eq. 9 over one plane: B of every window, into ``b``; e of position p is left in row p of ``shifts``, if it has
    one, else in its last.
    """
    positions = border.shape[1]
    inverse = _ONE / np.float32(positions)
    for position in range(positions):
        e = shifts[min(position, shifts.shape[0] - 1)]
        _shifts(elements(u, position, geometry, size, scratch), border[:, position], bound, e)
        weight = alpha[position]
        if position == 0:
            for i in range(b.shape[0]):
                b[i] = e[i] * weight
        else:
            for i in range(b.shape[0]):
                b[i] += e[i] * weight
    for i in range(b.shape[0]):
        b[i] = b[i] * inverse + _HALF


@loop()
def _unfused_border(u, b_of_position, bound, b):
    """B of every window for one position, without fusion."""
    _shifts(u, b_of_position, bound, b)
    for i in range(b.shape[0]):
        b[i] += _HALF


@loop()
def _quantize(t, b, scale, zero_point, levels, rounding, out):
    if rounding == _ONE:
        for i in range(out.shape[0]):
            out[i] = (_clamp(_ceil(t[i] - b[i]), _ZERO, levels) - zero_point) * scale
    else:
        for i in range(out.shape[0]):
            q = (_ceil(t[i] - b[i]) - t[i]) * rounding + t[i]
            out[i] = (_clamp(q, _ZERO, levels) - zero_point) * scale


@loop(parallel=True, cache=True)
def _forward(
    x, scale, zero_point, levels, border, alpha, bordered, fused, bound, rounding, pads, geometry, size, taps, summed,
    out,
):  # fmt: skip
    """Columns, (N, C, K, L), into ``out``; if ``summed``, their sum weighted by ``taps``, (N, C, 1, L)."""
    images, channels, height, width = x.shape
    positions = border.shape[2]
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        t = np.empty((height + 2 * pads[0], width + 2 * pads[1]), np.float32)
        u = np.empty_like(t)
        _, pitch, length = layout(t.shape[1], geometry, size)
        b = np.full(length, _HALF, np.float32)
        scratch_t, scratch_u, values = np.empty_like(b), np.empty_like(b), np.empty_like(b)
        _fill_plane(x[n, c], scale, zero_point, levels, pads, t, u)
        if bordered and fused:
            _fuse(u, border[c], alpha[c], geometry, bound, size, scratch_u, values.reshape(1, -1), b)
        if summed:
            out[n, c, 0] = _ZERO
        for position in range(positions):
            if bordered and not fused:
                u_here = elements(u, position, geometry, size, scratch_u)
                _unfused_border(u_here, border[c, :, position], bound, b)
            t_here = elements(t, position, geometry, size, scratch_t)
            _quantize(t_here, b, scale, zero_point, levels, rounding, values)
            inside = windows_inside(position, geometry, pads, (height, width), size)
            if summed:
                add_windows(values, taps[c, position], pitch, inside, size, out[n, c, 0])
            else:
                write_windows(values, pitch, inside, size, out[n, c, position])


@loop()
def _backward_of_rounding(t, b, g, factor, zero_point, levels, rounding, of_scale, of_t, of_b):
    """From the gradient of x_hat / factor to those of s (direct part), t and B, element by element."""
    for i in range(t.shape[0]):
        rounded = _ceil(t[i] - b[i])
        q = rounded if rounding == _ONE else (rounded - t[i]) * rounding + t[i]
        of_scale[i] = _clamp(q, _ZERO, levels) - zero_point
        passed = g[i] * factor if q >= _ZERO and q <= levels else _ZERO
        of_t[i] = passed
        of_b[i] = -(passed * rounding)


@loop()
def _backward_of_shifts(t, u, e, of_e, alpha, b, bound, levels, input_gradient, sums, of_t):
    """Of one position: sums for b0, b1, b2 and alpha; ``of_t`` receives the part through u; ``of_e`` and ``e`` are
    consumed.
    """
    inverse = _ONE / levels
    sums[3] = total_of_products(of_e, e)
    for i in range(e.shape[0]):
        of_e[i] *= alpha
    _multiply_by_slopes(u, e, b, bound, of_e)
    sums[0] = total(of_e)
    sums[1] = total_of_products(of_e, u)
    for i in range(e.shape[0]):
        e[i] = of_e[i] * u[i]
    sums[2] = total_of_products(e, u)
    if input_gradient:
        b1, twice_b2 = b[1], _TWO * b[2]
        for i in range(e.shape[0]):
            free = t[i] > _ZERO and t[i] < levels
            of_t[i] = of_e[i] * (twice_b2 * u[i] + b1) * inverse if free else _ZERO


@loop(parallel=True, cache=True)
def _backward(
    grad, x, scale, zero_point, levels, border, alpha, bordered, fused, bound, rounding, pads, geometry, size, taps,
    summed, input_gradient, columns, grad_x, sums_of_scale, sums_of_border, sums_of_taps,
):  # fmt: skip
    """The adjoint of ``_forward``; x_hat is written to ``columns`` too, unless that is empty."""
    images, channels, height, width = x.shape
    positions = border.shape[2]
    inverse_positions = _ONE / np.float32(positions)
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        t = np.empty((height + 2 * pads[0], width + 2 * pads[1]), np.float32)
        u, of_t = np.empty_like(t), np.zeros_like(t)
        _, pitch, length = layout(t.shape[1], geometry, size)
        b = np.full(length, _HALF, np.float32)
        scratch_t, scratch_u, g = np.empty_like(b), np.empty_like(b), np.empty_like(b)
        of_scale, of_b, of_t_here, total_of_b = np.empty_like(b), np.empty_like(b), np.empty_like(b), np.zeros_like(b)
        shifts = np.empty((positions if fused else 1, length), np.float32)
        _fill_plane(x[n, c], scale, zero_point, levels, pads, t, u)
        if bordered and fused:
            _fuse(u, border[c], alpha[c], geometry, bound, size, scratch_u, shifts, b)
        sum_of_scale = np.float64(0.0)
        for position in range(positions):
            b_of_position, tap = border[c, :, position], taps[c, position]
            u_here = elements(u, position, geometry, size, scratch_u)
            if bordered and not fused:
                _shifts(u_here, b_of_position, bound, shifts[0])
                for i in range(length):
                    b[i] = shifts[0, i] + _HALF
            t_here = elements(t, position, geometry, size, scratch_t)
            inside = windows_inside(position, geometry, pads, (height, width), size)
            read_windows(grad[n, c, 0 if summed else position], pitch, inside, size, g)
            _backward_of_rounding(t_here, b, g, scale * tap, zero_point, levels, rounding, of_scale, of_t_here, of_b)
            direct = total_of_products(of_scale, g)
            sums_of_taps[n, c, position] = direct * scale
            sum_of_scale += np.float64(direct * tap)
            if columns.size > 0:
                for i in range(length):
                    of_scale[i] *= scale
                write_windows(of_scale, pitch, inside, size, columns[n, c, position])
            add_to_elements(of_t_here, position, geometry, size, of_t)
            if bordered and fused:
                for i in range(length):
                    total_of_b[i] += of_b[i]
            elif bordered:
                sums = sums_of_border[n, c, position]
                _backward_of_shifts(
                    t_here, u_here, shifts[0], of_b, _ONE, b_of_position, bound, levels, input_gradient, sums,
                    of_t_here,
                )  # fmt: skip
                if input_gradient:
                    add_to_elements(of_t_here, position, geometry, size, of_t)
        if bordered and fused:
            for i in range(length):
                total_of_b[i] *= inverse_positions
            for position in range(positions):
                t_here = elements(t, position, geometry, size, scratch_t)
                u_here = elements(u, position, geometry, size, scratch_u)
                of_b[:] = total_of_b
                _backward_of_shifts(
                    t_here, u_here, shifts[position], of_b, alpha[c, position], border[c, :, position], bound, levels,
                    input_gradient, sums_of_border[n, c, position], of_t_here,
                )  # fmt: skip
                if input_gradient:
                    add_to_elements(of_t_here, position, geometry, size, of_t)
        for row in range(height):
            source, target = of_t[row + pads[0], pads[1] : pads[1] + width], grad_x[n, c, row]
            for column in range(width):
                target[column] = source[column] / scale
            sum_of_scale -= np.float64(total_of_products(target, x[n, c, row]) / scale)
        sums_of_scale[n, c] = sum_of_scale


def _plane_view(x: Tensor, window: Window) -> np.ndarray:
    """The map as an array; a window of one pixel sees each plane as one long row."""
    array: np.ndarray = x.contiguous().numpy()
    return array.reshape(*array.shape[:2], 1, -1) if window.is_pixel else array


_Size = tuple[int, int]


def _arguments(
    x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window, spec: BorderSpecification,
    rounding: float | Tensor, taps: Tensor | None, size: _Size,
) -> tuple[object, ...]:  # fmt: skip
    use_torchs_threads()
    channels, positions = x.shape[1], window.positions
    coefficients = np.zeros((channels, 3, positions), np.float32)  # b2 = 0 is the linear form
    if border is not None:
        coefficients[:, : len(border)] = border.detach().transpose(0, 1).numpy()
    ones = np.ones((channels, positions), np.float32)
    weights, multipliers = (ones if t is None else np.ascontiguousarray(t.detach().numpy()) for t in (alpha, taps))
    return (
        np.float32(scale.item()), np.float32(spec.zero_point), np.float32(spec.levels), coefficients, weights,
        border is not None, spec.fused, NUMBER_OF_BOUND[spec.bound], np.float32(float(rounding)), window.padding,
        (window.kernel_size[1], *window.stride, *window.dilation), size, multipliers, taps is not None,
    )  # fmt: skip


def forward(
    x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window, spec: BorderSpecification,
    rounding: float | Tensor, taps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``reference.forward``."""
    planes = _plane_view(x, window)
    size = window.output_size(*planes.shape[2:])
    rows = window.positions if taps is None else 1
    out = torch.empty(x.shape[0], x.shape[1], rows, size[0] * size[1])
    _forward(planes, *_arguments(x, scale, border, alpha, window, spec, rounding, taps, size), out.numpy())
    return out.flatten(1, 2)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window,
    spec: BorderSpecification, rounding: float | Tensor, taps: Tensor | None = None, columns: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """See ``reference.backward``."""
    planes = _plane_view(x, window)
    images, channels = planes.shape[:2]
    positions = window.positions
    size = window.output_size(*planes.shape[2:])
    grads = grad.contiguous().numpy().reshape(images, channels, positions if taps is None else 1, -1)
    grad_x = np.empty_like(planes)
    sums_of_scale = torch.empty(images, channels, dtype=torch.float64)
    sums_of_border, sums_of_taps = torch.empty(images, channels, positions, 4), torch.empty(images, channels, positions)
    written = torch.empty(0, 0, 0, 0) if columns is None else columns.view(images, channels, positions, -1)
    _backward(
        grads, planes, *_arguments(x, scale, border, alpha, window, spec, rounding, taps, size), spec.input_gradient,
        written.numpy(), grad_x, sums_of_scale.numpy(), sums_of_border.numpy(), sums_of_taps.numpy(),
    )  # fmt: skip
    of_border = of_alpha = None
    if border is not None:
        totals = sums_of_border.sum(0).permute(2, 0, 1)  # (4, C, K)
        of_border = totals[: len(border)].contiguous()
        of_alpha = None if alpha is None else totals[3].contiguous()
    of_taps = None if taps is None else sums_of_taps.sum(0)
    of_scale = sums_of_scale.sum().to(scale.dtype)
    return Gradients(torch.from_numpy(grad_x).view_as(x), of_scale, of_border, of_alpha, of_taps)
