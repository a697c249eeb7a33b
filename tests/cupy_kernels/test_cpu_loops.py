"""The fused loops against the reference: forward bit for bit, gradients to the order of their sums."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cupy_kernels import cpu_loops, reference
from cupy_kernels.specification import BorderSpecification, Bound, Window

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
windows = st.one_of(
    st.just(Window()),
    st.builds(
        Window,
        kernel_size=pairs,
        stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),  # wider than half the kernel, too
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ),
)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(windows)
    levels = draw(st.sampled_from([1, 3, 7, 15, 255]))
    zero_point = draw(st.integers(0, levels)) if draw(st.booleans()) else 0
    fused = draw(st.booleans())
    spec = BorderSpecification(levels, zero_point, draw(st.sampled_from(get_args(Bound))), fused, draw(st.booleans()))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels, height, width = draw(st.integers(1, 3)), draw(st.integers(5, 9)), draw(st.integers(5, 9))
    shape = (draw(st.integers(1, 2)), channels, height, width)
    scale = torch.tensor(draw(st.sampled_from([0.25, 0.37, 1.0])))
    codes = torch.rand(shape, generator=g) * (levels + 2) - 1  # past both ends of the clip
    kind = draw(st.sampled_from(["random", "halves", "ends", "relu"]))
    if kind == "halves":
        codes = codes.floor() + 0.5
    elif kind == "ends":
        ends = torch.tensor([-1.0, 0.0, 0.5, levels - 0.5, float(levels), levels + 1.0])
        codes = ends[torch.randint(len(ends), shape, generator=g)]
    elif kind == "relu":
        codes = (codes - levels / 2).clamp(min=0) + zero_point
    border = alpha = None
    if draw(st.booleans()):
        size = draw(st.sampled_from([0.0, 0.3, 3.0]))
        border = torch.randn(draw(st.sampled_from([2, 3])), channels, window.positions, generator=g) * size
        if fused and draw(st.booleans()):
            alpha = torch.rand(channels, window.positions, generator=g)
    rounding = draw(st.sampled_from([0.0, 0.4, 1.0]))
    return {
        "x": (codes - zero_point) * scale, "scale": scale, "border": border, "alpha": alpha, "window": window,
        "spec": spec, "rounding": rounding,
        "taps": torch.randn(channels, window.positions, generator=g) if draw(st.booleans()) else None,
    }  # fmt: skip


def assert_close(
    actual: Tensor | None, wanted: Tensor | None, name: str, relative: float = 1e-5, terms: float = 0.0
) -> None:
    """Within ``relative`` of the largest element; of a sum that nearly cancels, of the size of its ``terms``."""
    assert (actual is None) == (wanted is None), name
    if actual is not None and wanted is not None:
        assert actual.shape == wanted.shape
        error, size = float((actual - wanted).abs().max()), max(float(wanted.abs().max()), terms)
        assert error <= relative * size + 1e-5, f"{name}: {error} of {size}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_equal_to_the_reference(problem: dict[str, Any]) -> None:
    expected = reference.forward(**problem)
    assert torch.equal(cpu_loops.forward(**problem), expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    columns = reference.forward(**problem | {"taps": None})
    written = [torch.full_like(columns, torch.nan) for _ in range(2)]
    actual = cpu_loops.backward(grad, **problem, columns=written[0])._asdict()
    wanted = reference.backward(grad, **problem, columns=written[1])._asdict()
    size = 1.0 if problem["taps"] is None else float(problem["taps"].abs().max())
    for name, gradient in actual.items():
        terms = float(grad.abs().sum()) * problem["spec"].levels * size if name == "scale" else 0.0
        assert_close(gradient, wanted[name], name, terms=terms)
    assert torch.equal(written[0], columns)
    assert torch.equal(written[1], columns)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_the_gradients_of_a_weighted_sum_are_those_of_its_terms(problem: dict[str, Any]) -> None:
    """sum_j w_j x_hat_j through autograd over the columns, against the pass that never writes them."""
    taps = problem.pop("taps")
    assume(taps is not None)
    columns = reference.forward(**problem)
    channels, positions = taps.shape
    spread = columns.view(len(columns), channels, positions, -1)
    assert_close(reference.forward(**problem, taps=taps), (spread * taps[:, :, None]).sum(2), "sum")
    grad = torch.randn(len(columns), channels, spread.shape[3], generator=torch.Generator().manual_seed(0))
    of_columns = (grad[:, :, None] * taps[:, :, None]).reshape(columns.shape)
    wanted = reference.backward(of_columns, **problem)
    actual = reference.backward(grad, **problem, taps=taps)
    terms = float(of_columns.abs().sum()) * problem["spec"].levels
    for name in ("x", "scale", "border", "alpha"):
        assert_close(getattr(actual, name), getattr(wanted, name), name, terms=terms if name == "scale" else 0.0)
    assert_close(actual.taps, (spread * grad[:, :, None]).sum((0, 3)), "taps")


@pytest.mark.parametrize("bound", get_args(Bound))
@pytest.mark.parametrize("fused", [True, False])
def test_equal_on_a_larger_map(bound: Bound, fused: bool) -> None:
    g = torch.Generator().manual_seed(5)
    problem: dict[str, Any] = {
        "x": torch.randn(3, 7, 31, 29, generator=g), "scale": torch.tensor(0.11),
        "border": torch.randn(3, 7, 9, generator=g), "alpha": None, "window": Window((3, 3), (2, 2), (1, 1)),
        "spec": BorderSpecification(15, 5, bound, fused), "rounding": 1.0,
    }  # fmt: skip
    expected = reference.forward(**problem)
    assert torch.equal(cpu_loops.forward(**problem), expected)
    grad = torch.randn(expected.shape, generator=g)
    actual, wanted = cpu_loops.backward(grad, **problem), reference.backward(grad, **problem)
    for name, one, other in zip(("x", "scale", "border"), actual, wanted, strict=False):
        assert_close(one, other, name, 2e-5)


@pytest.mark.parametrize("bordered", [True, False])
@pytest.mark.parametrize("rounding", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_nan_stays_where_the_reference_has_it(bordered: bool, rounding: float, fused: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 2, 6, 5, generator=g)
    x[0, 0, 2, 3] = torch.nan
    x[0, 1, 0, 0] = torch.inf
    x[0, 1, 5, 4] = -torch.inf
    window = Window((3, 3), padding=(1, 1))
    border = torch.randn(3, 2, 9, generator=g) if bordered else None
    spec = BorderSpecification(3, 1, fused=fused)
    static = (torch.tensor(0.5), border, None, window, spec, rounding)
    actual, expected = cpu_loops.forward(x, *static), reference.forward(x, *static)
    assert expected.isnan().any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_the_number_of_threads_changes_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    x, border = torch.randn(4, 5, 9, 9, generator=g), torch.randn(3, 5, 9, generator=g)
    static: tuple[Any, ...] = (
        torch.tensor(0.2), border, None, Window((3, 3), padding=(1, 1)), BorderSpecification(7, 3), 1.0,
    )  # fmt: skip
    grad = torch.randn(cpu_loops.forward(x, *static).shape, generator=g)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            forward, backward = cpu_loops.forward(x, *static), cpu_loops.backward(grad, x, *static)
            results.append([forward, *(value for value in backward if value is not None)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_map_that_is_not_contiguous() -> None:
    g = torch.Generator().manual_seed(6)
    x = torch.randn(2, 6, 5, 3, generator=g).permute(0, 3, 1, 2)
    static: tuple[Any, ...] = (torch.tensor(0.3), None, None, Window((3, 3)), BorderSpecification(7, 3), 1.0)
    expected = reference.forward(x, *static)
    assert torch.equal(cpu_loops.forward(x, *static), expected)
    grad = torch.randn(expected.shape[::-1], generator=g).permute(2, 1, 0)
    assert_close(cpu_loops.backward(grad, x, *static)[0], reference.backward(grad, x, *static)[0], "x")


def test_torch_keeps_its_threads_when_the_loops_start_theirs() -> None:
    """In a fresh process: the first run of a program would else give other bytes than the second."""
    program = """
import torch
torch.set_num_threads(1)
torch.__config__.parallel_info()  # which sets OpenMP's number, as the first operation does
import cupy_kernels.cpu_loops
print(torch.__config__.parallel_info())
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"omp_get_max_threads\(\) : (\d+)", printed) == ["1"]
