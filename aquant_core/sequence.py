"""Goes through the blocks in order: learns each, and hands its outputs on as the next one's inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aquant_core.caches import BlockCache, Cache, Placement
from aquant_core.config import Method
from aquant_core.evaluation import evaluation_batch_size
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.forecast import BlockForecast, Forecast
from aquant_core.graph import CapturedModel
from aquant_core.model import QuantizedModel, run_float_block
from aquant_core.partition import Block
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import BlockHistory, Schedule, reconstruct_block, reconstruction_loss, units_of
from aquant_core.resources import PeakMemory, Resources, return_free_memory


@dataclass
class Run:
    """One method on its way through the blocks.

    Attributes:
        method: its name.
        model: the quantized network; it is changed. Its graph is the float network.
        blocks: all blocks of that graph, in order.
        schedule: how a block is learned.
        forecast: what the blocks will take; it decides where their inputs and outputs are kept.
        finished: where finished blocks are kept and, if they are there, taken from.
        history: the report's ``blocks``.
    """

    method: Method
    model: QuantizedModel
    blocks: list[Block]
    schedule: Schedule
    forecast: Forecast
    finished: FinishedBlocks | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def reconstruct_blocks(runs: list[Run], images: Tensor, seed: int, resources: Resources, tell: OnProgress) -> None:
    """Learns every block in which something is quantized.

    Several methods go through the blocks together and share what the float network makes of the images.

    Args:
        runs: the methods; the networks differ in nothing but where values are quantized.
        images: (N, C, H, W) calibration images.
        seed: of every random draw, by block.
        resources: device and folder.
        tell: told of every tenth iteration.
    """
    float_values = FloatValues(images, resources)
    clock = _Clock(sum(run.forecast.seconds for run in runs))
    sequences = [_Sequence(run, float_values, seed, tell, clock) for run in runs]
    for index, block in enumerate(runs[0].blocks):
        started = time.monotonic()
        float_values.enter(runs[0].model.graph, block, runs[0].forecast.blocks[index].placement)
        shared = (time.monotonic() - started) / len(runs)
        for sequence in sequences:
            last = sequence is sequences[-1]
            sequence.go_through(index, shared, float_values.leave if last else lambda: None)


class FloatValues:
    """What the float network makes of the images, before and behind the current block."""

    def __init__(self, images: Tensor, resources: Resources) -> None:
        self.resources = resources
        self.batch_size = evaluation_batch_size(images)
        self.clean = Cache.of(images, resources.device)

    def enter(self, graph: CapturedModel, block: Block, placement: Placement) -> None:
        """Makes the block's target."""
        self.peak = PeakMemory(self.resources.device)
        self.target = self.through(partial(run_float_block, graph, block), self.clean, placement)

    def leave(self) -> None:
        """Nobody needs the block's own clean input any more."""
        self.clean = self.target
        return_free_memory()

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First and last image (exclusive) of every batch."""
        images = len(self.clean)
        for start in range(0, images, self.batch_size):
            yield start, min(start + self.batch_size, images)

    @torch.no_grad()
    def through(
        self,
        function: Callable[[Tensor], Tensor],
        inputs: Cache,
        placement: Placement,
        compare: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Cache:
        """``function`` over all images, batch by batch; each result may be compared with the target."""
        outputs: Cache | None = None
        for start, stop in self.ranges():
            result = function(inputs.read(start, stop))
            if outputs is None:
                shape = torch.Size([len(inputs), *result.shape[1:]])
                outputs = Cache(shape, self.resources.device, placement, self.resources.folder)
            outputs.write(start, result)
            if compare is not None:
                compare(result, self.target.read(start, stop))
        assert outputs is not None, "there are images"
        return outputs


class _Sequence:
    """One method's noised values between two blocks, and what is done with them."""

    def __init__(self, run: Run, float_values: FloatValues, seed: int, tell: OnProgress, clock: _Clock) -> None:
        self.run, self.float_values, self.seed, self.tell, self.clock = run, float_values, seed, tell, clock
        self.noised = float_values.clean
        self.resuming = run.finished is not None
        self.count = sum(block.has_parts for block in run.blocks)

    def go_through(self, index: int, shared: float, learned: Callable[[], None]) -> None:
        """Learns the block or takes the finished one, and hands its outputs on.

        Args:
            index: the block's place.
            shared: seconds that its target took.
            learned: called as soon as the block is learned.
        """
        run, block = self.run, self.run.blocks[index]
        self.started, self.expected = time.monotonic() - shared, run.forecast.blocks[index]
        if not block.has_parts:
            learned()
            self.hand_on(block)
            return
        entry = None
        if run.finished is not None and self.resuming:
            entry = run.finished.load(index, block, run.model, run.schedule.border)
        if entry is not None:
            learned()
            self.hand_on(block)
        else:
            self.resuming = False
            entry = self.learn(block)
            learned()
            entry |= self.hand_on(block)
            if run.finished is not None:
                run.finished.save(index, block, run.model, entry)
        run.history.append(entry)
        self.clock.finish(self.expected, entry["seconds"])

    def learn(self, block: Block) -> dict[str, Any]:
        """Learns the block, unit by unit; its part of the report, as far as it is known."""
        before, schedule = self.error(block), self.run.schedule
        return_free_memory()
        units, steps = units_of(block, schedule.method), schedule.preset.iterations
        device = self.float_values.resources.device
        generator = torch.Generator(device).manual_seed(seed_of_block(self.seed, block.name))
        curve = BlockHistory()
        for done, unit in enumerate(units):
            told = partial(self.tell_of, done * steps, len(units) * steps)
            curve.extend(
                reconstruct_block(self.run.model, unit, self.cache_of(unit, block), schedule, generator, told),
                done * steps,
            )
        return {
            "name": block.name,
            "layers": [node.name for node in block.layers],
            "iterations": len(units) * steps if curve.iterations else 0,
            "error_before": before,
            "loss": {"iterations": curve.iterations, "values": curve.losses},
        }

    def tell_of(self, done: int, iterations: int, step: int, loss: float) -> None:
        """Progress: after ``done`` iterations in other units of the block, ``step`` more."""
        number, step = len(self.run.history) + 1, done + step + 1
        seconds = self.clock.seconds_left(self.expected, step / iterations, time.monotonic() - self.started)
        self.tell(Progress("reconstruct", number, self.count, step, iterations, loss, seconds, method=self.run.method))

    def cache_of(self, unit: Block, block: Block) -> BlockCache:
        """What the unit is learned from; the target is what the float network has where the unit ends."""
        values = self.float_values
        if unit is block:
            return BlockCache(self.noised, values.clean, values.target)
        function = partial(run_float_block, self.run.model.graph, unit)
        return BlockCache(self.noised, values.clean, values.through(function, values.clean, self.expected.placement))

    def hand_on(self, block: Block) -> dict[str, Any]:
        """Makes the block's outputs the next one's inputs; what is known of the block then."""
        return_free_memory()
        error = _Mean()
        function = partial(self.run.model.run_block, block)
        self.noised = self.float_values.through(function, self.noised, self.expected.placement, error.add)
        return {
            "error_after": error.value,
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_bytes": self.float_values.peak.read(),
            "placement": self.expected.placement,
        }

    @torch.no_grad()
    def error(self, block: Block) -> float:
        error = _Mean()
        for start, stop in self.float_values.ranges():
            target = self.float_values.target.read(start, stop)
            error.add(self.run.model.run_block(block, self.noised.read(start, stop)), target)
        return error.value


class _Mean:
    """Reconstruction loss over all images, from batches."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, output: Tensor, target: Tensor) -> None:
        self._sum += float(reconstruction_loss(output, target)) * len(output)
        self._count += len(output)

    @property
    def value(self) -> float:
        return self._sum / self._count


class _Clock:
    """Seconds left: the forecast's, times what the blocks so far took against their forecast."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._expected = self._taken = 0.0

    def seconds_left(self, block: BlockForecast, share: float, taken: float) -> float:
        """While ``share`` of the current block is done, after ``taken`` seconds in it."""
        expected = self._expected + share * block.seconds
        ratio = (self._taken + taken) / expected if expected > 0 else 1.0
        # A block's first steps say little: the forecast counts for as much as a tenth of the whole.
        weight = 0.1 * (self._left + self._expected)
        ratio = (ratio * expected + weight) / (expected + weight) if expected + weight > 0 else 1.0
        return round((self._left - share * block.seconds) * ratio, 1)

    def finish(self, block: BlockForecast, taken: float) -> None:
        self._left -= block.seconds
        self._expected += block.seconds
        self._taken += taken


def seed_of_block(seed: int, name: str) -> int:
    """A block's own seed, so that it does not depend on what other blocks drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
