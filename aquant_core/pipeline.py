"""From a float network and calibration images to a quantized network and its report: ``quantize``."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aquant_core import checkpoint
from aquant_core.config import PROTOCOLS, Method, QuantizationConfig
from aquant_core.errors import DryRunError, NonFiniteError
from aquant_core.evaluation import accuracy, evaluation_batch_size, fidelity, logits_digest, logits_of
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet
from aquant_core.methods import METHODS, MethodSettings, Preset
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest, search_weights
from aquant_core.placement import mark_before, shortcut_of
from aquant_core.preparation import prepare
from aquant_core.progress import OnProgress, Progress
from aquant_core.resources import Resources
from aquant_core.sequence import Run, reconstruct_blocks


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
    calibration: ImageSet | Tensor | str | Path,
    config: QuantizationConfig | dict[str, Any],
    evaluation: ImageSet | Tensor | str | Path | None = None,
    on_progress: OnProgress | None = None,
    preset: Preset | None = None,
    resources: Resources | None = None,
    resume_from: str | Path | None = None,
) -> QuantizationResult:
    """Quantizes a network with the configured method.

    Args:
        model: anything ``capture`` takes; it is not changed.
        calibration: images like those the network will see, (N, C, H, W), or the path of a file of them.
        config: method, bits and switches.
        evaluation: images, with labels if accuracy is wanted; without them part of the calibration set is
            held back.
        on_progress: told what is under way; an exception it raises ends the run and reaches the caller.
        preset: iterations and learning rates in place of ``config.preset``'s.
        resources: device and memory budgets; by default a CPU and most of its free memory.
        resume_from: a folder in which finished blocks are kept. Blocks that an earlier run of the same kind left
            there are not learned again; the result has the same bytes as an undisturbed run's.

    Raises:
        AQuantError: one of its subclasses, before any reconstruction.
        pydantic.ValidationError: ``config`` is a dict with a key or value that a ``QuantizationConfig`` does not take.
    """
    started = time.monotonic()
    tell = on_progress or (lambda _: None)
    tell(Progress("capture"))
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    if config.dry_run:
        raise DryRunError(
            "dry_run asks for a forecast, and this would run.", "Call aquant_core.plan, or leave dry_run out."
        )
    ready = prepare(model, calibration, config, evaluation, tell, preset, resources)
    preset, resources = ready.preset, ready.resources
    captured, graph, graphs, blocks, count = ready.captured, ready.graph, ready.graphs, ready.blocks, ready.count
    calibration, evaluation, digests, warnings = ready.calibration, ready.evaluation, ready.digests, ready.warnings
    schedules, methods, learned = ready.schedules, list(ready.schedules), list(ready.forecasts)
    forecasts, expected = ready.forecasts, ready.forecast
    tell(Progress("nearest", blocks=count, forecast=expected))
    weights = search_weights(graph, config)
    float_logits = logits_of(graph, evaluation.images, resources.device)
    if not float_logits.isfinite().all():
        raise NonFiniteError(
            "The float network gives NaN or infinity for some evaluation images.",
            "Check its weights, and the images' scaling.",
        )
    models = {
        name: quantize_to_nearest(graphs[name], calibration.images, config, schedules[name].method.placement, weights)
        for name in methods
    }
    nearest = next((models[name] for name in methods if schedules[name].method.placement == "input"), None)
    if nearest is None:
        nearest_graph = marked(graph, config, METHODS["nearest"])
        nearest = quantize_to_nearest(nearest_graph, calibration.images, config, weights=weights)
    logits = {"float": float_logits, "nearest": logits_of(nearest, evaluation.images, resources.device)}
    del weights, nearest
    runs = {name: Run(name, models[name], blocks[name], schedules[name], forecasts[name]) for name in learned}
    if resume_from is not None:
        for name, run in runs.items():
            identity = _identity(digests, len(calibration), config, run)
            run.finished = FinishedBlocks(Path(resume_from), identity, name)
    if runs:
        reconstruct_blocks(list(runs.values()), calibration.images, config.seed, resources, tell)

    comparison = []
    for name, quantized in models.items():
        tell(Progress("evaluate", blocks=count, method=name))
        quantized.requires_grad_(False).eval()
        for layer in quantized.layers.values():
            layer.a_rounding = schedules[name].method.a_rounding
        of_method = logits_of(quantized, evaluation.images, resources.device)
        if not of_method.isfinite().all():
            warnings.append(f"The outputs of {name}'s network hold NaN or infinity: it is of no use as it is.")
        history = runs[name].history if name in runs else []
        comparison.append(_comparison(name, quantized, of_method, float_logits, evaluation, history))
        if name == config.method:
            logits["quantized"] = of_method
    main = models[config.method]
    digests["logits"] = logits_digest(logits["quantized"])
    report = {
        "accuracy": None
        if evaluation.labels is None
        else {name: accuracy(values, evaluation.labels) for name, values in logits.items()},
        "fidelity": {name: fidelity(values, float_logits) for name, values in logits.items() if name != "float"},
        "comparison": comparison,
        "evaluation": {"images": len(evaluation), "batch_size": evaluation_batch_size(evaluation.images)},
        "blocks": runs[config.method].history if config.method in runs else [],
        "forecast": expected,
        "device": str(resources.device),
        "layers": [_describe_layer(main, name) for name in main.layers],
        "values": [_describe_value(main, name) for name in main.quantizers],
        "size": size_of(captured, main),
        "method": config.method,
        "protocol": protocol_of(config, main, schedules[config.method].method),
        "preset": vars(preset) | {"name": config.preset},
        "settings": vars(schedules[config.method].method),
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": versions(),
        "digests": digests,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 3),
    }
    return QuantizationResult(main, report)


def _identity(digests: dict[str, str], images: int, config: QuantizationConfig, run: Run) -> dict[str, Any]:
    """What decides how a method's blocks come out; ``images`` are those not held back."""
    return {
        "digests": {name: digests[name] for name in ("model", "calibration")},
        "images": images,
        "config": config.model_dump(mode="json", exclude={"method", "compare"}),
        "protocol": config.resolved_protocol.model_dump(),
        "preset": vars(run.schedule.preset),
        "settings": vars(run.schedule.method),
    }


