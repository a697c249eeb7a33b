"""The training kernels, compiled for the CPU, against the reference: forward bit for bit, gradients to their sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import border_cases
import cuda_on_cpu
import pytest
import torch
from border_cases import MAPS, VARIANTS, Map, Values, Variant, check_training, training_problem
from guarded_memory import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cupy_kernels import compilation, convolution, cuda_training, operators, ops, reference
from cupy_kernels.convolution import border_convolution
from cupy_kernels.ops import border_columns, reference_only
from cupy_kernels.specification import BorderSpecification, Window

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_reference(variant: str) -> None:
    for name, place in MAPS.items():
        print(name)  # which one it was, should it fail
        with GuardedMemory():
            check_training(VARIANTS[variant], place)


@pytest.mark.parametrize("variant", ["3x3_all", "3x3_depthwise_by_position", "1x1_by_position", "5x5_all"])
def test_a_map_too_large_for_shared_memory(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is built where it belongs."""
    monkeypatch.setattr(cuda_training, "SHARED_MAP_BYTES", 0)
    for place in MAPS.values():
        with GuardedMemory():
            check_training(VARIANTS[variant], place)


def test_the_largest_map_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def launch(file: str, constants: dict[str, int], *arguments: Any) -> None:  # noqa: ARG001
        seen.append((constants["SHARED_MAP"], arguments[-1]))

    monkeypatch.setattr(cuda_training, "launch", launch)
    rows = (cuda_training.SHARED_MAP_BYTES - 2656) // 1024  # beside what one position takes
    for height in (rows, rows + 1):
        x = torch.zeros(1, 1, height, 256)
        spec, one = BorderSpecification(3), torch.tensor(1.0)
        cuda_training.backward(torch.zeros(1, 1, height * 256), x, one, None, None, Window(), spec, 1.0)
    assert seen == [(True, rows * 1024), (False, 0)]


@pytest.mark.parametrize("error", [-1, 1])
@pytest.mark.parametrize("variant", ["3x3_all", "3x3_stretched_by_position", "5x5_depthwise_by_position"])
def test_the_device_s_reciprocal_may_be_off(variant: str, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_for_cpu(text: str, entry: str, _: torch.device) -> Any:
        return cuda_on_cpu.compile_for_cpu(text, entry, error)

    monkeypatch.setattr(compilation, "compile_for_gpu", compile_for_cpu)
    compilation.compiled.cache_clear()
    check_training(VARIANTS[variant], MAPS["padded"])
    compilation.compiled.cache_clear()


sides = st.tuples(st.integers(0, 7), st.integers(0, 7))
places = st.builds(
    Map,
    images=st.integers(1, 3),
    channels=st.integers(1, 3),
    extra=sides,
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    levels=st.sampled_from([1, 3, 7, 15, 255]),
    zero_point=st.integers(0, 3),
    values=st.sampled_from(get_args(Values)),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["3x3_all", "2x3_clip", "5x3_by_position"]), places, st.integers(0, 100))
def test_any_geometry(variant: str, place: Map, seed: int) -> None:
    place = place._replace(zero_point=0 if place.values == "edges" else min(place.zero_point, place.levels))
    with GuardedMemory():
        check_training(VARIANTS[variant], place, seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, r"x must be float32 \(2, 3, 4, 4\), not torch\.uint8"),
        ({"scale": torch.tensor(0.3).double()}, r"scale must be float32 \(\), not torch\.float64"),
        ({"border": torch.zeros(3, 2, 9)}, r"border must be float32 \(3, 3, 9\), not torch\.float32 \(3, 2, 9\)"),
        ({"alpha": torch.zeros(3, 9).half()}, r"alpha must be float32 \(3, 9\), not torch\.float16"),
        ({"rounding": torch.tensor(0.5).double()}, r"rounding must be float32 \(\), not torch\.float64"),
        ({"taps": torch.zeros(9)}, r"taps must be float32 \(3, 9\), not torch\.float32 \(9,\)"),
    ],
)
def test_what_a_kernel_would_misread_is_refused(changes: dict[str, Any], message: str) -> None:
    problem = training_problem(VARIANTS["3x3_all"], MAPS["padded"])
    grad = cuda_training.forward(**problem)
    with pytest.raises(ValueError, match=message):
        cuda_training.forward(**problem | changes)
    with pytest.raises(ValueError, match=message):
        cuda_training.backward(grad, **problem | changes)


@pytest.mark.parametrize("name", ["grad", "columns"])
def test_a_gradient_or_columns_of_another_size_are_refused(name: str) -> None:
    problem = training_problem(VARIANTS["3x3_all"], MAPS["padded"])
    good = cuda_training.forward(**problem)
    for wrong in (good[1:], good.double()):
        with pytest.raises(ValueError, match=f"{name} must be {good.numel()} float32 values, not torch"):
            cuda_training.backward(**problem | {"grad": good, "columns": good} | {name: wrong})


def test_no_images() -> None:
    problem = training_problem(VARIANTS["3x3_all"], MAPS["padded"])
    problem["x"] = problem["x"][:0]
    columns = cuda_training.forward(**problem)
    gradients = cuda_training.backward(columns, **problem)
    assert columns.shape[0] == gradients.x.shape[0] == 0
    assert gradients.border is not None
    assert float(gradients.scale) == float(gradients.border.abs().sum()) == 0


