"""One block's reconstruction: what it learns, what it leaves alone, and how it can be stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquant_core.caches import BlockCache, Cache
from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.layers import ActivationQuantizer
from aquant_core.methods import METHODS, Preset
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.reconstruction import (
    REPORT_EVERY,
    BlockHistory,
    BlockLearner,
    Schedule,
    is_learned,
    reconstruct_block,
    reconstruction_loss,
    units_of,
)

PRESET = Preset(60, 16, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
SHORT = Preset(12, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
LEARNED: list[Method] = ["brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"]


CPU = torch.device("cpu")


class TwoConvolutions(nn.Module):
    """One residual block: two convolutions with a shortcut around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class StoppedError(Exception):
    """Raised by a test's callback."""


def setting(method: Method = "aquant", **bits: Any) -> tuple[CapturedModel, QuantizedModel, Block, BlockCache]:
    torch.manual_seed(0)
    images = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    config = QuantizationConfig(**{"weight_bits": 2, "activation_bits": 2, "first_last_bits": 2} | bits)
    graph = fold_batch_norm(capture(TwoConvolutions().eval(), example=images[:2]))
    graph = marked(graph, config, METHODS[method])
    (block,) = partition(graph)
    with torch.no_grad():
        model = quantize_to_nearest(graph, images, config, METHODS[method].placement)
        target = run_float_block(graph, block, images)
    return graph, model, block, BlockCache(*(Cache.of(t, CPU) for t in (images, images.clone(), target)))


def reconstruct(
    method: Method, seed: int = 0, preset: Preset = PRESET, on_iteration: Any = lambda *_: None, **bits: Any
) -> tuple[float, float, QuantizedModel, BlockHistory]:
    """Error before and after, the model, and its history."""
    _, model, block, cache = setting(method, **bits)
    before = float(reconstruction_loss(output_of(model, block, cache), values(cache.target)))
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(METHODS[method], preset, BorderConfig())
    history = reconstruct_block(model, block, cache, schedule, generator, on_iteration)
    after = float(reconstruction_loss(output_of(model, block, cache), values(cache.target)))
    return before, after, model, history


@torch.no_grad()
def output_of(model: QuantizedModel, block: Block, cache: BlockCache) -> Tensor:
    return model.run_block(block, values(cache.noised))


def parts_of(model: QuantizedModel) -> list[ActivationQuantizer]:
    return [*model.layers.values(), *model.quantizers.values()]


def codes_of(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: layer.weight.codes.clone() for name, layer in model.layers.items() if layer.weight is not None}


def steps_of(model: QuantizedModel) -> dict[str, float]:
    parts = {**model.layers, **model.quantizers}
    return {name: p.activation_scale.item() for name, p in parts.items() if p.activation_scale is not None}


def values(cache: Cache) -> Tensor:
    return cache.read(0, len(cache))


def test_loss_by_hand() -> None:
    # Channels summed, images and pixels averaged: (1 + 4) at one of 2 x 3 places, 0 elsewhere.
    output = torch.zeros(2, 2, 1, 3)
    output[0, :, 0, 0] = torch.tensor([1.0, 2.0])
    assert float(reconstruction_loss(output, torch.zeros_like(output))) == pytest.approx(5 / 6)
    assert float(reconstruction_loss(torch.ones(4, 10), torch.zeros(4, 10))) == pytest.approx(10.0)


@pytest.mark.parametrize("method", LEARNED)
def test_every_method_lowers_the_blocks_error(method: Method) -> None:
    before, after, model, _ = reconstruct(method)
    assert after < before
    for part in parts_of(model):
        assert part.rounding == 1.0
        assert part.dropping is None
    for layer in model.layers.values():
        assert layer.weight is not None
        assert layer.weight.variable is None
        assert (layer.border is not None) == (method == "aquant")
        if layer.border is not None:
            assert layer.border.coefficients.count_nonzero() > 0
            assert torch.equal(layer.border.coefficients, layer.border.coefficients.half().float())


def test_weights_stay_within_one_step_of_the_float_ones() -> None:
    _, nearest, _, _ = setting()
    _, _, learned, _ = reconstruct("aquant")
    differs = 0
    for name, layer in learned.layers.items():
        other = nearest.layers[name].weight
        assert layer.weight is not None
        assert other is not None
        assert (layer.weight.codes - other.codes).abs().max() <= 1
        assert torch.equal(layer.weight.scale, other.scale)
        differs += int((layer.weight.codes != other.codes).sum())
    assert differs > 0


