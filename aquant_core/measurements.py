"""What a finished network does to real images, layer by layer: the numbers of the report that no loss shows.

The float and the quantized network go over a few images side by side, once; nothing is changed by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquant_core.evaluation import decibels, energy, evaluation_batch_size, sqnr_db
from aquant_core.graph import INPUT, LAYERS, Node, evaluate_nodes
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel
from aquant_core.partition import Block
from aquant_core.quantizers import largest_code
from aquant_core.reconstruction import reconstruction_loss
from cupy_kernels import reference
from cupy_kernels.ops import border_columns
from cupy_kernels.specification import Window

IMAGES_A_BATCH = 4
"""One image in so many of an evaluation batch is measured: 64 small ones, or 8 large ones."""

BORDER_SLOTS = 2**19
"""Values of a layer's windows over which its border is looked at, at most (but for one image)."""

HISTOGRAM_BINS = 64
SHIFT_BINS = 24
"""Bins from the lowest code to the highest in which the border's shift is averaged, about."""

EDGES_UP_TO = 15
"""Up to this largest code the edges between codes are told one by one."""

DISTRIBUTIONS = 64
"""Quantizers of which histogram and border are reported, at most: those with the lowest SQNR."""


@dataclass(frozen=True)
class Measurements:
    """What was seen of a quantized network.

    Attributes:
        images: over how many images.
        layers: by layer: ``macs`` (an image), ``weight_sqnr_db``, ``output_sqnr_db``.
        inputs: of what is quantized, by the layer (or the mark) that does it; see ``describe_input``.
        block_errors: reconstruction error of each block with something quantized, in order.
    """

    images: int
    layers: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, Any]]
    block_errors: list[float]


def measured_images(images: Tensor) -> Tensor:
    """The images measured on, the first of (N, C, H, W)."""
    return images[: evaluation_batch_size(images) // IMAGES_A_BATCH]


@torch.inference_mode()
def measure(model: QuantizedModel, blocks: list[Block], images: Tensor) -> Measurements:
    """Runs the float and the quantized network side by side.

    Args:
        model: finished; its graph is the float network.
        blocks: of that graph.
        images: (N, C, H, W); the first few are used (``measured_images``).
    """
    images = measured_images(images).to(model.device)
    graph, count = model.graph, len(images)
    parts, inputs = model.quantizing, {}
    ends = {block.output: block for block in blocks if block.has_parts}
    layers: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}

    def run(node: Node, values: list[Tensor]) -> Tensor:
        pairs = [value.chunk(2) for value in values]  # float values before quantized ones, in one batch
        exact = graph.run_node(node, [pair[0] for pair in pairs])
        quantized = model.run_node(node, [pair[1] for pair in pairs])
        if node.name in parts:
            inputs[node.name] = describe_input(parts[node.name], *pairs[0])
        if node.op in LAYERS:
            layer = model.layers[node.name]
            weight = layer.float_weight
            layers[node.name] = {
                "macs": exact[0].numel() * weight[0].numel(),
                "weight_sqnr_db": None if layer.weight is None else _sqnr(layer.weight(), weight),
                "output_sqnr_db": _sqnr(quantized, exact),
            }
        if node.name in ends:
            errors[node.name] = float(reconstruction_loss(quantized, exact))
        return torch.cat([exact, quantized])

    evaluate_nodes(graph.nodes, {INPUT: torch.cat([images, images])}, run)
    by_error = sorted(inputs, key=lambda name: inputs[name]["sqnr_db"] or 0.0)
    for name in by_error[DISTRIBUTIONS:]:
        inputs[name]["distribution"] = None
    return Measurements(count, layers, inputs, [_short(errors[name]) for name in ends])


@torch.inference_mode()
def clipped_shares(model: QuantizedModel, images: Tensor) -> dict[str, float]:
    """By quantizer, the share of its inputs that lie beyond its codes, over the first of (N, C, H, W) images."""
    parts, shares = model.quantizing, {}

    def run(node: Node, values: list[Tensor]) -> Tensor:
        if node.name in parts:
            part = parts[node.name]
            shares[node.name] = round(float(_is_clipped(_in_steps(values[0], part), part).float().mean()), 6)
        return model.run_node(node, values)

    evaluate_nodes(model.graph.nodes, {INPUT: measured_images(images).to(model.device)}, run)
    return shares


