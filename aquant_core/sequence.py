"""Goes through the blocks in order: learns each, and hands its outputs on as the next one's inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aquant_core.caches import BlockCache, Cache
from aquant_core.evaluation import evaluation_batch_size
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.forecast import BlockForecast, Forecast
from aquant_core.graph import CapturedModel
from aquant_core.model import QuantizedModel, run_float_block
from aquant_core.partition import Block
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule, reconstruct_block, reconstruction_loss
from aquant_core.resources import PeakMemory, Resources, return_free_memory


def reconstruct_blocks(
    graph: CapturedModel,
    model: QuantizedModel,
    blocks: list[Block],
    images: Tensor,
    schedule: Schedule,
    seed: int,
    forecast: Forecast,
    resources: Resources,
    tell: OnProgress,
    finished: FinishedBlocks | None = None,
) -> list[dict[str, Any]]:
    """Learns every block that has layers.

    Args:
        graph: the folded float network.
        model: the quantized network; it is changed.
        blocks: all blocks, in order.
        images: (N, C, H, W) calibration images.
        schedule: how a block is learned.
        seed: of every random draw, by block.
        forecast: what the blocks will take; it decides where their inputs and outputs are kept.
        resources: device and folder.
        tell: told of every tenth iteration.
        finished: where finished blocks are kept and, if they are there, taken from.

    Returns:
        The report's ``blocks``.
    """
    sequence = _Sequence(graph, model, images, schedule, seed, forecast, resources, tell)
    sequence.count = sum(bool(block.layers) for block in blocks)
    resuming = finished is not None
    for index, (block, expected) in enumerate(zip(blocks, forecast.blocks, strict=True)):
        sequence.enter(block, expected)
        if not block.layers:
            sequence.hand_on(block)
            continue
        entry = finished.load(index, block, model, schedule.border) if finished is not None and resuming else None
        if entry is not None:
            sequence.hand_on(block)
        else:
            resuming = False
            entry = sequence.learn(block)
            entry |= sequence.hand_on(block)
            if finished is not None:
                finished.save(index, block, model, entry)
        sequence.finish(entry)
    return sequence.history


class _Sequence:
    """The caches between two blocks, and what is done with them."""

    def __init__(
        self,
        graph: CapturedModel,
        model: QuantizedModel,
        images: Tensor,
        schedule: Schedule,
        seed: int,
        forecast: Forecast,
        resources: Resources,
        tell: OnProgress,
    ) -> None:
        self.graph, self.model, self.schedule, self.seed, self.tell = graph, model, schedule, seed, tell
        self.resources = resources
        self.batch_size = evaluation_batch_size(images)
        self.noised = self.clean = Cache.of(images, resources.device)
        self.history: list[dict[str, Any]] = []
        self.clock = _Clock(forecast)
        self.count = 0

    def enter(self, block: Block, expected: BlockForecast) -> None:
        """Makes the block's target from the float network."""
        self.peak, self.started = PeakMemory(self.resources.device), time.monotonic()
        self.expected = expected
        self.target = self._through(partial(run_float_block, self.graph, block), self.clean)

    def learn(self, block: Block) -> dict[str, Any]:
        """Learns the block; its part of the report, as far as it is known."""
        before = self._error(block)
        return_free_memory()
        number, iterations = len(self.history) + 1, self.schedule.preset.iterations

        def on_iteration(step: int, loss: float) -> None:
            eta = self.clock.seconds_left(self.expected, (step + 1) / iterations, time.monotonic() - self.started)
            self.tell(Progress("reconstruct", number, self.count, step + 1, iterations, loss, eta))

        device = self.resources.device
        generator = torch.Generator(device).manual_seed(_seed_of_block(self.seed, block.name))
        cache = BlockCache(self.noised, self.clean, self.target)
        curve = reconstruct_block(self.model, block, cache, self.schedule, generator, on_iteration)
        return {
            "name": block.name,
            "layers": [node.name for node in block.layers],
            "iterations": iterations,
            "error_before": before,
            "loss": {"iterations": curve.iterations, "values": curve.losses},
        }

    def hand_on(self, block: Block) -> dict[str, Any]:
        """Makes the block's outputs the next one's inputs; what is known of the block then."""
        self.clean = self.target  # the block's own clean input is needed no more
        return_free_memory()
        error = _Mean()
        self.noised = self._through(partial(self.model.run_block, block), self.noised, error.add)
        return {
            "error_after": error.value,
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_bytes": self.peak.read(),
            "placement": self.expected.placement,
        }

    def finish(self, entry: dict[str, Any]) -> None:
        """Puts the block into the report."""
        self.history.append(entry)
        self.clock.finish(self.expected, entry["seconds"])

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """First and last image (exclusive) of every batch."""
        images = len(self.noised)
        for start in range(0, images, self.batch_size):
            yield start, min(start + self.batch_size, images)

    @torch.no_grad()
    def _error(self, block: Block) -> float:
        error = _Mean()
        for start, stop in self._ranges():
            error.add(self.model.run_block(block, self.noised.read(start, stop)), self.target.read(start, stop))
        return error.value

    @torch.no_grad()
    def _through(
        self,
        function: Callable[[Tensor], Tensor],
        inputs: Cache,
        compare: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Cache:
        """``function`` over all images, batch by batch; each result may be compared with the target."""
        outputs: Cache | None = None
        for start, stop in self._ranges():
            result = function(inputs.read(start, stop))
            if outputs is None:
                shape = torch.Size([len(inputs), *result.shape[1:]])
                outputs = Cache(shape, self.resources.device, self.expected.placement, self.resources.folder)
            outputs.write(start, result)
            if compare is not None:
                compare(result, self.target.read(start, stop))
        assert outputs is not None, "there are images"
        return outputs


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

    def __init__(self, forecast: Forecast) -> None:
        self._left = forecast.seconds
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


def _seed_of_block(seed: int, name: str) -> int:
    """A block's own seed, so that it does not depend on what other blocks drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
