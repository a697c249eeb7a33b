"""The kernels on a real device: the emulator's cases, and what it lacks: streams, graphs, the device's own units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from border_cases import (
    HALVES,
    LAYER_ROUTES,
    LAYERS,
    MAPS,
    PLACES,
    VARIANTS,
    Layer,
    LayerProblem,
    Map,
    Variant,
    all_halves,
    assert_gradients,
    check_training,
    evaluation,
    layer_problem,
    moved,
    tensors_of,
    training_problem,
)
from torch import Tensor
from torch.library import opcheck

from cupy_kernels import compilation, cuda_training, operators, reference
from cupy_kernels.convolution import border_convolution
from cupy_kernels.operators import _flat_grid, _flat_window
from cupy_kernels.ops import implementation, integer_convolution, reference_only
from cupy_kernels.packing import Route

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("place", MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_the_reference(variant: str, place: str) -> None:
    check_training(VARIANTS[variant], MAPS[place], device=GPU)
    problem = training_problem(VARIANTS[variant], MAPS[place])  # and the one on the CPU, bit for bit
    found = cuda_training.forward(**moved(problem, GPU))
    assert torch.equal(found.cpu(), reference.forward(**problem))


@pytest.mark.parametrize("variant", ["3x3_all", "3x3_depthwise_by_position", "7x7"])
def test_a_map_too_large_for_shared_memory(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_training, "SHARED_MAP_BYTES", 0)
    for place in MAPS.values():
        check_training(VARIANTS[variant], place, device=GPU)


@pytest.mark.parametrize("variant", ["3x3", "7x7"])
@pytest.mark.parametrize(
    "size", [(91, 91), (93, 93), (110, 110), (110, 111), (112, 112), (136, 136), (137, 137), (152, 152), (153, 153)]
)
def test_maps_about_the_limits_of_shared_memory(variant: str, size: tuple[int, int]) -> None:
    """48 KiB, beyond which a kernel has to ask, its static part included; and about 72 or 91, beyond which it does
    without.
    """
    kernel = VARIANTS[variant].kernel
    extra = (size[0] - kernel[0], size[1] - kernel[1])
    check_training(VARIANTS[variant], Map(1, 1, extra, (1, 1), (1, 1), (1, 1), 7, 2, "random"), device=GPU)


@pytest.mark.parametrize("variant", ["3x3_all", "3x3_clip_by_position", "5x5_all"])
def test_nan_passes_and_infinity_gets_an_end_code(variant: str) -> None:
    problem = training_problem(VARIANTS[variant], MAPS["padded"])
    problem["x"].view(-1)[[3, 20, 35]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found = cuda_training.forward(**moved(problem, GPU)).cpu()
    torch.testing.assert_close(found, reference.forward(**problem), rtol=0, atol=0, equal_nan=True)


def on_gpu(problem: LayerProblem, route: Route) -> Tensor:
    residual = None if problem.residual is None else problem.residual.to(GPU)
    return integer_convolution(problem.x.to(GPU), problem.packed(route).to(GPU), residual, problem.relu)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "route"), LAYER_ROUTES)
def test_integers_equal_the_reference_on_the_cpu(name: str, route: Route, place: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES[place])
    assert torch.equal(on_gpu(problem, route).cpu(), problem.expected())


@pytest.mark.parametrize("name", HALVES)
def test_every_half(name: str) -> None:
    problem = all_halves(HALVES[name])
    assert torch.equal(on_gpu(problem, "depthwise").cpu(), problem.expected())


@pytest.mark.parametrize("outputs", [20, 50, 100, 300])
@pytest.mark.parametrize("images", [1, 40])
def test_blocks_of_all_sizes(outputs: int, images: int) -> None:
    place = PLACES["padded"]._replace(images=images, extra=(25, 27))
    problem = layer_problem(Layer(36, outputs, alpha=True, weight_bits=8), place)
    assert torch.equal(on_gpu(problem, "implicit").cpu(), problem.expected())


def test_packing_on_the_device_is_packing_on_the_cpu() -> None:
    for name, route in LAYER_ROUTES:
        problem = layer_problem(LAYERS[name], PLACES["padded"])
        there = problem._replace(given=moved(problem.given, GPU)).packed(route)
        for field, tensor in tensors_of(problem.packed(route)).items():
            assert torch.equal(tensors_of(there)[field].cpu(), tensor), (name, field)


def evaluate(expression: str) -> Callable[[Tensor], Tensor]:
    """The expression of a[i] on the device."""
    kernel = compilation.compile_for_gpu(evaluation(expression), "evaluate", GPU)

    def run(values: Tensor) -> Tensor:
        a = values.to(GPU)
        out = torch.full_like(a, 12345.0)
        kernel((1024,), 256, [compilation._scalar(argument) for argument in (a, a, out, len(a))], 0)
        return out.cpu()

    return run


def test_the_sigmoid_of_all_floats() -> None:
    """From 2^-12, below which its denominator is 1, to its limit of 8: with the device's approximate reciprocal."""
    run = evaluate("sigmoid_minus_half(a[i])")
    first, last = (int(torch.tensor(value).view(torch.int32)) for value in (2.0**-12, 8.0))
    for begin in range(first, last + 1, 1 << 24):
        w = torch.arange(begin, min(begin + (1 << 24), last + 1), dtype=torch.int32).view(torch.float32)
        assert torch.equal(run(w), reference.sigmoid_minus_half(w))