def describe_input(part: ActivationQuantizer, exact: Tensor, x: Tensor) -> dict[str, Any]:
    """What one quantizer is given, and what it makes of it, as JSON values.

    Where roundings are flipped inside the product (``a_rounding``) nobody sees what became of the input.

    Args:
        part: a layer or a mark.
        exact: its input in the float network, (N, C, H, W) or (N, ..., C).
        x: its input in the quantized network.

    Returns:
        ``sqnr_db`` over the windows' values, ``clipped_share``, ``dead_channels`` (those that are 0 all over in the
        float network, and behind the quantizer), ``border_evaluations`` (an image), ``border_shift`` (mean and
        standard deviation), ``distribution`` (histogram, edges between codes, shift over the value).
    """
    assert part.activation_scale is not None
    scale, zero_point, levels = float(part.activation_scale), part.zero_point, largest_code(part.activation_bits)
    exact, maps = (_as_maps(value, part) for value in (exact, x))
    t = _in_steps(maps, part)
    alive = (exact != 0).any(0).flatten(1).any(1)  # (C,)
    sqnr, quantized_alive, shift, evaluations = None, alive, None, 0
    if not (isinstance(part, QuantizedLayer) and part.a_rounding):
        columns = _Columns(part, maps)
        sqnr, quantized_alive = columns.quantize()
        if part.border is not None:
            shift = columns.shift()
            evaluations = columns.slots * len(maps) // len(x)
    means = [0.0] * levels if shift is None else shift.between_codes()
    return {
        "sqnr_db": sqnr,
        "clipped_share": round(float(_is_clipped(t, part).float().mean()), 6),
        "dead_channels": {"float": int((~alive).sum()), "quantized": int((~quantized_alive).sum())},
        "border_evaluations": evaluations,
        "border_shift": None if shift is None else shift.summary(),
        "distribution": {
            "low": _short(scale * -zero_point),
            "high": _short(scale * (levels - zero_point)),
            "edges": [_short(scale * (code + 0.5 + means[code] - zero_point)) for code in range(levels)]
            if levels <= EDGES_UP_TO
            else [],
            "histogram": _histogram(t, maps != 0, part),
            "shift": None if shift is None else shift.bins(),
        },
    }


