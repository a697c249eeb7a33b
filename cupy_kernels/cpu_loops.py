"""Border quantization for CPUs: the reference's arithmetic in fused loops, compiled by numba when first used.

One (image, channel) plane at a time stays in cache from the padded map to the finished columns. Each operation is
rounded as the reference rounds it (no fast-math, no contraction), so codes are equal bit for bit; gradients differ in
the order of their sums alone. Planes are independent and their partial sums are added in a fixed order, so the
number of threads changes nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from cupy_kernels.specification import (
    SCALE_OF_BOUND,
    SIGMOID_LIMIT,
    SIGMOID_P0,
    SIGMOID_P1,
    SIGMOID_P2,
    SIGMOID_Q1,
    SIGMOID_Q2,
    BorderSpecification,
    Bound,
    Window,
)

# float32 constants: a Python float would lift the whole expression to float64.
_ZERO, _QUARTER, _HALF, _ONE, _TWO = (np.float32(value) for value in (0.0, 0.25, 0.5, 1.0, 2.0))
_FACTOR, _LIMIT = np.float32(SCALE_OF_BOUND), np.float32(SIGMOID_LIMIT)
_MAGIC = np.float32(1.5 * 2**23)
_P0, _P1, _P2 = np.float32(SIGMOID_P0), np.float32(SIGMOID_P1), np.float32(SIGMOID_P2)
_Q1, _Q2 = np.float32(SIGMOID_Q1), np.float32(SIGMOID_Q2)
_STEEP, _STRETCHED, _CLIP = 0, 1, 2
_MOST_THREADS = numba.get_num_threads()
_NUMBER_OF_BOUND: dict[Bound, int] = {"steep": _STEEP, "stretched": _STRETCHED, "clip": _CLIP}


# error_model="numpy": without Python's check for a zero divisor the loops vectorise. Clamps are written so that a NaN
# passes through them, as it does in torch.
_loop: Any = partial(njit, error_model="numpy")
_inline: Any = partial(njit, error_model="numpy", inline="always")


@_inline()
def _clamp(value, low, high):
    value = high if value > high else value
    return low if value < low else value


@_inline()
def _ceil(value):
    """ceil of a value well below 2^22: the addition rounds to an integer; np.ceil would be a call for each element."""
    nearest = (value + _MAGIC) - _MAGIC
    return nearest if nearest >= value else nearest + _ONE


@_inline()
def _sigmoid_minus_half(w):
    w = _clamp(w, -_LIMIT, _LIMIT)
    z = w * w
    return (((z * _P2 + _P1) * z + _P0) * w) / ((z * _Q2 + _Q1) * z + _ONE)


@_loop()
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


@_loop()
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


@_loop()
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


# How a position's elements are laid out in memory: with stride 1 they are a run of the padded map itself, row after
# row with the map's pitch (the few numbers between two rows belong to no window and are computed along); with other
# strides they are gathered first. Inner loops run over one flat range either way. Index arithmetic is unsigned, since
# for a signed index numba would check whether to count from the end.


@_inline()
def _corner(position, geometry):
    """Row and column, in the padded map, of a position's element in the first window."""
    kernel_x, _, _, dilation_y, dilation_x = geometry
    return position // kernel_x * dilation_y, position % kernel_x * dilation_x


@_inline()
def _layout(padded_width, geometry, size):
    """(dense, pitch, length) of a position's elements."""
    dense = geometry[1] == 1 and geometry[2] == 1
    pitch = padded_width if dense else size[1]
    return dense, pitch, (size[0] - 1) * pitch + size[1]


@_loop()
def _elements(padded, position, geometry, size, scratch):
    """A position's elements: a run of the padded map, or gathered into ``scratch``."""
    top, left = _corner(position, geometry)
    dense, pitch, length = _layout(padded.shape[1], geometry, size)
    flat = padded.reshape(-1)
    if dense:
        start = top * pitch + left
        return flat[start : start + length]
    step_x = np.uint64(geometry[2])
    for row in range(np.uint64(size[0])):
        source = (row * np.uint64(geometry[1]) + np.uint64(top)) * np.uint64(padded.shape[1]) + np.uint64(left)
        target = row * np.uint64(size[1])
        for column in range(np.uint64(size[1])):
            scratch[target + column] = flat[source + column * step_x]
    return scratch


