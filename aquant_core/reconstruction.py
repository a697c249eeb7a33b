"""Block reconstruction: learns a block's borders, activation steps and weight rounding (Algorithm 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from aquant_core import schedules
from aquant_core.caches import BlockCache, Cache
from aquant_core.config import BorderConfig
from aquant_core.layers import ActivationQuantizer, Dropping, QuantizedLayer
from aquant_core.methods import MethodSettings, Preset
from aquant_core.model import QuantizedModel
from aquant_core.partition import Block, layer_units
from aquant_core.replay import LossReadings, Replay

REPORT_EVERY = 10
"""Iterations between two readings of the loss."""


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

    def extend(self, later: BlockHistory, offset: int) -> None:
        """Appends another unit's, whose iterations come after ``offset``."""
        self.iterations += [offset + step for step in later.iterations]
        self.losses += later.losses


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
    """Learns one block, or a unit of it, in place and hardens it.

    Args:
        model: the network; its layers in ``block`` are changed.
        block: a block with at least one layer, or one of its ``units_of``.
        cache: its inputs and targets.
        schedule: method, preset and border.
        generator: source of every random draw, on the layers' device.
        on_iteration: called with the step and its loss every ``REPORT_EVERY`` steps; may raise to stop.

    Returns:
        The loss over the iterations.
    """
    steps, history = schedule.preset.iterations, BlockHistory()
    parts = model.learned_in(block)
    if not is_learned(parts, schedule.method):
        return history

    def told(step: int, loss: float) -> None:
        history.iterations.append(step)
        history.losses.append(loss)
        on_iteration(step, loss)

    learner = BlockLearner(model, block, cache, schedule, generator)
    readings = LossReadings(learner.loss, told)
    for step in range(steps):
        learner.step(step)
        if step % REPORT_EVERY == 0 or step == steps - 1:
            readings.take(step)
    readings.finish()
    for part in parts:
        part.finish()
    return history


def units_of(block: Block, method: MethodSettings) -> list[Block]:
    """What is reconstructed at a time: the block, or each layer in it."""
    return layer_units(block) if method.unit == "layer" else [block]


def is_learned(parts: list[ActivationQuantizer], method: MethodSettings) -> bool:
    """Whether any of them has something to learn."""
    learns_activations = method.learn_scale or method.border
    return any(
        (learns_activations and part.activation_scale is not None)
        or (method.learn_weights and isinstance(part, QuantizedLayer) and part.weight is not None)
        for part in parts
    )