def test_quotients_and_ceilings() -> None:
    values = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)) * 50
    scale = torch.tensor(0.37)
    t = (values / scale + 5).clamp(-2, 17)
    assert torch.equal(evaluate("Grid(0.37f, 5.0f, 15.0f).t(a[i])")(values), t)
    assert torch.equal(evaluate("ceil_of(a[i])")(values), values.ceil())


LEAVES = ("x", "scale", "border", "alpha", "weight")
KINDS = {"ordinary": (1, 6), "grouped": (2, 6), "depthwise": (4, 4)}


def convolution_problem(kind: str) -> dict[str, Any]:
    """Arguments of ``border_convolution`` on the GPU; what is differentiated has gradients."""
    groups, outputs = KINDS[kind]
    problem = training_problem(Variant(alpha=True, softened=True), MAPS["padded"]._replace(channels=4))
    del problem["taps"]
    g = torch.Generator().manual_seed(1)
    problem |= {"weight": torch.randn(outputs, 4 // groups, 3, 3, generator=g), "bias": None}
    problem = moved(problem, GPU) | {"groups": groups}
    return problem | {name: problem[name].requires_grad_() for name in LEAVES}


def value_and_gradients(problem: dict[str, Any]) -> list[Tensor]:
    value = border_convolution(**problem)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), [problem[name] for name in LEAVES])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_and_all_its_gradients(kind: str) -> None:
    problem = convolution_problem(kind)
    assert implementation(problem["x"]) is operators
    found = value_and_gradients(problem)
    with reference_only():
        wanted = value_and_gradients(problem)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@pytest.mark.parametrize("variant", ["3x3_all", "3x3_linear_by_position", "1x1_nearest", "3x3_depthwise_all"])
def test_opcheck_of_training(variant: str) -> None:
    problem = moved(training_problem(VARIANTS[variant], MAPS["padded"]), GPU)
    given = problem["rounding"] if isinstance(problem["rounding"], Tensor) else None
    tensors = (problem["x"], problem["scale"], problem["border"], problem["alpha"], given, problem["taps"])
    numbers = (_flat_window(problem["window"]), _flat_grid(problem["spec"]), problem["spec"].bound)
    opcheck(operators.border_columns, (*tensors, *numbers))
    grad = torch.randn_like(operators.border_columns(*tensors, *numbers))
    columns = torch.empty_like(operators.border_columns(*tensors[:5], None, *numbers))
    opcheck(operators.border_gradients, (grad, *tensors, columns, *numbers))


OPCHECKED = {"fused": "implicit", "stem_7x7_8_bits": "columns", "depthwise_8_bits": "depthwise", "nearest": "reference"}