@_loop()
def _add_to_elements(values, position, geometry, size, padded):
    """The adjoint of ``_elements``."""
    top, left = _corner(position, geometry)
    dense, pitch, length = _layout(padded.shape[1], geometry, size)
    flat = padded.reshape(-1)
    if dense:
        start = top * pitch + left
        target_run = flat[start : start + length]
        for i in range(length):
            target_run[i] += values[i]
        return
    step_x = np.uint64(geometry[2])
    for row in range(np.uint64(size[0])):
        target = (row * np.uint64(geometry[1]) + np.uint64(top)) * np.uint64(padded.shape[1]) + np.uint64(left)
        source = row * np.uint64(size[1])
        for column in range(np.uint64(size[1])):
            flat[target + column * step_x] += values[source + column]


@_inline()
def _covered(offset, stride, extent, size):
    """The half-open range of windows whose element, at ``offset`` from the unpadded map, lies inside that map."""
    first = 0 if offset >= 0 else (stride - 1 - offset) // stride
    last = (extent - 1 - offset) // stride + 1 if extent > offset else 0
    first = min(first, size)
    return np.uint64(first), np.uint64(max(min(last, size), first))


@_inline()
def _inside(position, geometry, pads, extent, size):
    """Ranges of rows and of columns of windows in which a position is not padding."""
    top, left = _corner(position, geometry)
    first_row, last_row = _covered(top - pads[0], geometry[1], extent[0], size[0])
    first, last = _covered(left - pads[1], geometry[2], extent[1], size[1])
    return first_row, last_row, first, last


@_loop()
def _write_windows(values, pitch, inside, size, out):
    """Copies a position's values to its row of the columns; 0 where the position is padding."""
    first_row, last_row, first, last = inside
    columns = np.uint64(size[1])
    for row in range(np.uint64(size[0])):
        source, target = row * np.uint64(pitch), row * columns
        if row < first_row or row >= last_row:
            for column in range(columns):
                out[target + column] = _ZERO
            continue
        for column in range(first):
            out[target + column] = _ZERO
        for column in range(first, last):
            out[target + column] = values[source + column]
        for column in range(last, columns):
            out[target + column] = _ZERO


@_loop()
def _read_windows(row_of_columns, pitch, inside, size, values):
    """The adjoint of ``_write_windows``: gradients of a position's values, 0 for padding and between rows."""
    first_row, last_row, first, last = inside
    values[:] = _ZERO
    for row in range(first_row, last_row):
        source, target = row * np.uint64(size[1]), row * np.uint64(pitch)
        for column in range(first, last):
            values[target + column] = row_of_columns[source + column]


@_loop()
def _fuse(u, border, alpha, geometry, bound, size, scratch, e, b):
    """Eq. 9 over one plane: B of every window, into ``b``."""
    positions = border.shape[1]
    inverse = _ONE / np.float32(positions)
    for position in range(positions):
        _shifts(_elements(u, position, geometry, size, scratch), border[:, position], bound, e)
        weight = alpha[position]
        if position == 0:
            for i in range(b.shape[0]):
                b[i] = e[i] * weight
        else:
            for i in range(b.shape[0]):
                b[i] += e[i] * weight
    for i in range(b.shape[0]):
        b[i] = b[i] * inverse + _HALF


@_loop()
def _unfused_border(u, b_of_position, bound, b):
    """B of every window for one position, without fusion."""
    _shifts(u, b_of_position, bound, b)
    for i in range(b.shape[0]):
        b[i] += _HALF


@_loop()
def _quantize(t, b, scale, zero_point, levels, rounding, out):
    if rounding == _ONE:
        for i in range(out.shape[0]):
            out[i] = (_clamp(_ceil(t[i] - b[i]), _ZERO, levels) - zero_point) * scale
    else:
        for i in range(out.shape[0]):
            q = (_ceil(t[i] - b[i]) - t[i]) * rounding + t[i]
            out[i] = (_clamp(q, _ZERO, levels) - zero_point) * scale


@_loop(parallel=True, cache=True)
def _forward(x, scale, zero_point, levels, border, alpha, bordered, fused, bound, rounding, pads, geometry, size, out):
    images, channels, height, width = x.shape
    positions = out.shape[2]
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        t = np.empty((height + 2 * pads[0], width + 2 * pads[1]), np.float32)
        u = np.empty_like(t)
        _, pitch, length = _layout(t.shape[1], geometry, size)
        b = np.full(length, _HALF, np.float32)
        scratch_t, scratch_u, values = np.empty_like(b), np.empty_like(b), np.empty_like(b)
        _fill_plane(x[n, c], scale, zero_point, levels, pads, t, u)
        if bordered and fused:
            _fuse(u, border[c], alpha[c], geometry, bound, size, scratch_u, values, b)
        for position in range(positions):
            if bordered and not fused:
                u_here = _elements(u, position, geometry, size, scratch_u)
                _unfused_border(u_here, border[c, :, position], bound, b)
            t_here = _elements(t, position, geometry, size, scratch_t)
            _quantize(t_here, b, scale, zero_point, levels, rounding, values)
            inside = _inside(position, geometry, pads, (height, width), size)
            _write_windows(values, pitch, inside, size, out[n, c, position])


