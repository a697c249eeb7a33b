"""Windows over a padded map for the fused loops: where a position's elements lie, and how they are moved.

With stride 1 the elements of a position are a run of the padded map itself, row after row with the map's pitch (the
few numbers between two rows belong to no window and are computed along); with other strides they are gathered first.
Inner loops run over one flat range either way. Index arithmetic is unsigned, since for a signed index numba would
check whether to count from the end.
"""

from __future__ import annotations

import numpy as np

from cupy_kernels.cpu_arithmetic import inline, loop

_ZERO = np.float32(0)


@inline()
def _corner(position, geometry):
    """Row and column, in the padded map, of a position's element in the first window."""
    kernel_x, _, _, dilation_y, dilation_x = geometry
    return position // kernel_x * dilation_y, position % kernel_x * dilation_x


@inline()
def layout(padded_width, geometry, size):
    """(dense, pitch, length) of a position's elements."""
    dense = geometry[1] == 1 and geometry[2] == 1
    pitch = padded_width if dense else size[1]
    return dense, pitch, (size[0] - 1) * pitch + size[1]


@loop()
def elements(padded, position, geometry, size, scratch):
    """A position's elements: a run of the padded map, or gathered into ``scratch``."""
    top, left = _corner(position, geometry)
    dense, pitch, length = layout(padded.shape[1], geometry, size)
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


@loop()
def add_to_elements(values, position, geometry, size, padded):
    """The adjoint of ``_elements``."""
    top, left = _corner(position, geometry)
    dense, pitch, length = layout(padded.shape[1], geometry, size)
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


@inline()
def _covered(offset, stride, extent, size):
    """The half-open range of windows whose element, at ``offset`` from the unpadded map, lies inside that map."""
    first = 0 if offset >= 0 else (stride - 1 - offset) // stride
    last = (extent - 1 - offset) // stride + 1 if extent > offset else 0
    first = min(first, size)
    return np.uint64(first), np.uint64(max(min(last, size), first))


@inline()
def windows_inside(position, geometry, pads, extent, size):
    """Ranges of rows and of columns of windows in which a position is not padding."""
    top, left = _corner(position, geometry)
    first_row, last_row = _covered(top - pads[0], geometry[1], extent[0], size[0])
    first, last = _covered(left - pads[1], geometry[2], extent[1], size[1])
    return first_row, last_row, first, last


@loop()
def write_windows(values, pitch, inside, size, out):
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


@loop()
def read_windows(row_of_columns, pitch, inside, size, values):
    """The adjoint of ``_write_windows``: gradients of a position's values, 0 for padding and between rows."""
    first_row, last_row, first, last = inside
    values[:] = _ZERO
    for row in range(first_row, last_row):
        source, target = row * np.uint64(size[1]), row * np.uint64(pitch)
        for column in range(first, last):
            values[target + column] = row_of_columns[source + column]


@loop()
def add_windows(values, factor, pitch, inside, size, out):
    """Adds a position's values times ``factor`` to the sum over positions; a position that is padding adds nothing."""
    first_row, last_row, first, last = inside
    for row in range(first_row, last_row):
        source, target = row * np.uint64(pitch), row * np.uint64(size[1])
        for column in range(first, last):
            out[target + column] += values[source + column] * factor
