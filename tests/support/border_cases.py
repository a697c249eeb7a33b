"""Small and adversarial cases of border quantization and of integer layers, for the emulator and for a GPU alike."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cupy_kernels import compilation, cuda_training, integer_reference, packing, reference
from cupy_kernels.reference import Gradients
from cupy_kernels.specification import BorderSpecification, Bound, Window

Pair = tuple[int, int]


def evaluation(expression: str, bound: Bound = "steep") -> str:
    """A kernel ``evaluate`` of (a, b, out, count): the expression of a[i] and b[i], in terms of border.cuh."""
    spec = BorderSpecification(15, bound=bound)
    constants = cuda_training.border_constants(torch.zeros(3, 1, 1), None, Window(), spec)
    return f"""{compilation.source("border.cuh", constants)}
extern "C" __global__ void evaluate(const float* a, const float* b, float* out, const int count) {{
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) out[i] = {expression};
}}
"""


@dataclass(frozen=True)
class Variant:
    """What the training kernels are compiled for.

    Attributes:
        terms: of the border; 0 is none.
        softened: the rounding schedule is not over, its alpha a tensor.
        taps: a depthwise convolution's sums are wanted.
        columns: the backward writes them.
    """

    kernel: Pair = (3, 3)
    terms: int = 3
    bound: Bound = "steep"
    fused: bool = True
    alpha: bool = False
    softened: bool = False
    taps: bool = False
    columns: bool = False
    input_gradient: bool = True


VARIANTS = {
    "3x3": Variant(columns=True),
    "3x3_all": Variant(alpha=True, softened=True, columns=True),
    "3x3_linear_stretched": Variant(terms=2, bound="stretched"),
    "3x3_clip_by_position": Variant(bound="clip", fused=False, softened=True),
    "3x3_linear_by_position": Variant(terms=2, fused=False, columns=True, input_gradient=False),
    "3x3_stretched_by_position": Variant(bound="stretched", fused=False),
    "3x3_nearest": Variant(terms=0, columns=True),
    "3x3_depthwise_all": Variant(bound="stretched", alpha=True, softened=True, taps=True, columns=True),
    "3x3_depthwise_by_position": Variant(terms=2, bound="clip", fused=False, taps=True),
    "1x1": Variant((1, 1), alpha=True, columns=True),
    "1x1_by_position": Variant((1, 1), fused=False),
    "1x1_nearest": Variant((1, 1), terms=0, softened=True),
    "1x1_depthwise": Variant((1, 1), terms=2, bound="clip", taps=True, softened=True),
    "2x3_clip": Variant((2, 3), bound="clip", softened=True, input_gradient=False),
    "1x7_linear": Variant((1, 7), terms=2, alpha=True),
    "5x3_by_position": Variant((5, 3), fused=False, columns=True),
    "5x5_all": Variant((5, 5), bound="stretched", alpha=True, softened=True, columns=True),
    "5x5_depthwise": Variant((5, 5), terms=2, bound="clip", taps=True, columns=True),
    "5x5_depthwise_by_position": Variant((5, 5), fused=False, taps=True, softened=True),
    "5x5_depthwise_nearest": Variant((5, 5), terms=0, taps=True),
    "7x7": Variant((7, 7), bound="clip", columns=True),
    "7x7_by_position": Variant((7, 7), terms=2, bound="stretched", fused=False, softened=True, input_gradient=False),
}

Values = Literal["random", "halves", "ends", "whole", "edges"]


class Map(NamedTuple):
    """A map and the window's way over it; height and width beyond what one window spans."""

    images: int
    channels: int
    extra: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    levels: int
    zero_point: int
    values: Values


MAPS = {
    "padded": Map(2, 3, (6, 5), (1, 1), (1, 1), (1, 1), 7, 2, "random"),
    "strided": Map(1, 2, (5, 7), (2, 3), (0, 2), (1, 2), 3, 0, "halves"),
    "few_windows": Map(3, 2, (1, 0), (1, 1), (0, 0), (1, 1), 1, 1, "ends"),
    "one_channel": Map(2, 1, (3, 4), (3, 1), (4, 5), (2, 1), 255, 128, "whole"),
    "edges": Map(1, 16, (4, 5), (1, 1), (1, 0), (1, 1), 3, 0, "edges"),
    "large": Map(1, 2, (22, 23), (1, 1), (0, 0), (1, 1), 15, 5, "random"),
}
"""Among them: fewer windows than a warp has threads, and more than two blocks have."""