def _describe_layer(model: QuantizedModel, name: str) -> dict[str, Any]:
    """A layer; where its input is quantized before it reaches it, ``input_from`` names the value in ``values``."""
    layer = model.layers[name]
    mark = mark_before(model.graph, name)
    return {
        "name": name,
        "op": layer.op,
        "weight_shape": list(layer.float_weight.shape),
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits if mark is None else model.quantizers[mark].activation_bits,
        "input_from": mark,
        "step": None if layer.activation_scale is None else float(layer.activation_scale),
        "zero_point": layer.zero_point,
        "border_parameters": 0 if layer.border is None else layer.border.number_of_parameters(),
    }


def size_of(captured: CapturedModel, model: QuantizedModel) -> dict[str, Any]:
    """Bytes of the float network and of the quantized one's tensors, and the border's share of them."""
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


def _describe_value(model: QuantizedModel, name: str) -> dict[str, Any]:
    """A value that is quantized where it is made."""
    part = model.quantizers[name]
    step = None if part.activation_scale is None else float(part.activation_scale)
    return {"name": name, "bits": part.activation_bits, "step": step, "zero_point": part.zero_point}


def _comparison(
    method: Method,
    model: QuantizedModel,
    logits: Tensor,
    float_logits: Tensor,
    evaluation: ImageSet,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """One method's row of the report's table."""
    return {
        "method": method,
        "accuracy": None if evaluation.labels is None else accuracy(logits, evaluation.labels),
        "fidelity": fidelity(logits, float_logits),
        "shortcut": shortcut_of(model.graph),
        "block_errors": {block["name"]: block["error_after"] for block in history},
        "border_parameters": sum(
            layer.border.number_of_parameters() for layer in model.layers.values() if layer.border is not None
        ),
        "seconds": round(sum(block["seconds"] for block in history), 3),
        "logits": logits_digest(logits),
    }


def protocol_of(config: QuantizationConfig, model: QuantizedModel, method: MethodSettings) -> dict[str, Any]:
    """What published tables mix silently (see docs/method.md), as it was for this network."""
    switches = config.resolved_protocol.model_dump()
    if (shortcut := shortcut_of(model.graph)) is not None:
        switches["shortcut"] = shortcut
    named = PROTOCOLS[config.protocol].model_dump()
    changed = [f"{name} {width}" for name, width in switches.items() if width != named[name]]
    return {
        "name": ", ".join([config.protocol, *changed]),
        **switches,
        "first_last_bits": config.first_last_bits,
        "activations_quantized_at": f"layer {method.placement}",
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