def test_the_cache_is_left_alone() -> None:
    _, model, block, cache = setting()
    copies = [values(part).clone() for part in (cache.noised, cache.clean, cache.target)]
    schedule = Schedule(METHODS["aquant"], SHORT, BorderConfig())
    reconstruct_block(model, block, cache, schedule, torch.Generator().manual_seed(0), lambda *_: None)
    parts = (cache.noised, cache.clean, cache.target)
    assert all(torch.equal(copy, values(part)) for copy, part in zip(copies, parts, strict=True))


def test_the_seed_decides_everything() -> None:
    runs = [reconstruct("aquant", seed, SHORT) for seed in (0, 0, 1)]
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for _, _, model, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert runs[0][3] == runs[1][3]
    assert runs[0][3] != runs[2][3]


def test_history_and_callback_say_the_same() -> None:
    told: list[tuple[int, float]] = []
    preset = Preset(25, 8, 1e-2, 1e-3, 1e-2)
    _, _, _, history = reconstruct("aquant", preset=preset, on_iteration=lambda *seen: told.append(seen))
    assert REPORT_EVERY == 10
    assert history.iterations == [0, 10, 20, 24]
    assert list(zip(history.iterations, history.losses, strict=True)) == told


def test_the_callback_can_stop_it() -> None:
    steps: list[int] = []

    def stop(step: int, _: float) -> None:
        steps.append(step)
        if step >= 10:
            raise StoppedError

    with pytest.raises(StoppedError):
        reconstruct("aquant", preset=SHORT, on_iteration=stop)
    assert steps == [0, 10]


def test_a_float_block_is_not_touched() -> None:
    before, after, model, history = reconstruct("aquant", weight_bits=32, activation_bits=32, first_last_bits=32)
    assert before == after == 0
    assert history == BlockHistory()
    assert all(layer.border is None for layer in model.layers.values())


@pytest.mark.parametrize(("weights", "activations"), [(32, 2), (2, 32)])
def test_one_side_alone(weights: int, activations: int) -> None:
    before, after, model, _ = reconstruct("aquant", weight_bits=weights, activation_bits=activations)
    assert math.isfinite(after)
    assert after != before
    if activations == 32:  # with float weights a few steps on random images need not beat the searched step
        assert after < before
    for layer in model.layers.values():
        assert (layer.weight is None) == (weights == 32)
        assert (layer.border is None) == (layer.activation_scale is None) == (activations == 32)


def test_more_images_asked_for_than_there_are() -> None:
    _, _, _, history = reconstruct("aquant", preset=Preset(3, 1000, 3e-2, 1e-3, 3e-2))
    assert history.iterations == [0, 2]


MARKS = ["input.quantize", "relu.quantize"]  # the block's output is read by no layer
LAYERS = ["first", "second"]


@pytest.mark.parametrize("method", ["brecq", "qdrop"])
def test_steps_are_learned_where_values_are_made(method: Method) -> None:
    _, nearest, _, _ = setting(method)
    _, _, model, _ = reconstruct(method)
    before, after = steps_of(nearest), steps_of(model)
    assert list(before) == list(after) == MARKS
    assert all(before[name] != after[name] > 0 for name in MARKS)
    assert all(not torch.equal(codes, codes_of(nearest)[name]) for name, codes in codes_of(model).items())


