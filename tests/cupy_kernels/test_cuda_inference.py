"""The integer kernels, compiled for the CPU, against the reference by every route, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import cuda_on_cpu
import pytest
import torch
from border_cases import HALVES, LAYER_ROUTES, LAYERS, PLACES, Layer, LayerProblem, Place, all_halves, layer_problem
from guarded_memory import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cupy_kernels import compilation, cuda_inference, packing, reference
from cupy_kernels.cuda_inference import convolution, integer_columns, tile_of
from cupy_kernels.specification import BorderSpecification, Bound, Window

pytestmark = pytest.mark.usefixtures("emulated")
LAST = torch.channels_last


def check(problem: LayerProblem, route: packing.Route) -> None:
    """Everything is written, nothing beside it, and every output is the reference's."""
    layer, expected = problem.packed(route), problem.expected()
    with GuardedMemory():
        found = convolution(problem.x, layer, problem.residual, problem.relu)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert not expected.isnan().any()
    wrong = int((found != expected).sum())
    assert wrong == 0, f"{wrong} of {expected.numel()} by {route}"


@pytest.mark.parametrize(("name", "route"), LAYER_ROUTES)
def test_equal_to_the_reference(name: str, route: packing.Route) -> None:
    layer = LAYERS[name]
    for seed, place in enumerate(PLACES.values()):
        problem = layer_problem(layer, place, seed)
        assert problem.packed(route).thresholds is not None or "thresholds" not in name
        check(problem, route)


@pytest.mark.parametrize("name", HALVES)
def test_every_half(name: str) -> None:
    problem = all_halves(HALVES[name])
    assert (problem.packed("depthwise").thresholds is None) == ("evaluated" in name)
    check(problem, "depthwise")


