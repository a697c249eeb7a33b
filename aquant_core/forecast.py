"""What a reconstruction will take in time and memory, from one trial iteration of every block, before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aquant_core.caches import BlockCache, Cache, Placement
from aquant_core.config import FLOAT_BITS, QuantizationConfig
from aquant_core.evaluation import evaluation_batch_size
from aquant_core.graph import CapturedModel
from aquant_core.layers import ActivationQuantizer
from aquant_core.model import QuantizedModel, bits_of_layers, bits_of_marks, run_float_block
from aquant_core.partition import Block
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code
from aquant_core.reconstruction import BlockLearner, Schedule, is_learned, units_of
from aquant_core.resources import PeakMemory, Resources, resident_bytes
from aquant_core.schedules import WARM_UP

_FLOAT = 4  # bytes
_ITERATIONS, _TRIED = 5, (0, 3)
"""Of a schedule of five iterations, one within its warm-up and one behind it."""


@dataclass(frozen=True)
class BlockForecast:
    """What one block will take.

    Attributes:
        name: the block's.
        seconds: to learn it and hand its outputs on.
        peak_bytes: memory on the device (on a CPU, of the process) while it is learned.
        placement: where its target and output are kept.
        learned: whether there is anything in it to learn; progress counts no others.
    """

    name: str
    seconds: float
    peak_bytes: int
    placement: Placement
    learned: bool = True


@dataclass(frozen=True)
class Forecast:
    """What all blocks will take, in order."""

    blocks: tuple[BlockForecast, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(block.seconds for block in self.blocks)

    @property
    def peak_bytes(self) -> int:
        return max((block.peak_bytes for block in self.blocks), default=0)

    @property
    def placement(self) -> Placement:
        """Where a few of every block's values may be kept: in files if some block's have to be."""
        return "disk" if any(block.placement == "disk" for block in self.blocks) else "memory"

    def document(self) -> dict[str, Any]:
        """JSON values."""
        blocks = [vars(block) | {"seconds": round(block.seconds, 3)} for block in self.blocks]
        return {"seconds": round(self.seconds, 1), "peak_bytes": self.peak_bytes, "blocks": blocks}


@dataclass(frozen=True)
class _Trial:
    """Measured on one block: seconds and bytes beyond what was there, and the numbers in an image of its output and of
    the largest target within it.
    """

    seconds: float
    step_bytes: int
    hand_on_bytes: int
    output_numbers: int
    inner_numbers: int


def forecast(
    graph: CapturedModel,
    blocks: list[Block],
    images: Tensor,
    config: QuantizationConfig,
    schedule: Schedule,
    resources: Resources,
    check: Callable[[], None] = lambda: None,
    others: int = 0,
) -> Forecast:
    """Tries every block on a few images and extrapolates.

    Args:
        graph: the folded float network, on the device.
        blocks: its blocks, in order.
        images: (N, C, H, W) calibration images.
        config: the bits, which decide what is quantized.
        schedule: method, preset and border.
        resources: budgets, by which the caches are placed.
        check: called between blocks; may raise to stop.
        others: how many methods are run beside this one.
    """
    device = resources.device
    batch = images[: max(evaluation_batch_size(images), schedule.preset.batch_size)]
    value, trials = batch.to(device), []
    first = next(block for block in blocks if block.layers)
    with torch.no_grad():
        for block in blocks:
            check()
            if block is first:  # once in vain: what libraries load and compile does not count
                _try_block(graph, block, value, config, schedule, len(images))
            trial, value = _try_block(graph, block, value, config, schedule, len(images))
            trials.append(trial)
    del value
    return _place(graph, blocks, trials, len(images), resources, others)


def together(forecasts: list[Forecast]) -> Forecast:
    """What several methods take that go through the blocks together."""
    blocks = []
    for same in zip(*(forecast.blocks for forecast in forecasts), strict=True):
        seconds, peak = sum(block.seconds for block in same), max(block.peak_bytes for block in same)
        blocks.append(replace(same[0], seconds=seconds, peak_bytes=peak))
    return Forecast(tuple(blocks))


def _try_block(
    graph: CapturedModel, block: Block, value: Tensor, config: QuantizationConfig, schedule: Schedule, images: int
) -> tuple[_Trial, Tensor]:
    """Hands one batch on and does two iterations of each unit."""
    device = value.device
    model = roughly_quantized(graph, block, value, config, schedule)
    peak = PeakMemory(device)
    started = time.perf_counter()
    output = run_float_block(graph, block, value)
    middle = time.perf_counter()
    model.run_block(block, value)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # Twice through the quantized block: for its error before, and to hand on what it has become.
    passing = ((middle - started) + 2 * (time.perf_counter() - middle)) * images / len(value)
    handing_on = peak.read() - peak.start
    learning, step_bytes, inner_numbers = 0.0, 0, 0
    for unit in units_of(block, schedule.method):
        if is_learned(model.learned_in(unit), schedule.method):
            target = output if unit is block else run_float_block(graph, unit, value)
            inner_numbers = max(inner_numbers, 0 if unit is block else target[0].numel())
            seconds, taken = _try_unit(model, unit, value, target, schedule)
            learning, step_bytes = learning + seconds, max(step_bytes, taken)
    return _Trial(passing + learning, step_bytes, handing_on, output[0].numel(), inner_numbers), output


def _try_unit(
    model: QuantizedModel, unit: Block, value: Tensor, target: Tensor, schedule: Schedule
) -> tuple[float, int]:
    """Does two iterations, one while the rounding schedule is 0 and one after; seconds of all, bytes of one."""
    device = value.device
    size = min(schedule.preset.batch_size, len(value))
    cache = BlockCache(*(Cache.of(tensor[:size], device) for tensor in (value, value, target)))
    peak = PeakMemory(device)
    generator = torch.Generator(device).manual_seed(0)
    short = replace(schedule, preset=replace(schedule.preset, iterations=_ITERATIONS))
    with torch.enable_grad():
        learner = BlockLearner(model, unit, cache, short, generator)
        for step in _TRIED:  # what is done once: memory is taken, a graph is captured
            learner.step(step)
        seconds = [_seconds_of(learner, step, device) for step in _TRIED]
    learning = schedule.preset.iterations * (WARM_UP * seconds[0] + (1 - WARM_UP) * seconds[1])
    return learning, peak.read() - peak.start


def _seconds_of(learner: BlockLearner, step: int, device: torch.device) -> float:
    started = time.perf_counter()
    learner.step(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def roughly_quantized(
    graph: CapturedModel, block: Block, value: Tensor, config: QuantizationConfig, schedule: Schedule
) -> QuantizedModel:
    """A network whose ``block`` costs what it will cost; its steps come from ranges, not from a search."""
    model = QuantizedModel(graph)
    bits = bits_of_layers(graph, config)
    inputs: dict[str, tuple[ActivationQuantizer, int]] = {
        name: (model.quantizers[name], width) for name, width in bits_of_marks(graph, bits, config).items()
    }
    for node in block.layers:
        layer = model.layers[node.name]
        layer.weight_bits, activation_bits = bits[node.name]
        rows = layer.float_weight.flatten(1)
        if layer.weight_bits != FLOAT_BITS:
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / largest_code(layer.weight_bits)
            grid = UniformGrid(scale, torch.zeros_like(scale), largest_code(layer.weight_bits))
            layer.weight = WeightRounding.nearest(layer.float_weight, grid)
        if schedule.method.placement == "input":
            inputs[node.name] = layer, activation_bits
    for part, width in inputs.values():
        if width != FLOAT_BITS:
            scale = value.abs().max().clamp(min=1e-8) / largest_code(width)
            part.quantize_activation(UniformGrid(scale, torch.zeros_like(scale), 0), width)
    return model


def _place(
    graph: CapturedModel, blocks: list[Block], trials: list[_Trial], images: int, resources: Resources, others: int
) -> Forecast:
    """Decides for every block where target and output go: as near to the device as both its own and the next block's
    needs allow.
    """
    on_cpu = resources.device.type == "cpu"
    # While a network is quantized, each weight has a code and a fraction beside its float value.
    codes = (1 + others) * sum(2 * _FLOAT * graph.weights[node.name]["weight"].numel() for node in graph.layers)
    start = PeakMemory(resources.device).start + codes
    budgets: list[tuple[Placement, int]] = [("memory", resources.memory_budget())]
    if not on_cpu:
        budgets.insert(0, ("device", resources.device_budget()))
    counted = "memory" if on_cpu else "device"
    forecasts, before, before_placement = [], 0, "memory"  # the images themselves are part of ``start``
    for index, (block, trial) in enumerate(zip(blocks, trials, strict=True)):
        pair, inner = _FLOAT * images * trial.output_numbers, _FLOAT * images * trial.inner_numbers
        following = trials[index + 1].step_bytes if index + 1 < len(trials) else 0
        placement: Placement = "disk"
        for candidate, budget in budgets:
            floor = start if candidate == counted else resident_bytes()
            held = before if before_placement == candidate else 0
            live = _live(held, pair, inner, trial, others)
            if floor + max(live, (2 + others) * pair + following) <= budget:
                placement = candidate
                break
        held, added, inside = (
            size if where == counted else 0
            for size, where in ((before, before_placement), (pair, placement), (inner, placement))
        )
        peak = start + _live(held, added, inside, trial, others)
        forecasts.append(BlockForecast(block.name, trial.seconds, peak, placement, block.has_parts))
        before, before_placement = pair, placement
    return Forecast(tuple(forecasts))


def _live(before: int, pair: int, inner: int, trial: _Trial, others: int) -> int:
    """Bytes while a block is learned (noised, clean, target), or handed on (noised, target, output); the other methods
    each hold an input or an output meanwhile, and the clean input until all have learned.
    """
    learning = 2 * before + pair + inner + trial.step_bytes
    handing_on = (2 if others else 1) * before + 2 * pair + trial.hand_on_bytes
    return others * max(before, pair) + max(learning, handing_on)
