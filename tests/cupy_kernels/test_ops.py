"""The one door: what it refuses, who computes, and that gradients reach every input."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from border_cases import LAYERS, PLACES, layer_problem, tensors_of, with_tensors

from cupy_kernels import cpu_loops, ops, reference
from cupy_kernels.ops import (
    border_codes,
    border_columns,
    implementation,
    integer_convolution,
    integer_route,
    kernels_available,
    reference_only,
)
from cupy_kernels.specification import BorderSpecification, Window

WINDOW = Window((3, 3), padding=(1, 1))


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "x": torch.rand(1, 2, 5, 5), "scale": torch.tensor(0.3), "border": torch.zeros(3, 2, 9),
        "alpha": torch.ones(2, 9), "window": WINDOW, "spec": BorderSpecification(3), "rounding": 1.0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.rand(2, 5, 5)}, r"x must be .* not torch.float32 of shape \(2, 5, 5\)"),
        ({"x": torch.ones(1, 2, 5, 5, dtype=torch.int64)}, r"x must be a floating point .* torch.int64"),
        ({"scale": torch.tensor(0.3).double()}, r"scale is torch\.float64 on cpu, x is torch\.float32 on cpu"),
        ({"border": torch.zeros(3, 2, 9).half()}, r"border is torch\.float16 on cpu, x is torch\.float32 on cpu"),
        ({"alpha": torch.ones(2, 9, device="meta")}, r"alpha is torch\.float32 on meta, x is torch\.float32 on cpu"),
        ({"scale": torch.rand(2)}, r"scale must be a scalar tensor, not of shape \(2,\)"),
        ({"scale": torch.rand(1)}, r"scale must be a scalar tensor, not of shape \(1,\)"),
        ({"border": torch.zeros(3, 2, 4)}, r"border must be \(2 or 3, 2, 9\), not \(3, 2, 4\)"),
        ({"border": torch.zeros(3, 1, 9)}, r"border must be .* not \(3, 1, 9\)"),
        ({"border": torch.zeros(1, 2, 9)}, r"border must be .* not \(1, 2, 9\)"),
        ({"border": torch.zeros(4, 2, 9)}, r"border must be .* not \(4, 2, 9\)"),
        ({"border": torch.tensor(0.0)}, r"border must be .* not \(\)"),
        ({"alpha": torch.ones(9, 2)}, r"alpha must be \(2, 9\).* got \(9, 2\)"),
        ({"border": None}, "alpha must be .* beside a fused border"),
        ({"spec": BorderSpecification(3, fused=False)}, "alpha must be .* beside a fused border"),
        (
            {"window": Window((7, 7)), "border": None, "alpha": None},
            r"window of \(7, 7\).*does not fit.*\(5, 5\)",
        ),
    ],
)
def test_refusals_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        border_columns(**arguments(**changes))


def test_who_computes() -> None:
    single, double = torch.rand(1), torch.rand(1, dtype=torch.float64)
    assert implementation(single) is cpu_loops
    assert implementation(double) is reference
    with reference_only():
        assert implementation(single) is reference
        with reference_only():
            pass
        assert implementation(single) is reference
    assert implementation(single) is cpu_loops


def test_reference_only_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert implementation(torch.rand(1)) is cpu_loops


def test_gradients_reach_every_input_by_both_implementations() -> None:
    g = torch.Generator().manual_seed(0)
    x, border = torch.randn(2, 2, 5, 5, generator=g), torch.randn(3, 2, 9, generator=g) * 0.2
    grads = []
    for forced in (True, False):
        leaves = [value.clone().requires_grad_() for value in (x, torch.tensor(0.3), border, torch.ones(2, 9))]
        if forced:
            with reference_only():
                border_columns(*leaves, WINDOW, BorderSpecification(3)).square().sum().backward()
        else:
            border_columns(*leaves, WINDOW, BorderSpecification(3)).square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
        grads.append([leaf.grad for leaf in leaves])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_codes_stand_behind_the_columns() -> None:
    given = arguments(x=torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1)))
    columns = border_columns(**given)
    given.pop("rounding")
    assert torch.equal(border_codes(**given).float() * given["scale"], columns)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    kernels_available.cache_clear()
    yield
    kernels_available.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(
    ("found", "capability", "message"),
    [
        (None, (9, 0), r"CuPy is not installed \(pip install cupy-cuda13x\), so plain torch computes on the GPU"),
        (object(), (7, 5), r"cuda:0 has compute capability \(7, 5\), the kernels need \(8, 0\), so plain torch"),
    ],
)
def test_why_plain_torch_computes_is_said_once(
    found: object, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.warns(RuntimeWarning, match=message):
        assert not kernels_available(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_available(GPU)


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_with_cupy_nothing_is_said(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "cupy" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_available(GPU)


def test_the_route_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, cpu, gpu = torch.Size((64, 32, 3, 3)), torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(ops, "kernels_available", lambda _: True)
    assert integer_route(shape, 1, cpu) == "reference"
    assert integer_route(shape, 1, gpu) == "implicit"
    assert integer_route(torch.Size((64, 3, 7, 7)), 1, gpu) == "columns"
    assert integer_route(torch.Size((64, 1, 3, 3)), 64, gpu) == "depthwise"
    with reference_only():
        assert integer_route(shape, 1, gpu) == "reference"
    monkeypatch.setattr(ops, "kernels_available", lambda _: False)
    assert integer_route(shape, 1, gpu) == "reference"


INTEGER = layer_problem(LAYERS["stem_thresholds"], PLACES["padded"])
"""Of fp16, 3 channels, 16 outputs; with a residual."""


@pytest.mark.parametrize("name", ["stem_thresholds", "fused_5x5_8_bits", "depthwise_pixel_8_bits"])
def test_an_integer_convolution(name: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES["padded"])
    found = integer_convolution(problem.x, problem.packed("reference"), problem.residual, problem.relu)
    assert torch.equal(found, problem.expected())
    plain = problem._replace(residual=None, relu=False)
    assert torch.equal(integer_convolution(problem.x, problem.packed("reference")), plain.expected())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (INTEGER.x[0], r"x must be float16 or float32 \(N, 3, H, W\), not torch.float16 \(3, 10, 9\)"),
        (INTEGER.x.double(), r"x must be .* not torch.float64 \(2, 3, 10, 9\)"),
        (INTEGER.x.to(torch.bfloat16), r"x must be .* not torch.bfloat16"),
        (INTEGER.x[:, :2], r"x must be .* not torch.float16 \(2, 2, 10, 9\)"),
        (INTEGER.x.to("meta"), "x is on meta, the layer on cpu"),
        (INTEGER.x.float(), "the layer was packed for torch.float16, x is torch.float32"),
        (INTEGER.x[:, :, :0], r"window of \(3, 3\).*does not fit into a map of \(0, 9\)"),
    ],
)
def test_inputs_of_an_integer_convolution_are_refused_by_name(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integer_convolution(x, INTEGER.packed("columns"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda residual: residual[:, :, 1:],
            r"residual must be torch.float16 \(2, 16, 10, 9\) on cpu.*\(2, 16, 9, 9\)",
        ),
        (lambda residual: residual[:1], r"residual must be .* not torch.float16 \(1, 16, 10, 9\) on cpu"),
        (lambda residual: residual.float(), r"residual must be torch.float16 .* not torch.float32"),
        (lambda residual: residual.to("meta"), r"residual must be .* on cpu, not .* on meta"),
    ],
)
def test_residuals_of_an_integer_convolution_are_refused_by_name(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integer_convolution(INTEGER.x, INTEGER.packed("reference"), change(INTEGER.residual))


def test_a_layer_on_another_device_is_refused() -> None:
    layer = INTEGER.packed("reference")
    elsewhere = with_tensors(layer, {name: tensor.to("meta") for name, tensor in tensors_of(layer).items()})
    with pytest.raises(ValueError, match="x is on cpu, the layer on meta"):
        integer_convolution(INTEGER.x, elsewhere)