@pytest.mark.parametrize("variant", ["3x3_all", "3x3_clip_by_position", "3x3_nearest", "5x5_all"])
def test_nan_passes_and_infinity_gets_an_end_code(variant: str) -> None:
    for place in ("padded", "strided"):
        problem = training_problem(VARIANTS[variant], MAPS[place])
        problem["x"].view(-1)[[3, 20, 35]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        found, expected = cuda_training.forward(**problem), reference.forward(**problem)
        assert found.isnan().any()
        assert not found.isinf().any()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_inputs_that_are_not_contiguous() -> None:
    variant = VARIANTS["3x3_depthwise_all"]
    problem = training_problem(variant, MAPS["padded"])
    expected = reference.forward(**problem)
    turned = problem | {
        "x": problem["x"].contiguous(memory_format=torch.channels_last),
        **{name: problem[name].mT.contiguous().mT for name in ("border", "alpha", "taps")},
    }
    assert torch.equal(cuda_training.forward(**turned), expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    found = cuda_training.backward(grad.mT.contiguous().mT, **turned)
    border_cases.assert_gradients(found, reference.backward(grad, **problem), grad, problem)


def test_a_rounding_that_is_a_number_below_1_is_refused() -> None:
    """On a device it is a tensor, so that a graph can be replayed with another."""
    problem = training_problem(VARIANTS["3x3"], MAPS["padded"]) | {"rounding": 0.5}
    with pytest.raises(ValueError, match=r"rounding must be 1 or a tensor on the device, not the number 0\.5"):
        cuda_training.forward(**problem)
    grad = cuda_training.forward(**problem | {"rounding": 1.0})
    with pytest.raises(ValueError, match="rounding must be 1 or a tensor"):
        cuda_training.backward(grad, **problem)


# From here on as on a GPU: the operators, which launch the kernels for x.


@pytest.fixture
def through_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "reference", cuda_training)
    for module in (ops, convolution):
        chosen = module.implementation
        monkeypatch.setattr(
            module, "implementation", lambda x, chosen=chosen: reference if chosen(x) is reference else operators
        )


KINDS = {"ordinary": (1, 6), "grouped": (2, 6), "depthwise": (4, 4)}
LEAVES = ("x", "scale", "border", "alpha", "weight")
DEEP_CHECKS = {
    "weighted": (VARIANTS["3x3_all"], 0.3),
    "by_position": (replace(VARIANTS["3x3_clip_by_position"], softened=False), 1.0),
    "nearest": (VARIANTS["3x3_nearest"], 1.0),
    "linear_5x5": (Variant((5, 5), terms=2, bound="stretched"), torch.tensor(0.6)),
}


def convolution_problem(kind: str, variant: Variant, rounding: float | Tensor) -> dict[str, Any]:
    """Arguments of ``border_convolution``; what is differentiated has gradients."""
    groups, outputs = KINDS[kind]
    problem = training_problem(variant, MAPS["padded"]._replace(channels=4, images=3))
    del problem["taps"]
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(outputs, 4 // groups, *variant.kernel, generator=g), torch.randn(outputs, generator=g)
    problem |= {"rounding": rounding, "weight": weight, "bias": bias, "groups": groups}
    return problem | {name: problem[name].requires_grad_() for name in LEAVES if problem[name] is not None}


def value_and_gradients(function: Any, problem: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: problem[name] for name in LEAVES if problem.get(name) is not None}
    value = function(**problem)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(value, list(leaves.values()), grad)
    return {"value": value.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        error, size = float((found[name] - expected).abs().max()), float(expected.abs().max())
        assert error <= 2e-5 * size, f"{name}: {error} of {size}"


@pytest.mark.usefixtures("through_operators")
@pytest.mark.parametrize("check", DEEP_CHECKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_and_all_its_gradients(kind: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = convolution_problem(kind, *DEEP_CHECKS[check])
    with reference_only():
        wanted = value_and_gradients(border_convolution, problem)
    for budget in (1, 1 << 30):  # image by image, and all at once
        monkeypatch.setattr(convolution, "COLUMN_BYTES_CPU", budget)
        assert_same(value_and_gradients(border_convolution, problem), wanted)


@pytest.mark.usefixtures("through_operators")
@pytest.mark.parametrize("check", DEEP_CHECKS)
def test_columns_and_all_their_gradients(check: str) -> None:
    problem = convolution_problem("ordinary", *DEEP_CHECKS[check])
    problem = {name: value for name, value in problem.items() if name not in ("weight", "bias", "groups")}
    with reference_only():
        wanted = value_and_gradients(border_columns, problem)
    found = value_and_gradients(border_columns, problem)
    assert torch.equal(found["value"], wanted["value"])
    assert_same(found, wanted)


@pytest.mark.usefixtures("through_operators")
def test_the_kernels_are_what_computed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    kept = cuda_training.launch
    monkeypatch.setattr(cuda_training, "launch", lambda file, *rest: (files.append(file), kept(file, *rest)))
    value_and_gradients(border_convolution, convolution_problem("ordinary", *DEEP_CHECKS["weighted"]))
    assert files == ["border_columns.cu", "border_gradients.cu"]
