"""What a run would do and take, without running: ``plan``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core.config import FLOAT_BITS, QuantizationConfig
from aquant_core.evaluation import evaluation_batch_size
from aquant_core.forecast import roughly_quantized
from aquant_core.graph import INPUT, CapturedModel
from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.model import QuantizedModel
from aquant_core.partition import Block
from aquant_core.preparation import Preparation, names_of, prepare
from aquant_core.progress import OnProgress, Progress
from aquant_core.report.plan import PLAN_FORMAT
from aquant_core.reporting import describe_layer, protocol_of, size_of, versions
from aquant_core.resources import Resources


def plan(
    model: CapturedModel | nn.Module | str | Path,
    calibration: ImageSet | Tensor | str | Path,
    config: QuantizationConfig | dict[str, Any],
    evaluation: ImageSet | Tensor | str | Path | None = None,
    on_progress: OnProgress | None = None,
    preset: Preset | None = None,
    resources: Resources | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that comes before a run, and its forecast; ``config.dry_run`` does not matter here.

    Takes what ``quantize`` takes.

    Returns:
        JSON values, each described in ``aquant_core.report.plan``.

    Raises:
        AQuantError, pydantic.ValidationError: as ``quantize`` does.
    """
    started = time.monotonic()
    tell = on_progress or (lambda _: None)
    tell(Progress("capture"))
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    ready = prepare(model, calibration, config, evaluation, tell, preset, resources)
    tell(Progress("forecast", blocks=ready.count, forecast=ready.forecast))
    warnings = list(ready.warnings)
    if config.target is not None:
        warnings.append("The search for the target tries several networks: this is of one, at the lowest widths.")
    sketch = _sketch(ready)
    method = ready.schedules[config.method].method
    layers = [describe_layer(sketch, name) for name in sketch.layers]
    on_cpu = ready.resources.device.type == "cpu"
    asked = (config.weight_bits, config.activation_bits)
    return {
        "format": PLAN_FORMAT,
        "sources": names_of(names, model, calibration, evaluation),
        "dry_run": True,
        "blocks": _describe_blocks(ready),
        "layers": layers,
        "values": [{"name": name, "bits": part.activation_bits} for name, part in sketch.quantizers.items()],
        "other_bits": [row["name"] for row in layers if (row["weight_bits"], row["activation_bits"]) != asked],
        "size": size_of(ready.captured, sketch),
        "forecast": ready.forecast,
        "budget_bytes": ready.resources.memory_budget() if on_cpu else ready.resources.device_budget(),
        "limit_bytes": ready.resources.limit_bytes if on_cpu else None,
        "evaluation": {"images": len(ready.evaluation), "batch_size": evaluation_batch_size(ready.evaluation.images)},
        "scales": ready.scales,
        "device": str(ready.resources.device),
        "method": config.method,
        "protocol": protocol_of(config, sketch, method),
        "preset": vars(ready.preset) | {"name": config.preset},
        "settings": vars(method),
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": versions(),
        "digests": ready.digests,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 3),
    }


@torch.no_grad()
def _sketch(ready: Preparation) -> QuantizedModel:
    """A network with the bits, sizes and borders of the one that a run would give; its codes mean nothing."""
    config = ready.config
    graph, schedule = ready.graphs[config.method], ready.schedules[config.method]
    whole = Block("network", tuple(graph.nodes), INPUT)
    images = ready.calibration.images[:1].to(ready.resources.device)
    model = roughly_quantized(graph, whole, images, config, schedule)
    for layer in model.layers.values():
        if schedule.method.border and layer.activation_bits != FLOAT_BITS:
            layer.add_border(config.border)
    return model


def _describe_blocks(ready: Preparation) -> list[dict[str, Any]]:
    """Each block's layers and, where its method learns, what it was forecast to take for all methods together."""
    forecast = ready.forecast
    taken: Mapping[str, Any] = {} if forecast is None else {block["name"]: block for block in forecast["blocks"]}
    return [
        {"name": block.name, "layers": [node.name for node in block.layers], "learned": False}
        | {key: value for key, value in taken.get(block.name, {}).items() if key != "name"}
        for block in ready.blocks[ready.config.method]
    ]
