"""From a float network and calibration images to a quantized network and its report: ``quantize``."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core import checkpoint
from aquant_core.capture_model import capture
from aquant_core.config import QuantizationConfig
from aquant_core.evaluation import accuracy, evaluation_batch_size, fidelity, logits_digest, logits_of
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT, CapturedModel, Node, evaluate_nodes
from aquant_core.images import ImageSet, check_images
from aquant_core.methods import METHODS, PRESETS, Preset
from aquant_core.model import QuantizedModel, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import (
    BlockCache,
    BlockHistory,
    Schedule,
    reconstruct_block,
    reconstruction_loss,
)

_HELD_BACK_SHARE, _HELD_BACK_AT_MOST = 8, 256
"""Without evaluation images, one calibration image in eight is held back to measure on, at most 256."""


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized network and what is known of it.

    Attributes:
        model: a module from images to logits.
        report: JSON values; see DESIGN's report.
    """

    model: QuantizedModel
    report: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes the checkpoint (see ``aquant_core.checkpoint``)."""
        about = {key: self.report[key] for key in ("config", "seed", "protocol", "versions", "digests")}
        checkpoint.save(self.model, path, about)


def quantize(
    model: CapturedModel | nn.Module | str | Path,
    calibration: ImageSet | Tensor,
    config: QuantizationConfig,
    evaluation: ImageSet | None = None,
    on_progress: OnProgress | None = None,
    preset: Preset | None = None,
) -> QuantizationResult:
    """Quantizes a network with the configured method.

    Args:
        model: anything ``capture`` takes; it is not changed.
        calibration: images like those the network will see.
        config: method, bits and switches.
        evaluation: images, with labels if accuracy is wanted; without them part of the calibration set is
            held back.
        on_progress: told what is under way; an exception it raises ends the run and reaches the caller.
        preset: iterations and learning rates in place of ``config.preset``'s.

    Raises:
        AQuantError: one of its subclasses, before any reconstruction.
    """
    started = time.monotonic()
    tell = on_progress or (lambda _: None)
    tell(Progress("capture"))
    if isinstance(calibration, Tensor):
        calibration = ImageSet(calibration)
    captured = capture(model, config.architecture, calibration.images[:2])
    warnings = check_images(captured, calibration, config, evaluation)
    graph = fold_batch_norm(captured)
    blocks = partition(graph)
    digests = {"model": captured.digest(), "calibration": calibration.digest()}
    if evaluation is None:
        calibration, evaluation = _hold_back(calibration)
        warnings.append(f"No evaluation images: measured on {len(evaluation)} calibration images held back.")
    digests["evaluation"] = evaluation.digest()

    tell(Progress("nearest", blocks=len(_learned(blocks))))
    quantized = quantize_to_nearest(graph, calibration.images, config)
    float_logits = logits_of(graph, evaluation.images)
    nearest_logits = logits_of(quantized, evaluation.images)
    preset = preset or PRESETS[config.preset]
    if config.iterations is not None:
        preset = replace(preset, iterations=config.iterations)
    run = _Reconstruction(graph, quantized, blocks, config, preset, tell)
    if METHODS[config.method].reconstruct:
        run.run(calibration.images)
    quantized.requires_grad_(False).eval()

    tell(Progress("evaluate", blocks=len(_learned(blocks))))
    logits = logits_of(quantized, evaluation.images)
    digests["logits"] = logits_digest(logits)
    named = {"float": float_logits, "nearest": nearest_logits, "quantized": logits}
    report = {
        "accuracy": None
        if evaluation.labels is None
        else {name: accuracy(values, evaluation.labels) for name, values in named.items()},
        "fidelity": {name: fidelity(values, float_logits) for name, values in named.items() if name != "float"},
        "evaluation": {"images": len(evaluation), "batch_size": evaluation_batch_size(evaluation.images)},
        "blocks": run.history,
        "layers": [_describe_layer(quantized, name) for name in quantized.layers],
        "size": _size(captured, quantized),
        "method": config.method,
        "protocol": _protocol(config),
        "preset": vars(preset) | {"name": config.preset},
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": versions(),
        "digests": digests,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 3),
    }
    return QuantizationResult(quantized, report)


def _learned(blocks: list[Block]) -> list[Block]:
    return [block for block in blocks if block.layers]


def _hold_back(calibration: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Splits off the last images, to measure on what was not learned from."""
    count = max(min(len(calibration) // _HELD_BACK_SHARE, _HELD_BACK_AT_MOST), 1)
    labels = calibration.labels
    return (
        ImageSet(calibration.images[:-count], None if labels is None else labels[:-count]),
        ImageSet(calibration.images[-count:], None if labels is None else labels[-count:]),
    )


class _Reconstruction:
    """Goes through the blocks in order, handing inputs on from each to the next."""

    def __init__(
        self,
        graph: CapturedModel,
        model: QuantizedModel,
        blocks: list[Block],
        config: QuantizationConfig,
        preset: Preset,
        tell: OnProgress,
    ) -> None:
        self.graph, self.model, self.blocks, self.seed, self.tell = graph, model, blocks, config.seed, tell
        self.schedule = Schedule(METHODS[config.method], preset, config.border)
        self.history: list[dict[str, Any]] = []

    def run(self, images: Tensor) -> None:
        """Learns every block from (N, C, H, W) calibration images."""
        costs = _costs(self.graph, self.blocks, images[:1])
        total, spent, started = sum(costs.values()), 0.0, time.monotonic()
        learned = _learned(self.blocks)
        cache = BlockCache(images, images, images)
        self.batch_size = evaluation_batch_size(images)
        for block in self.blocks:
            cache.target = self._through(partial(run_float_block, self.graph, block), cache.clean)
            if block.layers:
                number, cost, begun = learned.index(block) + 1, costs[block.name], spent
                block_started = time.monotonic()
                before = self._error(block, cache)

                def on_iteration(
                    step: int, loss: float, number: int = number, cost: float = cost, begun: float = begun
                ) -> None:
                    iterations = self.schedule.preset.iterations
                    done = begun + cost * (step + 1) / iterations
                    eta = (time.monotonic() - started) * (total - done) / done
                    self.tell(Progress("reconstruct", number, len(learned), step + 1, iterations, loss, round(eta, 1)))

                generator = torch.Generator(device=images.device).manual_seed(_seed_of_block(self.seed, block.name))
                curve = reconstruct_block(self.model, block, cache, self.schedule, generator, on_iteration)
                spent += cost
            output = self._through(partial(self.model.run_block, block), cache.noised)
            if block.layers:
                after = float(reconstruction_loss(output, cache.target))
                self._record(block, before, after, curve, time.monotonic() - block_started)
            cache.noised, cache.clean = output, cache.target

    @torch.no_grad()
    def _through(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """``function`` over all images, batch by batch."""
        return torch.cat([function(batch) for batch in torch.split(images, self.batch_size)])

    def _error(self, block: Block, cache: BlockCache) -> float:
        output = self._through(partial(self.model.run_block, block), cache.noised)
        return float(reconstruction_loss(output, cache.target))

    def _record(self, block: Block, before: float, after: float, curve: BlockHistory, seconds: float) -> None:
        self.history.append(
            {
                "name": block.name,
                "layers": [node.name for node in block.layers],
                "iterations": self.schedule.preset.iterations,
                "error_before": before,
                "error_after": after,
                "loss": {"iterations": curve.iterations, "values": curve.losses},
                "seconds": round(seconds, 3),
            }
        )


def _seed_of_block(seed: int, name: str) -> int:
    """A block's own seed, so that it does not depend on what other blocks drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


_COLUMN_COST = 16
"""One im2col element costs about as much as this many multiply-adds (border, forward and backward)."""


def _costs(graph: CapturedModel, blocks: list[Block], image: Tensor) -> dict[str, float]:
    """Relative time of one iteration, by block."""
    costs: dict[str, float] = {}

    def run(node: Node, values: list[Tensor]) -> Tensor:
        result = graph.run_node(node, values)
        if node.name in layer_names:
            weight = graph.weights[node.name]["weight"]
            positions = weight[0, 0].numel() if weight.dim() == 4 else 1
            outputs = result[0, 0].numel() if result.dim() == 4 else 1
            columns = values[0].shape[1] * positions * outputs
            costs[node.name] = weight.numel() * outputs + _COLUMN_COST * columns
        return result

    layer_names = {node.name for node in graph.layers}
    with torch.inference_mode():
        evaluate_nodes(graph.nodes, {INPUT: image}, run)
    return {block.name: float(sum(costs[node.name] for node in block.layers)) for block in _learned(blocks)}


def _describe_layer(model: QuantizedModel, name: str) -> dict[str, Any]:
    layer = model.layers[name]
    return {
        "name": name,
        "op": layer.op,
        "weight_shape": list(layer.float_weight.shape),
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "step": None if layer.activation_scale is None else float(layer.activation_scale),
        "zero_point": layer.zero_point,
        "border_parameters": 0 if layer.border is None else layer.border.number_of_parameters(),
    }


def _size(captured: CapturedModel, model: QuantizedModel) -> dict[str, Any]:
    tensors = checkpoint.tensors_of(model)
    border = [t for name, t in tensors.items() if name.endswith((".border", ".alpha"))]
    folded = sum(tensor.numel() for kinds in model.graph.weights.values() for tensor in kinds.values())
    return {
        "float_bytes": captured.float_bytes(),
        "quantized_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "border_bytes": sum(t.numel() * t.element_size() for t in border),
        "border_parameters": sum(t.numel() for t in border),
        "border_share": round(sum(t.numel() for t in border) / folded, 6),
    }


def _protocol(config: QuantizationConfig) -> dict[str, Any]:
    """What published tables mix silently (see docs/method.md)."""
    return {
        "name": config.protocol,
        "first_last_bits": config.first_last_bits,
        "last_layer_input_bits": config.first_last_bits,
        "model_input": "quantized",
        "second_layer_input": "low-bit",
        "shortcut": "float",
        "activations_quantized_at": "layer input",
    }


def versions() -> dict[str, str]:
    """What a result depends on."""
    packages = {}
    for name in ("aquant-service", "torch", "numpy", "numba"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "machine": platform.machine(), **packages}