@pytest.mark.parametrize(("name", "route"), OPCHECKED.items())
def test_opcheck_of_integers(name: str, route: Route) -> None:
    problem = layer_problem(LAYERS[name], PLACES["strided"])
    layer = problem.packed(route).to(GPU)
    arguments = (
        problem.x.to(GPU), layer.scale, layer.border, layer.alpha, layer.thresholds, layer.weight, layer.multiplier,
        layer.bias, layer.constant, layer.correction, None, True, layer.groups, layer.offset, layer.route,
        _flat_window(layer.window), _flat_grid(layer.spec), layer.spec.bound,
    )  # fmt: skip
    opcheck(operators.integer_convolution, arguments)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the function and what it fills; called once before, so that kernels are compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_a_convolution_and_its_gradients(kind: str) -> None:
    problem = convolution_problem(kind)
    graph, results = captured(lambda: value_and_gradients(problem))
    for rounding in (0.0, 0.8):
        with torch.no_grad():
            problem["x"].copy_(torch.randn_like(problem["x"]))
            problem["rounding"].fill_(rounding)
        graph.replay()
        replayed = [result.clone() for result in results]
        for one, other in zip(replayed, value_and_gradients(problem), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "route"), LAYER_ROUTES)
def test_a_graph_of_an_integer_convolution(name: str, route: Route) -> None:
    problem = layer_problem(LAYERS[name], PLACES["padded"])
    x, layer = problem.x.to(GPU), problem.packed(route).to(GPU)
    graph, result = captured(lambda: integer_convolution(x, layer))
    for seed in (1, 2):
        other = layer_problem(LAYERS[name], PLACES["padded"], seed).x
        x.copy_(other)
        graph.replay()
        expected = problem._replace(x=other, residual=None, relu=False).expected()
        assert torch.equal(result.cpu(), expected)


def test_training_on_another_stream() -> None:
    """The kernels come after what that stream still has to do, though nobody waits for it."""
    problem = training_problem(VARIANTS["3x3_all"], MAPS["padded"])
    there = moved(problem, GPU)
    grad = torch.ones_like(cuda_training.forward(**there))
    cuda_training.backward(grad, **there)  # compiled before
    x = torch.zeros_like(there["x"])
    found, gradients = late(
        lambda: x.copy_(there["x"]),
        lambda: (cuda_training.forward(**there | {"x": x}), cuda_training.backward(grad, **there | {"x": x})),
    )
    assert torch.equal(found.cpu(), reference.forward(**problem))
    assert_gradients(gradients, reference.backward(grad, **there), grad, there)


@pytest.mark.parametrize(("name", "route"), OPCHECKED.items())
def test_integers_on_another_stream(name: str, route: Route) -> None:
    problem = layer_problem(LAYERS[name], PLACES["padded"])._replace(residual=None)
    layer, later = problem.packed(route).to(GPU), problem.x.to(GPU)
    integer_convolution(later, layer)  # compiled before
    x = torch.zeros_like(later)
    found = late(lambda: x.copy_(later), lambda: integer_convolution(x, layer, None, problem.relu))
    assert torch.equal(found.cpu(), problem.expected())


def late(first: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """Both on a stream of their own that is busy for about a tenth of a second."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        first()
        result = then()
    stream.synchronize()
    return result


def test_tensors_on_two_devices_are_refused() -> None:
    problem = moved(training_problem(VARIANTS["3x3"], MAPS["padded"]), GPU)
    with pytest.raises(ValueError, match="tensors on cuda:0 and on cpu cannot meet in one kernel"):
        cuda_training.forward(**problem | {"border": problem["border"].cpu()})
    layer = layer_problem(LAYERS["fused"], PLACES["padded"])
    with pytest.raises(ValueError, match="x is on cuda:0, the layer on cpu"):
        integer_convolution(layer.x.to(GPU), layer.packed("implicit"))
    with pytest.raises(ValueError, match="x is on cpu, the layer on cuda:0"):
        integer_convolution(layer.x, layer.packed("implicit").to(GPU))