class BlockLearner:
    """The learnable state of one block, and one iteration of it.

    An iteration reads what changes with the step (batch, rounding schedule, rates) from tensors of fixed address and
    never waits for the device, so that on a GPU it is captured once a phase as a CUDA graph and replayed.

    Attributes:
        loss: reconstruction loss of the latest step, a scalar on the device.
    """

    def __init__(
        self,
        model: QuantizedModel,
        block: Block,
        cache: BlockCache,
        schedule: Schedule,
        generator: torch.Generator,
    ) -> None:
        self._model, self._block, self._cache, self._schedule = model, block, cache, schedule
        self._parts = model.learned_in(block)
        layers = [part for part in self._parts if isinstance(part, QuantizedLayer)]
        self._weights = [layer.weight for layer in layers if layer.weight is not None]
        device = model.device
        preset, images = schedule.preset, len(cache.noised)
        size = min(preset.batch_size, images)
        self._noised, self._clean = (torch.empty(size, *cache.noised.image_shape, device=device) for _ in range(2))
        self._target = torch.empty(size, *cache.target.image_shape, device=device)
        # (iterations, batch) image numbers, drawn ahead and on the CPU: the same wherever the images lie.
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        order = torch.Generator().manual_seed(seed)
        chosen = torch.empty(preset.iterations, size, dtype=torch.int64)
        for row in chosen:
            row.copy_(torch.randperm(images, generator=order)[:size])
        self._chosen = {place: chosen.to(place) for place in (chosen.device, device)}
        self._drop_input = Dropping(schedule.method.drop_input, generator) if schedule.method.drop_input else None
        timetable = [_row(step, preset, schedule.method) for step in range(preset.iterations)]
        self._timetable = torch.tensor(timetable, device=device)  # (iterations, 4)
        self._now = torch.zeros(4, device=device)  # rounding, scale's rate, border's rate, beta
        self.loss = torch.zeros((), device=device)
        self._optimizer = self._prepare(generator)
        self._replay = Replay(self._optimizer, generator) if device.type == "cuda" else None

    def step(self, step: int) -> None:
        """Does iteration ``step`` of ``preset.iterations``."""
        method, steps = self._schedule.method, self._schedule.preset.iterations
        self._gather(self._cache.noised, step, self._noised)
        if self._drop_input:
            self._gather(self._cache.clean, step, self._clean)
        self._gather(self._cache.target, step, self._target)
        self._now.copy_(self._timetable[step])
        warming_up = method.rounding_schedule and schedules.rounding_schedule(step, steps) == 0
        regularised = schedules.regulariser_acts(step, steps)
        for part in self._parts:
            part.rounding = 0.0 if warming_up else self._now[0] if method.rounding_schedule else 1.0
        if self._replay is None:
            self._iterate(regularised)
        else:
            self._replay.run(partial(self._iterate, regularised), (warming_up, regularised))

    def _gather(self, cache: Cache, step: int, out: Tensor) -> None:
        cache.gather(self._chosen[cache.lies_on][step], out)

    def _iterate(self, regularised: bool) -> None:
        """One step of Algorithm 1 on the batch in place."""
        with _tensor_cores():
            x = self._noised if self._drop_input is None else self._drop_input(self._noised, self._clean)
            self._optimizer.zero_grad(set_to_none=True)
            loss = reconstruction_loss(self._model.run_block(self._block, x), self._target)
            total = loss + self._regulariser() if regularised else loss
            total.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        for part in self._parts:
            part.project()
        self.loss.copy_(loss.detach())

    def _prepare(self, generator: torch.Generator) -> torch.optim.Optimizer:
        """Makes the block learnable; one Adam with a group for each kind of parameter."""
        border: list[Tensor] = []
        scale: list[Tensor] = []
        rounding: list[Tensor] = []
        method, preset = self._schedule.method, self._schedule.preset
        self._model.requires_grad_(False)  # what is not learned here needs no gradients
        if method.learn_weights:
            rounding.extend(weight.learn() for weight in self._weights)
        for part in self._parts:
            if part.activation_scale is None:
                continue
            if method.learn_scale:
                scale.append(part.activation_scale.requires_grad_())
            if method.border and isinstance(part, QuantizedLayer):
                border.extend(part.add_border(self._schedule.border).tensors())
            if method.drop_inside:
                part.dropping = Dropping(method.drop_inside, generator)
        device = self._now.device
        groups = [
            {"params": border, "lr": self._now[2]},
            {"params": scale, "lr": self._now[1]},
            {"params": rounding, "lr": torch.tensor(preset.rounding_rate, device=device)},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def _regulariser(self) -> Tensor | float:
        """lambda sum(1 - |2 h(V) - 1|^beta), appendix Eq. 4."""
        method = self._schedule.method
        terms = [weight.regulariser(self._now[3]) for weight in self._weights if method.learn_weights]
        return method.regulariser_weight * torch.stack(terms).sum() if terms else 0.0


def _row(step: int, preset: Preset, method: MethodSettings) -> tuple[float, float, float, float]:
    """What an iteration reads of its step: rounding schedule, rates of activation step and border, beta."""
    steps = preset.iterations
    cosine = schedules.cosine(step, steps)
    return (
        schedules.rounding_schedule(step, steps),
        preset.scale_rate * cosine,
        preset.border_rate * (cosine if preset.border_decays else 1.0),
        schedules.regulariser_beta(step, steps, method.first_beta, method.last_beta),
    )


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Matrix products of an iteration in TF32, where there are tensor cores; everything else stays fp32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.deterministic = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before
