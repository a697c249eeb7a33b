"""Window geometry is that of torch's own unfolding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cupy_kernels.specification import Window

small = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    small,
    small,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    small,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_output_size_is_torch_s(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    size: tuple[int, int],
) -> None:  # fmt: skip
    window = Window(kernel, stride, padding, dilation)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(extent + 2 * pad < span for extent, pad, span in zip(size, padding, spans, strict=True)):
        with pytest.raises(ValueError, match="does not fit"):
            window.output_size(*size)
        return
    rows, columns = window.output_size(*size)
    unfolded = F.unfold(torch.zeros(1, 1, *size), kernel, dilation, padding, stride)
    assert unfolded.shape == (1, window.positions, rows * columns)


@given(small, small)
def test_a_pixel_is_a_pixel(kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    assume((kernel, stride) != ((1, 1), (1, 1)))
    assert Window().is_pixel
    assert not Window(kernel, stride).is_pixel
