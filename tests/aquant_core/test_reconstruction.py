"""One block's reconstruction: what it learns, what it leaves alone, and how it can be stopped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquant_core.caches import BlockCache, Cache
from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.methods import METHODS, Preset
from aquant_core.model import QuantizedModel, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.reconstruction import (
    REPORT_EVERY,
    BlockHistory,
    Schedule,
    reconstruct_block,
    reconstruction_loss,
)

PRESET = Preset(60, 16, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
SHORT = Preset(12, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
LEARNED: list[Method] = ["qdrop_refactored", "aquant_no_border", "aquant"]


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


def setting(**bits: Any) -> tuple[CapturedModel, QuantizedModel, Block, BlockCache]:
    torch.manual_seed(0)
    images = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = fold_batch_norm(capture(TwoConvolutions().eval(), example=images[:2]))
    (block,) = partition(graph)
    config = QuantizationConfig(**{"weight_bits": 2, "activation_bits": 2, "first_last_bits": 2} | bits)
    with torch.no_grad():
        model = quantize_to_nearest(graph, images, config)
        target = run_float_block(graph, block, images)
    return graph, model, block, BlockCache(*(Cache.of(t, CPU) for t in (images, images.clone(), target)))


def reconstruct(
    method: Method, seed: int = 0, preset: Preset = PRESET, on_iteration: Any = lambda *_: None, **bits: Any
) -> tuple[float, float, QuantizedModel, BlockHistory]:
    """Error before and after, the model, and its history."""
    _, model, block, cache = setting(**bits)
    before = float(reconstruction_loss(output_of(model, block, cache), values(cache.target)))
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(METHODS[method], preset, BorderConfig())
    history = reconstruct_block(model, block, cache, schedule, generator, on_iteration)
    after = float(reconstruction_loss(output_of(model, block, cache), values(cache.target)))
    return before, after, model, history


@torch.no_grad()
def output_of(model: QuantizedModel, block: Block, cache: BlockCache) -> Tensor:
    return model.run_block(block, values(cache.noised))


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
    for layer in model.layers.values():
        assert layer.weight is not None
        assert layer.weight.variable is None
        assert layer.rounding == 1.0
        assert layer.dropping is None
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