@pytest.mark.parametrize("route", ["columns", "implicit", "depthwise"])
def test_every_layer_there_is_a_case_for_is_tested(route: str) -> None:
    """By each route: every quantizer, both dtypes, 8-bit weights and codes, and more positions than a stage holds."""
    layers = [LAYERS[name] for name, other in LAYER_ROUTES if other == route]
    assert {layer.quantizer for layer in layers} == {"nearest", "border", "pixel"}
    assert {layer.dtype for layer in layers} == {torch.float16, torch.float32}
    assert {layer.fused for layer in layers} == {layer.alpha for layer in layers} == {True, False}
    assert {layer.terms for layer in layers} == {2, 3}
    assert {layer.bound for layer in layers} == set(get_args(Bound))
    assert any(layer.weight_bits == layer.bits == 8 for layer in layers)
    assert any(layer.weight_bits < 8 for layer in layers)
    assert any(layer.kernel == (7, 7) for layer in layers)
    assert any("thresholds" in name for name, other in LAYER_ROUTES if other == route)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Windows and outputs of a block, of each launch of the implicit GEMM."""
    seen, launch = [], cuda_inference.launch

    def noting(file: str, constants: dict[str, int], *rest: Any) -> None:
        if file == "integer_convolution.cu":
            seen.append((constants["WINDOWS"], constants["OUTPUTS"]))
        launch(file, constants, *rest)

    monkeypatch.setattr(cuda_inference, "launch", noting)
    return seen


OF_EVERY_WIDTH = {
    "nearest": Layer(20, 0, 1, (1, 1), "nearest", weight_bits=8, bits=3, dtype=torch.float32),
    "uniform": Layer(20, 0, 1, (3, 3), "nearest", weight_bits=3, bits=3),
    "fused": Layer(36, 0, 1, (2, 2), weight_bits=3, bits=2),
}


@pytest.mark.parametrize("kind", OF_EVERY_WIDTH)
@pytest.mark.parametrize(("outputs", "width"), [(20, 32), (50, 64), (101, 128), (300, 256)])
def test_blocks_of_all_sizes(outputs: int, width: int, kind: str, tiles: list[tuple[int, int]]) -> None:
    layer = replace(OF_EVERY_WIDTH[kind], outputs=outputs)
    for name in ("padded", "few_windows"):
        check(layer_problem(layer, PLACES[name]), "implicit")
    assert tiles == [(64 if kind == "fused" or width == 256 else 128, width)] * 2


def test_smaller_blocks_on_a_large_device(monkeypatch: pytest.MonkeyPatch, tiles: list[tuple[int, int]]) -> None:
    monkeypatch.setattr(cuda_inference, "_multiprocessors", lambda _: 10_000)
    for layer in (
        replace(OF_EVERY_WIDTH["fused"], outputs=300),
        replace(OF_EVERY_WIDTH["nearest"], outputs=101),
        LAYERS["fused_groups_8_bit_weights"],
    ):
        check(layer_problem(layer, PLACES["padded"]), "implicit")
    assert tiles == [(64, 64)] * 3


@pytest.mark.parametrize(
    ("group_outputs", "rows", "evaluates", "multiprocessors", "wanted"),
    [
        (1, 1, False, 1, (128, 32)),
        (32, 1, True, 1, (64, 32)),
        (33, 1, False, 1, (128, 64)),
        (65, 1, True, 1, (64, 128)),
        (129, 1, False, 1, (64, 256)),
        (1000, 1, True, 1, (64, 256)),
        (256, 131 * 64 + 1, False, 132, (64, 256)),  # 132 blocks
        (256, 131 * 64, False, 132, (64, 128)),  # else 131
        (256, 33 * 64, True, 132, (64, 64)),
        (256, 1, True, 132, (64, 64)),
        (512, 66 * 64, True, 132, (64, 256)),
        (128, 131 * 128 + 1, False, 132, (128, 128)),
        (128, 131 * 128, False, 132, (64, 128)),
        (20, 64, False, 132, (64, 32)),
    ],
)
def test_the_tile_by_hand(
    group_outputs: int, rows: int, evaluates: bool, multiprocessors: int, wanted: tuple[int, int]
) -> None:
    assert tile_of(group_outputs, rows, evaluates, multiprocessors) == wanted


places = st.builds(
    Place,
    images=st.integers(1, 3),
    extra=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    zero_point=st.integers(0, 3),
    channels_last=st.booleans(),
    residual=st.booleans(),
    relu=st.booleans(),
)
ANY_LAYER: dict[packing.Route, Layer] = {
    "implicit": Layer(20, 12, 1, (3, 2), alpha=True, dtype=torch.float32, weight_bits=8),
    "columns": Layer(20, 12, 1, (3, 2), dtype=torch.float32, weight_bits=8, fused=False),
    "depthwise": Layer(12, 12, 12, (3, 2), dtype=torch.float32, bits=8, weight_bits=8),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(ANY_LAYER)), places, st.integers(0, 100), st.data())
def test_any_geometry(route: packing.Route, place: Place, seed: int, data: st.DataObject) -> None:
    """None of it is compiled in, nor are channels, outputs and (but for the kernels' widths) groups."""
    layer = ANY_LAYER[route]
    if route == "implicit":
        groups = data.draw(st.integers(1, 3))
        layer = replace(layer, channels=groups * 4 * data.draw(st.integers(1, 10)), groups=groups)
        layer = replace(layer, outputs=groups * data.draw(st.integers(1, 32)))
    elif route == "columns":
        groups = data.draw(st.integers(1, 3))
        layer = replace(layer, channels=groups * data.draw(st.integers(17, 70)), groups=groups)
        layer = replace(layer, outputs=groups * data.draw(st.integers(1, 40)))
    else:
        channels = 4 * data.draw(st.integers(1, 70))
        layer = replace(layer, channels=channels, outputs=channels, groups=channels)
    check(layer_problem(layer, place, seed), route)


@pytest.mark.parametrize("name", ["fused_5x5_8_bits", "stem_7x7_8_bits", "depthwise_8_bits"])
@pytest.mark.parametrize("error", [-1, 1])
def test_the_device_s_reciprocal_may_be_off(name: str, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_for_cpu(text: str, entry: str, _: torch.device) -> Any:
        return cuda_on_cpu.compile_for_cpu(text, entry, error)

    monkeypatch.setattr(compilation, "compile_for_gpu", compile_for_cpu)
    compilation.compiled.cache_clear()
    check(layer_problem(LAYERS[name], PLACES["padded"]), dict(LAYER_ROUTES)[name])
    compilation.compiled.cache_clear()


@pytest.mark.parametrize("name", ["stem_thresholds", "nearest", "depthwise_7_channels", "stem_pixel_8_bits"])
def test_an_input_that_is_not_dense(name: str) -> None:
    problem = layer_problem(LAYERS[name], PLACES["padded"])
    wide = problem.x.repeat_interleave(2, dim=3)
    assert problem.residual is not None
    turned = problem.residual.mT.contiguous().mT
    check(problem._replace(x=wide[..., ::2], residual=turned), dict(LAYER_ROUTES)[name])


@pytest.mark.parametrize("name", ["stem_7x7_8_bits", "fused", "depthwise_8_bits", "nearest_1x1_7_bits"])
def test_the_layout_of_the_outputs(name: str) -> None:
    route = dict(LAYER_ROUTES)[name]
    for place in (PLACES["padded"], PLACES["strided"]):
        problem = layer_problem(LAYERS[name], place)
        found = convolution(problem.x, problem.packed(route), None, False)
        last = place.channels_last or route != "columns"
        assert found.is_contiguous(memory_format=LAST if last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("fused", "width", "wanted"),
    # s = 1, Q = 3, z = 1, B = 1/2: 0 and 1 have the codes 1 and 2, infinities 3 and 0; every weight is 1.
    [(True, 3, [0 - 3, 0 - 3, 2 + 3 + 0 - 3]), (False, 2, [1 + 0 - 2, 0 + 2 - 2, 2 + 3 - 2, 3 + 0 - 2])],
)
def test_not_a_number_by_hand(fused: bool, width: int, wanted: list[int]) -> None:
    """It gets the lowest code, and by a fused border so does its whole window."""
    x = torch.tensor([[[[0.0, torch.nan, 1.0, torch.inf, -torch.inf]]]])
    one, border, window = torch.ones(1), torch.zeros(3, 1, width), Window((1, width))
    weight = (torch.ones(1, 1, 1, width), one, 0 * one, 3, None)
    spec = BorderSpecification(3, 1, fused=fused)
    layer = packing.pack("columns", *weight, one[0], border, None, window, 1, spec, torch.float32)
    assert convolution(x, layer, None, False).flatten().tolist() == wanted


def as_rows(codes: Tensor, groups: int) -> Tensor:
    """(N, C K, L) codes as (G, N L, C K / G)."""
    images, _, windows = codes.shape
    return codes.view(images, groups, -1, windows).permute(1, 0, 3, 2).reshape(groups, images * windows, -1)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "row_bytes"),
    [(3, 1, (3, 3), 32), (40, 1, (3, 3), 368), (12, 3, (3, 3), 48), (36, 1, (7, 7), 1776), (2, 1, (16, 17), 544)],
)
def test_columns_are_the_reference_s_codes_and_then_zeros(
    channels: int, groups: int, kernel: tuple[int, int], row_bytes: int, last: bool
) -> None:
    """Tiles of all sizes: fewer channels, several tiles of channels, halved for large windows."""
    layer = Layer(channels, groups, groups, kernel, weight_bits=2, bits=8, dtype=torch.float32)
    place = PLACES["padded"]._replace(channels_last=last)
    problem = layer_problem(layer, place)
    packed, given = problem.packed("columns"), problem.given
    with GuardedMemory():
        found = integer_columns(problem.x, packed, packed.window, row_bytes, groups)
    codes = reference.codes(problem.x, given["scale"], given["border"], given["alpha"], given["window"], given["spec"])
    rows = as_rows(codes.int() - 128, groups)
    slots = channels // groups * kernel[0] * kernel[1]
    assert found.shape == (groups, max(rows.shape[1], 32), row_bytes)
    assert torch.equal(found[:, : rows.shape[1], :slots].int(), rows)
    assert not found[:, :, slots:].any()
    assert not found[:, rows.shape[1] :].any()