def test_what_is_dropped_while_it_is_learned() -> None:
    dropped = {}
    for method in METHODS:
        if not METHODS[method].reconstruct:
            continue
        _, model, block, cache = setting(method)
        seen: set[tuple[tuple[str, float], ...]] = set()

        def look(*_: Any, model: QuantizedModel = model, seen: set[Any] = seen) -> None:
            parts = {**model.layers, **model.quantizers}
            seen.add(tuple((name, p.dropping.probability) for name, p in parts.items() if p.dropping is not None))

        for unit in units_of(block, METHODS[method]):
            schedule = Schedule(METHODS[method], SHORT, BorderConfig())
            reconstruct_block(model, unit, cache_of(model, block, unit, cache), schedule, generator(), look)
        look()
        dropped[method] = seen
    always = {()}
    assert dropped == {
        "adaround": always,
        "brecq": always,
        "qdrop": {tuple((name, 0.5) for name in MARKS), ()},
        "qdrop_refactored": {tuple((name, 0.5) for name in LAYERS), ()},
        "aquant_no_border": always,
        "aquant": always,
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cache_of(model: QuantizedModel, block: Block, unit: Block, cache: BlockCache) -> BlockCache:
    """The same inputs, with the target of a unit."""
    if unit is block:
        return cache
    with torch.no_grad():
        target = run_float_block(model.graph, unit, values(cache.clean))
    return BlockCache(cache.noised, cache.clean, Cache.of(target, CPU))


def test_adaround_learns_the_weights_of_one_layer_at_a_time() -> None:
    _, model, block, cache = setting("adaround")
    steps, codes = steps_of(model), [codes_of(model)]
    units = units_of(block, METHODS["adaround"])
    assert [unit.name for unit in units] == LAYERS
    schedule = Schedule(METHODS["adaround"], PRESET, BorderConfig())
    for unit in units:
        own = cache_of(model, block, unit, cache)

        def error(unit: Block = unit, own: BlockCache = own) -> float:
            with torch.no_grad():
                return float(reconstruction_loss(model.run_block(unit, values(own.noised)), values(own.target)))

        before = error()
        reconstruct_block(model, unit, own, schedule, generator(), lambda *_: None)
        assert error() < before
        codes.append(codes_of(model))
        assert all(layer.weight is not None and layer.weight.variable is None for layer in model.layers.values())
    changed = [
        [name for name in LAYERS if not torch.equal(earlier[name], later[name])] for earlier, later in pairwise(codes)
    ]
    assert changed == [["first"], ["second"]]
    assert steps_of(model) == steps


@pytest.mark.parametrize("part", ["learn_weights", "learn_scale"])
def test_what_is_not_to_be_learned_stays(part: str) -> None:
    _, model, block, cache = setting("qdrop_refactored")
    steps, codes = steps_of(model), codes_of(model)
    method = replace(METHODS["qdrop_refactored"], **{part: False})
    reconstruct_block(model, block, cache, Schedule(method, PRESET, BorderConfig()), generator(), lambda *_: None)
    assert (steps_of(model) == steps) is (part == "learn_scale")
    same = [torch.equal(codes_of(model)[name], before) for name, before in codes.items()]
    assert same == [part == "learn_weights"] * 2


def test_other_methods_learn_the_block_as_one() -> None:
    _, _, block, _ = setting("qdrop")
    for method in METHODS:
        if METHODS[method].unit == "block":
            assert units_of(block, METHODS[method]) == [block]


@pytest.mark.parametrize(
    ("method", "weights", "activations", "learned"),
    [
        ("adaround", 32, 2, False),
        ("adaround", 2, 32, True),
        ("brecq", 32, 2, True),
        ("brecq", 2, 32, True),
        ("aquant", 32, 2, True),
        ("aquant", 32, 32, False),
        ("nearest", 2, 2, False),
        ("a_rounding", 2, 2, False),
    ],
)
def test_whether_there_is_something_to_learn(method: Method, weights: int, activations: int, learned: bool) -> None:
    _, model, block, cache = setting(method, weight_bits=weights, activation_bits=activations, first_last_bits=2)
    assert is_learned(model.learned_in(block), METHODS[method]) is learned
    if learned:
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    schedule = Schedule(METHODS[method], SHORT, BorderConfig())
    assert reconstruct_block(model, block, cache, schedule, generator(), lambda *_: None) == BlockHistory()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_borders_rate_decays_only_where_the_preset_says_so() -> None:
    """What the last of 40 steps moves: with a rate that has decayed next to nothing."""
    moved = {}
    for decays in (False, True):
        preset = Preset(40, 16, border_rate=3e-2, scale_rate=0.0, rounding_rate=0.0, border_decays=decays)
        _, model, block, cache = setting("aquant")
        learner = BlockLearner(model, block, cache, Schedule(METHODS["aquant"], preset, BorderConfig()), generator())
        for step in range(40):
            before = border_of(model)
            learner.step(step)
        moved[decays] = float((border_of(model) - before).abs().mean())
    assert moved[True] < 0.01 * moved[False]


def border_of(model: QuantizedModel) -> Tensor:
    borders = [layer.border for layer in model.layers.values()]
    return torch.cat([border.coefficients.detach().flatten() for border in borders if border is not None])


def test_history_of_units_follows_on() -> None:
    history = BlockHistory([0, 9], [1.0, 0.5])
    history.extend(BlockHistory([0, 9], [0.7, 0.2]), 10)
    assert history == BlockHistory([0, 9, 10, 19], [1.0, 0.5, 0.7, 0.2])