class _Columns:
    """The values of a quantizer's windows (im2col), a few images at a time: they are k^2 times the map.

    Attributes:
        slots: values of one map's windows, padding included.
    """

    def __init__(self, part: ActivationQuantizer, maps: Tensor) -> None:
        windowed = part if isinstance(part, QuantizedLayer) and part.has_border_by_position else None
        self.window = Window() if windowed is None else windowed.window
        self.spec = part.specification(fused=windowed is not None and windowed.is_fused)
        self.border = None if part.border is None else part.border.coefficients
        self.alpha = None if part.border is None else part.border.alpha
        assert part.activation_scale is not None
        self.scale, self.maps = part.activation_scale, maps  # (N, C, H, W)
        rows, columns = self.window.output_size(maps.shape[2], maps.shape[3])
        self.slots = maps.shape[1] * self.window.positions * rows * columns
        self.images = max(1, BORDER_SLOTS // self.slots)

    def quantize(self) -> tuple[float, Tensor]:
        """SQNR in dB, and by channel (C,) whether anything but 0 is left."""
        signal = noise = 0.0
        alive = torch.zeros(self.maps.shape[1], dtype=torch.bool, device=self.maps.device)
        window = self.window
        for maps in torch.split(self.maps, self.images):
            quantized = border_columns(maps, self.scale, self.border, self.alpha, window, self.spec)  # (n, C K, L)
            exact = F.unfold(maps, window.kernel_size, window.dilation, window.padding, window.stride)
            signal += energy(exact)
            noise += energy(quantized - exact)
            alive |= (quantized != 0).any(2).any(0).reshape(len(alive), -1).any(1)
        return round(decibels(signal, noise), 3), alive

    def shift(self) -> ShiftStatistics:
        """Of the border, over the first images."""
        maps = self.maps[: self.images]
        borders = reference.borders(maps, self.scale, self.border, self.alpha, self.window, self.spec)
        return ShiftStatistics.of(borders, self.spec.levels)


@dataclass(frozen=True)
class ShiftStatistics:
    """B - 1/2 over the real activations of a layer, in equal bins of t from 0 to Q.

    Attributes:
        counts, sums, squares: (bins,) in float64, on the CPU; ``of_all`` the same of everything, t outside included.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    of_all: tuple[float, float, float]
    levels: int

    @classmethod
    def of(cls, borders: Iterable[tuple[Tensor | float, Tensor, Tensor]], levels: int) -> ShiftStatistics:
        """From what ``reference.borders`` tells of a layer."""
        per_code = max(1, round(SHIFT_BINS / levels))
        bins = levels * per_code if levels <= EDGES_UP_TO else SHIFT_BINS
        counts, sums, squares = torch.zeros(3, bins, dtype=torch.float64)
        of_all = torch.zeros(3, dtype=torch.float64)
        for b, t, inside in borders:
            kept = inside.bool().expand_as(t)
            shift = (torch.as_tensor(b, device=t.device).expand_as(t)[kept] - 0.5).cpu().double()  # summed in one order
            place = t[kept].cpu().double()
            of_all += torch.stack([torch.ones_like(shift).sum(), shift.sum(), shift.square().sum()])
            within = (place > 0) & (place <= levels)
            shift = shift[within]
            index = (place[within] * (bins / levels)).ceil().long().sub_(1).clamp_(0, bins - 1)
            counts += torch.bincount(index, minlength=bins)
            sums += torch.bincount(index, shift, bins)
            squares += torch.bincount(index, shift.square(), bins)
        return cls(counts, sums, squares, tuple(of_all.tolist()), levels)

    def summary(self) -> dict[str, float]:
        """Mean and standard deviation over every activation."""
        mean, spread = _moments(*self.of_all)
        return {"mean": mean, "std": spread}

    def bins(self) -> dict[str, list[float | None]]:
        """Mean and standard deviation of each bin, null where no activation fell into it."""
        moments = [
            _moments(*of_bin) if of_bin[0] else (None, None)
            for of_bin in zip(self.counts.tolist(), self.sums.tolist(), self.squares.tolist(), strict=True)
        ]
        return {"mean": [mean for mean, _ in moments], "std": [spread for _, spread in moments]}

    def between_codes(self) -> list[float]:
        """Mean shift of the activations between each code and the next; 0 where there are none."""
        if len(self.counts) % self.levels:
            return [0.0] * self.levels
        counts, sums = (values.reshape(self.levels, -1).sum(1) for values in (self.counts, self.sums))
        return (sums / counts.clamp(min=1)).tolist()


def _moments(count: float, total: float, squares: float) -> tuple[float, float]:
    mean = total / count
    return _short(mean), _short(max(squares / count - mean * mean, 0.0) ** 0.5)


def _histogram(t: Tensor, is_kept: Tensor, part: ActivationQuantizer) -> dict[str, Any]:
    """Counts of what ``is_kept`` (all but zeros), to beyond the highest code and, but for z = 0, below the lowest."""
    assert part.activation_scale is not None
    levels, scale = largest_code(part.activation_bits), float(part.activation_scale)
    low = -(levels + 1) / 4 if part.zero_point else 0.0
    high = levels + (levels + 1) / 2
    values = t[is_kept].cpu()
    index = ((values - low) * (HISTOGRAM_BINS / (high - low))).floor().clamp(-1, HISTOGRAM_BINS).long() + 1
    counts = torch.bincount(index, minlength=HISTOGRAM_BINS + 2).tolist()
    return {
        "low": _short(scale * (low - part.zero_point)),
        "high": _short(scale * (high - part.zero_point)),
        "counts": counts[1:-1],
        "below": counts[0],
        "above": counts[-1],
        "zeros": t.numel() - len(values),
    }


def _in_steps(x: Tensor, part: ActivationQuantizer) -> Tensor:
    """t = x / s + z, kept finite."""
    assert part.activation_scale is not None
    limit = 4.0 * (largest_code(part.activation_bits) + 1)
    return (x / part.activation_scale + part.zero_point).nan_to_num_(0.0).clamp_(-limit, limit)


def _is_clipped(t: Tensor, part: ActivationQuantizer) -> Tensor:
    """Where rounding to nearest would give a code that there is not."""
    return (t < -0.5) | (t > largest_code(part.activation_bits) + 0.5)


def _as_maps(value: Tensor, part: ActivationQuantizer) -> Tensor:
    """(N, C, H, W); a linear layer has a border per feature, wherever the features stand."""
    linear = isinstance(part, QuantizedLayer) and part.op == "linear"
    return value.reshape(-1, value.shape[-1], 1, 1) if linear or value.dim() != 4 else value


def _sqnr(approximate: Tensor, exact: Tensor) -> float:
    return round(sqnr_db(approximate, exact), 3)


def _short(value: float) -> float:
    """Six digits: a report is read, and its bytes are few."""
    return float(f"{value:.6g}")