def constant_borders(border: Tensor | None, alpha: Tensor | None, spec: BorderSpecification, channels: int) -> Tensor:
    """B by channel, (C, K), or (C, 1) if fused, of a border that is b0 alone: by the reference's operations."""
    if border is None:
        return torch.full((channels, 1), 0.5)
    e = reference.bounded_shift(border[0].clone(), spec)
    if not spec.fused:
        return e + 0.5
    total = torch.zeros(len(e))
    for position in range(e.shape[1]):
        total = total + (e[:, position] if alpha is None else e[:, position] * alpha[:, position])
    return (total * (1.0 / e.shape[1]) + 0.5)[:, None]


def at_edges(borders: Tensor, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """t within two units in the last place of one of its channel's B: there the code changes from 0 to 1."""
    images, channels, height, width = shape
    chosen = torch.randint(borders.shape[1], (channels, images * height * width), generator=g)
    edges = borders.clamp(min=0.01).gather(1, chosen).view(channels, images, height, width).transpose(0, 1)
    steps = torch.randint(-2, 3, shape, generator=g, dtype=torch.int32)
    return (edges.contiguous().view(torch.int32) + steps).view(torch.float32)


def training_problem(variant: Variant, place: Map, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``reference.forward``, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    spans = [d * (k - 1) + 1 for d, k in zip(place.dilation, variant.kernel, strict=True)]
    shape = (place.images, place.channels, *[span + more for span, more in zip(spans, place.extra, strict=True)])
    window = Window(variant.kernel, place.stride, place.padding, place.dilation)
    spec = BorderSpecification(
        place.levels, place.zero_point, variant.bound, variant.fused and variant.terms > 0, variant.input_gradient
    )
    levels, shape_of_border = place.levels, (variant.terms, place.channels, window.positions)
    by_position = (place.channels, window.positions)
    t = torch.rand(shape, generator=g) * (levels + 2) - 1  # past both ends of the clip
    border = torch.randn(shape_of_border, generator=g) * 0.6 if variant.terms else None
    alpha = torch.rand(by_position, generator=g) if variant.alpha else None
    if place.values == "halves":  # exactly, with B = 1/2 in one channel
        t = t.floor() + 0.5
        if border is not None:
            border[:, 0] = 0
    elif place.values == "ends":
        ends = torch.tensor([-1.0, -0.5, 0.0, 0.5, levels - 0.5, float(levels), levels + 0.5, levels + 1.0])
        t = ends[torch.randint(len(ends), shape, generator=g)]
        if border is not None:
            border[0, 0], border[1:, 0] = 0.5, 0.0  # v at clip's end
    elif place.values == "whole":  # with B = 0 and 1, or next to them
        t = t.floor()
        if border is not None:
            border[0] = torch.tensor([-50.0, 50.0]).repeat(place.channels)[: place.channels, None]
    elif place.values == "edges":
        if border is not None:
            border[1:] = 0
        t = at_edges(constant_borders(border, alpha, spec, place.channels), shape, g)
    scale = torch.tensor(0.37 if place.values == "random" else 0.25)
    rounding: float | Tensor = torch.tensor(0.0 if place.values == "ends" else 0.3) if variant.softened else 1.0
    return {
        "x": (t - place.zero_point) * scale, "scale": scale, "border": border, "alpha": alpha, "window": window,
        "spec": spec, "rounding": rounding,
        "taps": torch.randn(by_position, generator=g) if variant.taps else None,
    }  # fmt: skip


def moved(problem: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The problem on another device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem.items()}


def assert_gradients(actual: Gradients, wanted: Gradients, grad: Tensor, problem: dict[str, Any]) -> None:
    """Each within 1e-5 of its largest entry; the scale's, one sum that may cancel, of its terms' root mean square."""
    tap = 1.0 if problem["taps"] is None else float(problem["taps"].abs().max())
    for name, found, expected in zip(Gradients._fields, actual, wanted, strict=True):
        assert (found is None) == (expected is None), name
        if found is None or expected is None:
            continue
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        size, error = float(expected.abs().max()), float((found - expected).abs().max())
        if name == "scale":
            size = max(size, float(grad.norm()) * problem["spec"].levels * tap)
        assert error <= 1e-5 * size, f"{name}: {error} of {size}"


def check_training(variant: Variant, place: Map, seed: int = 0, device: torch.device | None = None) -> None:
    """Both directions of the kernels against the reference, on the same device; twice, since the bits are the same."""
    problem = training_problem(variant, place, seed)
    problem = problem if device is None else moved(problem, device)
    expected = reference.forward(**problem)
    found = cuda_training.forward(**problem)
    assert torch.equal(found, expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1)).to(expected.device)
    columns = reference.forward(**problem | {"taps": None})
    wanted = reference.backward(grad, **problem)
    runs = []
    for _ in range(2):
        written = torch.full_like(columns, torch.nan) if variant.columns else None
        runs.append(cuda_training.backward(grad, **problem, columns=written))
        assert_gradients(runs[-1], wanted, grad, problem)
        assert written is None or torch.equal(written, columns)
    for one, other in zip(*runs, strict=True):
        assert one is None or torch.equal(one, other)


Quantizer = Literal["nearest", "border", "pixel"]
"""No border; one by position; one by channel, so that a pixel has one code."""

HALF, SINGLE = torch.float16, torch.float32


@dataclass(frozen=True)
class Layer:
    """What the integer kernels are compiled for, and channels; ``spread`` is of the border's random coefficients."""

    channels: int
    outputs: int
    groups: int = 1
    kernel: Pair = (3, 3)
    quantizer: Quantizer = "border"
    terms: int = 3
    bound: Bound = "steep"
    fused: bool = True
    alpha: bool = False
    weight_bits: int = 4
    bits: int = 4
    dtype: torch.dtype = HALF
    spread: float = 0.5


LAYERS = {
    # Implicit GEMM
    "fused": Layer(32, 40, weight_bits=2, bits=2),
    "fused_groups_8_bit_weights": Layer(40, 70, 2, (3, 3), "border", 2, "stretched", True, True, 8, 4, SINGLE),
    "fused_5x5_8_bits": Layer(20, 24, 1, (5, 5), "border", 3, "clip", True, True, 8, 8, SINGLE),
    "thresholds_7x7": Layer(16, 9, 1, (7, 7), fused=False, weight_bits=2, bits=2, spread=0.25),
    "by_position_5x3": Layer(36, 33, 1, (5, 3), "border", 2, "clip", False, False, 4, 3, SINGLE),
    "thresholds_1x1_4_bits": Layer(64, 50, 1, (1, 1), fused=False, bound="stretched", weight_bits=3, spread=0.1),
    "by_position_1x1_8_bits": Layer(16, 20, 1, (1, 1), fused=False, weight_bits=8, bits=8, dtype=SINGLE),
    "thresholds_groups_3_bits": Layer(60, 24, 3, fused=False, terms=2, bound="clip", bits=3, spread=0.08),
    "nearest": Layer(16, 33, quantizer="nearest", weight_bits=2, bits=2, dtype=SINGLE),
    "nearest_1x1_7_bits": Layer(48, 40, 1, (1, 1), "nearest", weight_bits=8, bits=7),
    "pixel_fused_8_bits": Layer(32, 32, quantizer="pixel", alpha=True, weight_bits=2, bits=8),
    "pixel_8_bit_weights": Layer(16, 24, 1, (3, 3), "pixel", 2, "stretched", False, False, 8, 2, SINGLE),
    "pixel_thresholds_5x5": Layer(16, 12, 1, (5, 5), "pixel", fused=False, weight_bits=2, spread=0.25),
    # A matrix product
    "stem_7x7_8_bits": Layer(3, 10, 1, (7, 7), weight_bits=8, bits=8, dtype=SINGLE),
    "stem_thresholds": Layer(3, 16, fused=False, terms=2, spread=0.3),
    "channels_not_in_fours": Layer(50, 12, quantizer="nearest", weight_bits=3, bits=3),
    "small_groups": Layer(20, 12, 4, (2, 3), "border", 2, "clip", weight_bits=2, bits=2),
    "two_outputs_a_channel": Layer(6, 12, 6, fused=False, bound="stretched", alpha=False, bits=5, dtype=SINGLE),
    "stem_pixel_8_bits": Layer(5, 7, 1, (3, 3), "pixel", 3, "clip", True, True, 8, 8, SINGLE),
    # Depthwise
    "depthwise_8_bits": Layer(24, 24, 24, weight_bits=8, bits=8),
    "depthwise_thresholds_5x3": Layer(24, 24, 24, (5, 3), fused=False, weight_bits=3, spread=0.25),
    "depthwise_7_channels": Layer(7, 7, 7, (3, 3), "border", 2, "stretched", False, False, 3, 4, SINGLE),
    "depthwise_5_channels_thresholds": Layer(5, 5, 5, fused=False, weight_bits=2, bits=2, spread=0.25),
    "depthwise_7x7": Layer(8, 8, 8, (7, 7), "border", 3, "clip", True, True, 4, 4, SINGLE),
    "depthwise_nearest_5x5": Layer(12, 12, 12, (5, 5), "nearest", bits=3),
    "depthwise_pixel_8_bits": Layer(16, 16, 16, (5, 5), "pixel", 3, "steep", True, True, 8, 8, SINGLE),
}

ALSO_BY_COLUMNS = ("fused_groups_8_bit_weights", "pixel_fused_8_bits", "thresholds_1x1_4_bits", "depthwise_8_bits")
"""Layers that have a kernel of their own, but which a matrix product computes, too."""


class Place(NamedTuple):
    """An input and the window's way over it; height and width beyond what one window spans."""

    images: int
    extra: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    zero_point: int  # in thirds of the levels
    channels_last: bool
    residual: bool
    relu: bool


PLACES = {
    "padded": Place(2, (7, 6), (1, 1), (1, 1), (1, 1), 1, True, True, True),
    "strided": Place(2, (6, 5), (2, 1), (0, 3), (1, 2), 0, False, False, False),
    "few_windows": Place(3, (0, 0), (1, 1), (0, 0), (1, 1), 3, False, True, False),
    "wide_padding": Place(1, (0, 3), (1, 2), (3, 2), (2, 1), 2, True, False, True),
}
"""Among them: windows that no tile divides, and a linear layer's one a row (of a 1x1 kernel)."""


class LayerProblem(NamedTuple):
    """Inputs of ``ops.integer_convolution``, the layer still to be packed for a route."""

    x: Tensor
    given: dict[str, Any]  # of ``packing.pack``, less the route
    residual: Tensor | None
    relu: bool

    def packed(self, route: packing.Route) -> packing.PackedLayer:
        return packing.pack(route, **self.given)

    def expected(self) -> Tensor:
        """By the reference, on the CPU."""
        layer = self.packed("reference")
        return integer_reference.convolution(
            self.x, layer.scale, layer.border, layer.alpha, layer.weight, layer.multiplier, layer.bias, self.residual,
            self.relu, layer.groups, layer.window, layer.spec,
        )  # fmt: skip


def layer_problem(layer: Layer, place: Place, seed: int = 0) -> LayerProblem:
    """Random codes, borders and inputs; among these NaN, infinities and exact halves."""
    g = torch.Generator().manual_seed(seed)
    levels, weight_levels = 2**layer.bits - 1, 2**layer.weight_bits - 1
    window = Window(layer.kernel, place.stride, place.padding, place.dilation)
    positions = 1 if layer.quantizer == "pixel" else window.positions
    spans = [d * (k - 1) + 1 for d, k in zip(place.dilation, layer.kernel, strict=True)]
    shape = (place.images, layer.channels, *[span + more for span, more in zip(spans, place.extra, strict=True)])
    zero_point = levels * place.zero_point // 3
    t = torch.rand(shape, generator=g) * (levels + 2) - 1
    t = torch.where(torch.rand(shape, generator=g) < 0.2, t.floor() + 0.5, t)
    spec = BorderSpecification(levels, zero_point, layer.bound, layer.fused and layer.quantizer != "nearest")
    border = alpha = None
    if layer.quantizer != "nearest":
        border = torch.randn(layer.terms, layer.channels, positions, generator=g) * layer.spread
        alpha = torch.rand(layer.channels, positions, generator=g) if layer.alpha else None
    if zero_point == 0:  # in every other channel exactly at a border that is constant
        if border is not None:
            border[1:, ::2] = 0
        borders = constant_borders(border, alpha, spec, layer.channels)
        t[:, ::2] = at_edges(borders, shape, g)[:, ::2]
    scale = torch.tensor(0.37 if zero_point else 0.25)
    x = ((t - zero_point) * scale).to(layer.dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=layer.dtype)
    x.view(-1)[torch.randperm(x.numel(), generator=g)[: len(special)]] = special[: x.numel()]
    if place.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    fan_in = (layer.channels // layer.groups, *layer.kernel)
    rows, columns = window.output_size(shape[2], shape[3])
    residual = torch.randn(place.images, layer.outputs, rows, columns, generator=g) if place.residual else None
    given = {
        "codes": torch.randint(0, weight_levels + 1, (layer.outputs, *fan_in), generator=g).float(),
        "weight_scale": (torch.rand(layer.outputs, generator=g) + 0.1) / weight_levels,
        "weight_zero_point": torch.randint(0, weight_levels + 1, (layer.outputs,), generator=g).float(),
        "weight_levels": weight_levels, "bias": torch.randn(layer.outputs, generator=g), "scale": scale,
        "border": border, "alpha": alpha, "window": window, "groups": layer.groups, "spec": spec, "dtype": layer.dtype,
    }  # fmt: skip
    return LayerProblem(x, given, None if residual is None else residual.to(layer.dtype), place.relu)


def routes_of(name: str) -> list[packing.Route]:
    """The routes by which a layer of ``LAYERS`` is tested."""
    layer = LAYERS[name]
    shape = torch.Size((layer.outputs, layer.channels // layer.groups, *layer.kernel))
    own = packing.route_of(shape, layer.groups)
    return [own, "columns"] if name in ALSO_BY_COLUMNS else [own]


def all_halves(layer: Layer) -> LayerProblem:
    """Every fp16 value through a depthwise layer of 4 channels that passes its codes on."""
    problem = layer_problem(layer, PLACES["padded"])
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ones, zeros = torch.ones(4), torch.zeros(4)
    of_weight = {"codes": torch.ones(4, 1, 1, 1), "weight_scale": ones, "weight_zero_point": zeros, "bias": None}
    given = problem.given | of_weight | {"scale": torch.tensor(1.0), "window": Window()}
    x = torch.stack([bits.roll(channel) for channel in range(4)]).view(1, 4, 256, 256)
    return LayerProblem(x.contiguous(memory_format=torch.channels_last), given, None, False)


HALVES = {
    "thresholds_2_bits": Layer(4, 4, 4, (1, 1), fused=False, bits=2, spread=0.3),
    "thresholds_4_bits": Layer(4, 4, 4, (1, 1), fused=False, bits=4, spread=0.3),
    "nearest_3_bits": Layer(4, 4, 4, (1, 1), quantizer="nearest", bits=3),
    "evaluated_8_bits": Layer(4, 4, 4, (1, 1), bits=8),
}

LAYER_ROUTES = [(name, route) for name in LAYERS for route in routes_of(name)]


def tensors_of(layer: packing.PackedLayer) -> dict[str, Tensor]:
    """A packed layer's tensors by name."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def with_tensors(layer: packing.PackedLayer, tensors: dict[str, Tensor]) -> packing.PackedLayer:
    """The layer with other tensors of the same names."""
    return replace(layer, **tensors)  # type: ignore[arg-type]