def test_fewer_rows_than_a_matrix_product_takes() -> None:
    problem = layer_problem(LAYERS["channels_not_in_fours"], PLACES["few_windows"])
    packed = problem.packed("columns")
    with GuardedMemory():
        found = integer_columns(problem.x, packed, packed.window, packed.weight.shape[2], 1)
    assert found.shape[1] == 32
    assert found[:, :3].any()
    assert not found[:, 3:].any()


def test_the_emulator_s_halves_are_torch_s() -> None:
    """The device's conversions are stood in for: those must be right for the rest to say anything."""
    g = torch.Generator().manual_seed(0)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    middles = halves.float()[:-1] + halves.float().diff() / 2
    size = 10.0 ** (torch.rand(200_000, generator=g) * 16 - 10)
    values = torch.cat([halves.float(), middles, size, -size, torch.nextafter(middles, torch.tensor(torch.inf))])
    text = """
    extern "C" __global__ void convert(const float* x, unsigned short* half, float* back, const int count) {
      for (int i = 0; i < count; i++) back[i] = emulated_half_to_float(half[i] = emulated_float_to_half(x[i]));
    }
    """
    half, back = torch.empty(len(values), dtype=torch.float16), torch.empty(len(values))
    arguments = [compilation._scalar(argument) for argument in (values, half, back, len(values))]
    cuda_on_cpu.compile_for_cpu(text, "convert")((1,), 1, arguments, 0)
    for found, wanted in ((half, values.half()), (back, values.half().float())):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "route"), [("fused", "implicit"), ("depthwise_8_bits", "depthwise")])
def test_a_view_at_an_odd_address_is_moved(name: str, route: packing.Route, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device cannot load 8 bytes from there; the CPU can, so what is launched is looked at."""
    problem = layer_problem(LAYERS[name], PLACES["padded"])
    x = torch.empty(problem.x.numel() + 1, dtype=problem.x.dtype)[1:].as_strided(problem.x.shape, problem.x.stride())
    x.copy_(problem.x)
    addresses = []

    def launched(file: str, constants: Any, grid: Any, threads: int, arguments: list[Any], *rest: Any) -> None:
        addresses.append(arguments[0].data_ptr())
        compilation.launch(file, constants, grid, threads, arguments, *rest)

    monkeypatch.setattr(cuda_inference, "launch", launched)
    assert torch.equal(convolution(x, problem.packed(route), problem.residual, problem.relu), problem.expected())
    assert x.data_ptr() % 16
    assert not any(address % 16 for address in addresses)


@pytest.mark.parametrize(("name", "route"), LAYER_ROUTES[::5])
def test_no_images(name: str, route: packing.Route) -> None:
    problem = layer_problem(LAYERS[name], PLACES["strided"])
    expected = problem.expected()
    found = convolution(problem.x[:0], problem.packed(route), None, False)
    assert found.shape == (0, *expected.shape[1:])
