"""Block reconstruction: learns a block's borders, activation steps and weight rounding (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquant_core import schedules
from aquant_core.config import BorderConfig
from aquant_core.layers import Dropping, QuantizedLayer
from aquant_core.methods import MethodSettings, Preset
from aquant_core.model import QuantizedModel
from aquant_core.partition import Block

REPORT_EVERY = 10
"""Iterations between two readings of the loss."""


@dataclass
class BlockCache:
    """What a block is learned from, image by image.

    Attributes:
        noised: the block's input from the quantized predecessors, X'.
        clean: the same from the float network.
        target: the float block's output.
    """

    noised: Tensor
    clean: Tensor
    target: Tensor


@dataclass(frozen=True)
class Schedule:
    """How one block is learned: the method, what the run may cost, and the border's switches."""

    method: MethodSettings
    preset: Preset
    border: BorderConfig


@dataclass
class BlockHistory:
    """Reconstruction loss by iteration, every ``REPORT_EVERY``."""

    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over the channels, mean over everything else (Algorithm 1, line 5)."""
    return (output - target).square().sum(1).mean()


def reconstruct_block(
    model: QuantizedModel,
    block: Block,
    cache: BlockCache,
    schedule: Schedule,
    generator: torch.Generator,
    on_iteration: Callable[[int, float], None],
) -> BlockHistory:
    """Learns one block in place and hardens it.

    Args:
        model: the network; its layers in ``block`` are changed.
        block: a block with at least one layer.
        cache: its inputs and targets.
        schedule: method, preset and border.
        generator: source of every random draw, on the cache's device.
        on_iteration: called with the step and its loss every ``REPORT_EVERY`` steps; may raise to stop.

    Returns:
        The loss over the iterations.
    """
    method, preset = schedule.method, schedule.preset
    layers = model.layers_of(block)
    images, steps, history = len(cache.noised), preset.iterations, BlockHistory()
    if all(layer.weight is None and layer.activation_scale is None for layer in layers):
        return history  # a float block
    optimizer = _prepare(layers, schedule, generator)
    drop_input = Dropping(method.drop_input, generator)
    for step in range(steps):
        chosen = torch.randperm(images, generator=generator, device=cache.noised.device)[: preset.batch_size]
        x = cache.noised[chosen]
        if method.drop_input:
            x = drop_input(x, cache.clean[chosen])
        for layer in layers:
            layer.rounding = schedules.rounding_schedule(step, steps) if method.rounding_schedule else 1.0
        for group in optimizer.param_groups:
            if group["name"] == "scale":
                group["lr"] = preset.scale_rate * schedules.cosine(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss = reconstruction_loss(model.run_block(block, x), cache.target[chosen])
        (loss + _regulariser(layers, method, step, steps)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for layer in layers:
            layer.project()
        if step % REPORT_EVERY == 0 or step == steps - 1:
            value = loss.item()
            history.iterations.append(step)
            history.losses.append(value)
            on_iteration(step, value)
    for layer in layers:
        layer.finish()
    return history


def _prepare(layers: list[QuantizedLayer], schedule: Schedule, generator: torch.Generator) -> torch.optim.Optimizer:
    """Makes the layers learnable; one Adam with a group for each kind of parameter."""
    border: list[Tensor] = []
    scale: list[Tensor] = []
    rounding: list[Tensor] = []
    for layer in layers:
        if layer.weight is not None:
            layer.weight.learn()
            assert layer.weight.variable is not None
            rounding.append(layer.weight.variable)
        if layer.activation_scale is not None:
            scale.append(layer.activation_scale)
            if schedule.method.border:
                layer.add_border(schedule.border)
                assert layer.border is not None
                layer.border.to(layer.float_weight.device)
                border.extend(layer.border.tensors())
            if schedule.method.drop_inside:
                layer.dropping = Dropping(schedule.method.drop_inside, generator)
    preset = schedule.preset
    groups = [
        {"name": "border", "params": border, "lr": preset.border_rate},
        {"name": "scale", "params": scale, "lr": preset.scale_rate},
        {"name": "rounding", "params": rounding, "lr": preset.rounding_rate},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])


def _regulariser(layers: list[QuantizedLayer], method: MethodSettings, step: int, steps: int) -> Tensor | float:
    """lambda sum(1 - |2 h(V) - 1|^beta), appendix Eq. 4."""
    if not schedules.regulariser_acts(step, steps):
        return 0.0
    beta = schedules.regulariser_beta(step, steps, method.first_beta, method.last_beta)
    terms = [layer.weight.regulariser(beta) for layer in layers if layer.weight is not None]
    return method.regulariser_weight * torch.stack(terms).sum() if terms else 0.0