@_loop(fastmath={"reassoc", "nsz"})
def _sum_of_products(a, b):
    """A dot product whose order of summation is the compiler's: vectorised, the same on one kind of machine."""
    total = _ZERO
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@_loop(fastmath={"reassoc", "nsz"})
def _sum(a):
    total = _ZERO
    for i in range(a.shape[0]):
        total += a[i]
    return total


@_loop()
def _backward_of_rounding(t, b, g, scale, zero_point, levels, rounding, of_scale, of_t, of_b):
    """From the gradient of x_hat to those of s (direct part), t and B, element by element."""
    for i in range(t.shape[0]):
        rounded = _ceil(t[i] - b[i])
        q = rounded if rounding == _ONE else (rounded - t[i]) * rounding + t[i]
        of_scale[i] = _clamp(q, _ZERO, levels) - zero_point
        passed = g[i] * scale if q >= _ZERO and q <= levels else _ZERO
        of_t[i] = passed
        of_b[i] = -(passed * rounding)


@_loop()
def _backward_of_shifts(t, u, e, of_e, alpha, b, bound, levels, input_gradient, sums, of_t):
    """Of one position: sums for b0, b1, b2 and alpha; ``of_t`` receives the part through u; ``of_e`` is consumed."""
    inverse = _ONE / levels
    _shifts(u, b, bound, e)
    sums[3] = _sum_of_products(of_e, e)
    for i in range(e.shape[0]):
        of_e[i] *= alpha
    _multiply_by_slopes(u, e, b, bound, of_e)
    sums[0] = _sum(of_e)
    sums[1] = _sum_of_products(of_e, u)
    for i in range(e.shape[0]):
        e[i] = of_e[i] * u[i]
    sums[2] = _sum_of_products(e, u)
    if input_gradient:
        b1, twice_b2 = b[1], _TWO * b[2]
        for i in range(e.shape[0]):
            free = t[i] > _ZERO and t[i] < levels
            of_t[i] = of_e[i] * (twice_b2 * u[i] + b1) * inverse if free else _ZERO
    else:
        of_t[:] = _ZERO


@_loop(parallel=True, cache=True)
def _backward(
    grad,
    x,
    scale,
    zero_point,
    levels,
    border,
    alpha,
    bordered,
    fused,
    bound,
    input_gradient,
    rounding,
    pads,
    geometry,
    size,
    grad_x,
    sums_of_scale,
    sums_of_border,
):
    images, channels, height, width = x.shape
    positions = grad.shape[2]
    inverse_positions = _ONE / np.float32(positions)
    for plane in prange(images * channels):
        n, c = plane // channels, plane % channels
        t = np.empty((height + 2 * pads[0], width + 2 * pads[1]), np.float32)
        u, of_t = np.empty_like(t), np.zeros_like(t)
        _, pitch, length = _layout(t.shape[1], geometry, size)
        b = np.full(length, _HALF, np.float32)
        scratch_t, scratch_u, g, e = np.empty_like(b), np.empty_like(b), np.empty_like(b), np.empty_like(b)
        of_scale, of_b, of_t_here, total_of_b = np.empty_like(b), np.empty_like(b), np.empty_like(b), np.zeros_like(b)
        _fill_plane(x[n, c], scale, zero_point, levels, pads, t, u)
        if bordered and fused:
            _fuse(u, border[c], alpha[c], geometry, bound, size, scratch_u, e, b)
        sum_of_scale = np.float64(0.0)
        for position in range(positions):
            b_of_position = border[c, :, position]
            u_here = _elements(u, position, geometry, size, scratch_u)
            if bordered and not fused:
                _unfused_border(u_here, b_of_position, bound, b)
            t_here = _elements(t, position, geometry, size, scratch_t)
            inside = _inside(position, geometry, pads, (height, width), size)
            _read_windows(grad[n, c, position], pitch, inside, size, g)
            _backward_of_rounding(t_here, b, g, scale, zero_point, levels, rounding, of_scale, of_t_here, of_b)
            sum_of_scale += np.float64(_sum_of_products(of_scale, g))
            _add_to_elements(of_t_here, position, geometry, size, of_t)
            if bordered and fused:
                for i in range(length):
                    total_of_b[i] += of_b[i]
            elif bordered:
                sums = sums_of_border[n, c, position]
                _backward_of_shifts(
                    t_here, u_here, e, of_b, _ONE, b_of_position, bound, levels, input_gradient, sums, of_t_here
                )
                _add_to_elements(of_t_here, position, geometry, size, of_t)
        if bordered and fused:
            for i in range(length):
                total_of_b[i] *= inverse_positions
            for position in range(positions):
                t_here = _elements(t, position, geometry, size, scratch_t)
                u_here = _elements(u, position, geometry, size, scratch_u)
                of_b[:] = total_of_b
                sums, b_of_position = sums_of_border[n, c, position], border[c, :, position]
                _backward_of_shifts(
                    t_here, u_here, e, of_b, alpha[c, position], b_of_position, bound, levels, input_gradient, sums,
                    of_t_here,
                )  # fmt: skip
                _add_to_elements(of_t_here, position, geometry, size, of_t)
        for row in range(height):
            source, target = of_t[row + pads[0], pads[1] : pads[1] + width], grad_x[n, c, row]
            for column in range(width):
                target[column] = source[column] / scale
            sum_of_scale -= np.float64(_sum_of_products(target, x[n, c, row]) / scale)
        sums_of_scale[n, c] = sum_of_scale


