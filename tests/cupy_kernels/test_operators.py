"""The torch operators: what torch.compile and export believe of them is so, on the reference and on the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from border_cases import (
    LAYERS,
    MAPS,
    PLACES,
    VARIANTS,
    layer_problem,
    tensors_of,
    training_problem,
    with_tensors,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cupy_kernels import cuda_training, operators, reference
from cupy_kernels.operators import _flat_grid, _flat_window
from cupy_kernels.packing import PackedLayer, Route
from cupy_kernels.specification import Window

TRAINING = ("3x3_all", "3x3_linear_by_position", "1x1_nearest", "3x3_depthwise_all")


@pytest.fixture(params=["reference", "kernels"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On CPU tensors the operators are the reference, or for this test the kernels."""
    if request.param == "kernels":
        request.getfixturevalue("emulated")
        monkeypatch.setattr(operators, "reference", cuda_training)
    return request.param


def operator_arguments(variant: str, place: str = "padded") -> tuple[Any, ...]:
    """Of ``aquant::border_columns``."""
    problem = training_problem(VARIANTS[variant], MAPS[place])
    given = problem["rounding"] if isinstance(problem["rounding"], Tensor) else None
    tensors = (problem["x"], problem["scale"], problem["border"], problem["alpha"], given, problem["taps"])
    spec = problem["spec"]
    return (*tensors, _flat_window(problem["window"]), _flat_grid(spec), spec.bound)


def gradient_arguments(arguments: tuple[Any, ...], columns: bool) -> tuple[Any, ...]:
    """Of ``aquant::border_gradients``."""
    value = operators.border_columns(*arguments)
    written = torch.empty_like(operators.border_columns(*arguments[:5], None, *arguments[6:])) if columns else None
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return (grad, *arguments[:6], written, *arguments[6:])


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("variant", TRAINING)
def test_border_columns(variant: str) -> None:
    opcheck(operators.border_columns, operator_arguments(variant))


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("variant", TRAINING)
def test_border_gradients(variant: str) -> None:
    arguments = operator_arguments(variant)
    opcheck(operators.border_gradients, gradient_arguments(arguments, VARIANTS[variant].columns))


@pytest.mark.parametrize(
    "computed_by",
    [
        "reference",
        "kernels",
    ],
    indirect=True,
)
def test_border_gradients_of_channels_last(computed_by: str) -> None:  # noqa: ARG001 - a fixture
    x, *rest = operator_arguments("3x3_all")
    arguments = gradient_arguments((x.contiguous(memory_format=torch.channels_last), *rest), columns=True)
    opcheck(operators.border_gradients, arguments)


@pytest.mark.parametrize(("kernel", "by"), [((16, 16), cuda_training), ((17, 16), reference)])
def test_windows_too_large_for_the_kernels_go_to_the_reference(kernel: tuple[int, int], by: object) -> None:
    on_gpu = SimpleNamespace(is_cuda=True)
    assert operators._module(on_gpu, _flat_window(Window(kernel))) is by  # type: ignore[arg-type]


def packed_arguments(x: Tensor, layer: PackedLayer, residual: Tensor | None, relu: bool) -> tuple[Any, ...]:
    """Of ``aquant::integer_convolution``."""
    return (
        x, layer.scale, layer.border, layer.alpha, layer.thresholds, layer.weight, layer.multiplier, layer.bias,
        layer.constant, layer.correction, residual, relu, layer.groups, layer.offset, layer.route,
        _flat_window(layer.window), _flat_grid(layer.spec), layer.spec.bound,
    )  # fmt: skip


OPCHECKED = [
    ("fused_groups_8_bit_weights", "reference", "padded"),
    ("fused_groups_8_bit_weights", "implicit", "strided"),
    ("pixel_fused_8_bits", "reference", "strided"),
    ("pixel_fused_8_bits", "implicit", "padded"),
    ("thresholds_1x1_4_bits", "reference", "few_windows"),
    ("thresholds_1x1_4_bits", "implicit", "few_windows"),
    ("stem_7x7_8_bits", "columns", "padded"),
    ("stem_7x7_8_bits", "columns", "strided"),
    ("depthwise_8_bits", "depthwise", "padded"),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("name", "route", "place"), OPCHECKED)
def test_integer_convolution(name: str, route: Route, place: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES[place])
    arguments = packed_arguments(problem.x, problem.packed(route), problem.residual, problem.relu)
    opcheck(operators.integer_convolution, arguments)


def significant(tensor: Tensor) -> tuple[Any, ...]:
    """What a compiler builds on: of strides those along which there is more than one element."""
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.shape, tensor.dtype, tensor.device, strides


def assert_foretold(name: str, route: Route, place: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES[place])
    layer = problem.packed(route)
    found = operators.packed_convolution(problem.x, layer, problem.residual, problem.relu)
    with FakeTensorMode() as mode:
        fakes = with_tensors(layer, {name: mode.from_tensor(tensor) for name, tensor in tensors_of(layer).items()})
        residual = None if problem.residual is None else mode.from_tensor(problem.residual)
        foretold = operators.packed_convolution(mode.from_tensor(problem.x), fakes, residual, problem.relu)
    assert significant(foretold) == significant(found)


FORETOLD = [
    ("stem_7x7_8_bits", "columns"),
    ("small_groups", "columns"),
    ("nearest", "implicit"),
    ("nearest", "reference"),
    ("fused", "reference"),
    ("pixel_8_bit_weights", "implicit"),
    ("depthwise_7_channels", "depthwise"),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "route"), FORETOLD)
def test_the_outputs_are_as_foretold(name: str, route: Route, place: str) -> None:
    assert_foretold(name, route, place)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["stem_pixel_8_bits", "pixel_fused_8_bits"])
def test_the_outputs_of_pixel_codes_are_as_foretold(name: str) -> None:
    assert_foretold(name, "columns", "strided")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_wrappers_equal_the_reference(variant: str) -> None:
    problem = training_problem(VARIANTS[variant], MAPS["strided"])
    for rounding in (1.0, 0.3, torch.tensor(0.3)):
        problem["rounding"] = rounding
        expected = reference.forward(**problem)
        assert torch.equal(operators.forward(**problem), expected)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        columns = [torch.zeros_like(reference.forward(**problem | {"taps": None})) for _ in range(2)]
        found = operators.backward(grad, **problem, columns=columns[0])
        wanted = reference.backward(grad, **problem, columns=columns[1])
        assert torch.equal(*columns)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_equals_the_reference(name: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES["strided"])
    layer = problem.packed("reference")
    found = operators.packed_convolution(problem.x, layer, problem.residual, problem.relu)
    assert torch.equal(found, problem.expected())