def _plane_view(x: Tensor, window: Window) -> np.ndarray:
    """The map as an array; a window of one pixel sees each plane as one long row."""
    array: np.ndarray = x.contiguous().numpy()
    return array.reshape(*array.shape[:2], 1, -1) if window.is_pixel else array


def _arguments(
    x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window, spec: BorderSpecification
) -> tuple[object, ...]:
    numba.set_num_threads(min(torch.get_num_threads(), _MOST_THREADS))
    channels, positions = x.shape[1], window.positions
    coefficients = np.zeros((channels, 3, positions), np.float32)  # b2 = 0 is the linear form
    if border is not None:
        coefficients[:, : len(border)] = border.transpose(0, 1).numpy()
    weights = np.ones((channels, positions), np.float32) if alpha is None else np.ascontiguousarray(alpha.numpy())
    bound = _NUMBER_OF_BOUND[spec.bound]
    return (
        np.float32(scale.item()), np.float32(spec.zero_point), np.float32(spec.levels), coefficients, weights,
        border is not None, spec.fused, bound,
    )  # fmt: skip


def _geometry(window: Window) -> tuple[tuple[int, int], tuple[int, int, int, int, int]]:
    return window.padding, (window.kernel_size[1], *window.stride, *window.dilation)


def forward(
    x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window, spec: BorderSpecification,
    rounding: float,
) -> Tensor:  # fmt: skip
    """See ``reference.forward``."""
    planes = _plane_view(x, window)
    size = window.output_size(*planes.shape[2:])
    out = torch.empty(x.shape[0], x.shape[1], window.positions, size[0] * size[1])
    arguments = _arguments(x, scale, border, alpha, window, spec)
    _forward(planes, *arguments, np.float32(rounding), *_geometry(window), size, out.numpy())
    return out.view(x.shape[0], x.shape[1] * window.positions, -1)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, window: Window,
    spec: BorderSpecification, rounding: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See ``reference.backward``."""
    planes = _plane_view(x, window)
    images, channels = planes.shape[:2]
    positions = window.positions
    size = window.output_size(*planes.shape[2:])
    grads = grad.contiguous().numpy().reshape(images, channels, positions, -1)
    grad_x = np.empty_like(planes)
    sums_of_scale = torch.empty(images, channels, dtype=torch.float64)
    sums_of_border = torch.empty(images, channels, positions, 4)
    arguments = _arguments(x, scale, border, alpha, window, spec)
    _backward(
        grads, planes, *arguments, spec.input_gradient, np.float32(rounding), *_geometry(window), size, grad_x,
        sums_of_scale.numpy(), sums_of_border.numpy(),
    )  # fmt: skip
    grad_border = grad_alpha = None
    if border is not None:
        totals = sums_of_border.sum(0).permute(2, 0, 1)  # (4, C, K)
        grad_border = totals[: len(border)].contiguous()
        grad_alpha = None if alpha is None else totals[3].contiguous()
    return torch.from_numpy(grad_x).view_as(x), sums_of_scale.sum().to(scale.dtype), grad_border, grad_alpha
