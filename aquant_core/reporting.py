"""Makes the accuracy report of a finished run: JSON values, each described in ``aquant_core.report.schema``."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from aquant_core import checkpoint_torch
from aquant_core.caveats import caveats
from aquant_core.config import FLOAT_BITS, PROTOCOLS, Method, QuantizationConfig
from aquant_core.evaluation import (
    accuracy,
    evaluation_batch_size,
    fidelity,
    independent_difference,
    logits_digest,
    paired_difference,
)
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet
from aquant_core.measurements import Measurements
from aquant_core.methods import MethodSettings, Preset
from aquant_core.model import QuantizedModel
from aquant_core.placement import mark_before, shortcut_of
from aquant_core.report import FORMAT
from aquant_core.report.commands import Sources, repeat

CURVE_POINTS = 120
"""Points of a block's loss curve, at most: a longer one is averaged over neighbouring readings."""


@dataclass(frozen=True)
class Calibrated:
    """What the two networks make of calibration images, for the gap to those held out.

    Attributes:
        float_logits, logits: (N, classes) of the float and the quantized network.
        labels: (N,), if known.
        clipped_shares: by quantizer (``measurements.clipped_shares``).
    """

    float_logits: Tensor
    logits: Tensor
    labels: Tensor | None
    clipped_shares: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        captured: the network as it came.
        sources: what it was read from.
        names: the report's ``sources``.
        config, preset, settings: what was asked for, and what that meant for ``config.method``.
        device: where it ran.
        evaluation: images measured on.
        scales: the report's key.
        models: the finished networks, ``config.method``'s first.
        histories: of each method, its blocks (empty where nothing is learned).
        float_logits, nearest_logits: (N, classes) of the float network, and of all rounded to nearest.
        logits: (N, classes) of each method's network.
        calibrated: what became of calibration images.
        measurements: of ``config.method``'s network.
        forecast: what the run was expected to take, or None where nothing is learned.
        digests: of model and images.
        warnings: from the checks before the run.
        target, sensitivity: the report's keys, if they were asked for.
    """

    captured: CapturedModel
    sources: Sources
    names: dict[str, str | None]
    config: QuantizationConfig
    preset: Preset
    settings: MethodSettings
    device: str
    evaluation: ImageSet
    scales: dict[str, Any]
    models: dict[Method, QuantizedModel]
    histories: dict[Method, list[dict[str, Any]]]
    float_logits: Tensor
    nearest_logits: Tensor
    logits: dict[Method, Tensor]
    calibrated: Calibrated
    measurements: Measurements
    forecast: dict[str, Any] | None
    digests: dict[str, str]
    warnings: list[str]
    target: dict[str, Any] | None = None
    sensitivity: dict[str, Any] | None = None


def report_of(run: Outcome) -> dict[str, Any]:
    """Everything but how long it took, as JSON values."""
    config, evaluation, labels = run.config, run.evaluation, run.evaluation.labels
    main, rows = run.models[config.method], {method: _comparison(method, run) for method in run.models}
    chosen = rows[config.method]
    history = run.histories[config.method]
    layers = [_measured_layer(main, name, run) for name in main.layers]
    report = {
        "format": FORMAT,
        "sources": run.names,
        "accuracy": None
        if labels is None
        else {
            "float": accuracy(run.float_logits, labels),
            "nearest": accuracy(run.nearest_logits, labels),
            "quantized": chosen["accuracy"],
        },
        "fidelity": {"nearest": fidelity(run.nearest_logits, run.float_logits), "quantized": chosen["fidelity"]},
        "comparison": list(rows.values()),
        "differences": [] if labels is None else _differences(run, labels),
        "gap": _gap(run, chosen["fidelity"]),
        "target": run.target,
        "sensitivity": run.sensitivity,
        "evaluation": {"images": len(evaluation), "batch_size": evaluation_batch_size(evaluation.images)},
        "scales": run.scales,
        "measured_images": run.measurements.images,
        "blocks": [
            _describe_block(block, held_out)
            for block, held_out in zip(history, run.measurements.block_errors if history else [], strict=True)
        ],
        "forecast": run.forecast,
        "device": run.device,
        "layers": layers,
        "values": [_describe_value(main, name, run) for name in main.quantizers],
        "size": size_of(run.captured, main),
        "operations": _operations(layers),
        "method": config.method,
        "protocol": protocol_of(config, main, run.settings),
        "preset": vars(run.preset) | {"name": config.preset},
        "settings": vars(run.settings),
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": versions(),
        "digests": run.digests | {"logits": chosen["logits"]},
        "peak_bytes": max(
            (block["peak_bytes"] for history in run.histories.values() for block in history), default=None
        ),
        "repeat": repeat(config, run.sources),
    }
    return report | {"warnings": [*run.warnings, *caveats(report, run.logits)]}


def _comparison(method: Method, run: Outcome) -> dict[str, Any]:
    """One method's row of the report's table."""
    logits, labels, model = run.logits[method], run.evaluation.labels, run.models[method]
    return {
        "method": method,
        "accuracy": None if labels is None else accuracy(logits, labels),
        "fidelity": fidelity(logits, run.float_logits),
        "shortcut": shortcut_of(model.graph),
        "block_errors": {block["name"]: block["error_after"] for block in run.histories[method]},
        "border_parameters": sum(
            layer.border.number_of_parameters() for layer in model.layers.values() if layer.border is not None
        ),
        "seconds": round(sum(block["seconds"] for block in run.histories[method]), 3),
        "logits": logits_digest(logits),
    }


def _differences(run: Outcome, labels: Tensor) -> list[dict[str, Any]]:
    """Of every method to float, then of the chosen one to every other, paired by image."""
    logits: dict[str, Tensor] = {"float": run.float_logits, "nearest": run.nearest_logits}
    logits.update({str(name): values for name, values in run.logits.items()})
    right = {name: values.argmax(1) == labels for name, values in logits.items()}
    chosen, others = run.config.method, [name for name in right if name not in ("float", run.config.method)]
    pairs = [(name, "float") for name in (chosen, *others)] + [(chosen, name) for name in others]
    differences = []
    for method, baseline in pairs:
        top1, low, high = (round(value, 6) for value in paired_difference(right[method], right[baseline]))
        differences.append({"method": method, "baseline": baseline, "top1": top1, "interval": [low, high]})
    return differences


def _gap(run: Outcome, held_out: dict[str, Any]) -> dict[str, Any]:
    """How much better the network does on calibration images than on those held out."""
    seen, images = run.calibrated, len(run.calibrated.logits)
    calibration = fidelity(seen.logits, seen.float_logits)
    interval = independent_difference(calibration["agreement"], images, held_out["agreement"], held_out["n"])
    both = {"float": seen.float_logits, "quantized": seen.logits}
    return {
        "calibration": calibration,
        "held_out": held_out,
        "agreement": round(calibration["agreement"] - held_out["agreement"], 6),
        "interval": [round(bound, 6) for bound in interval],
        "accuracy": None
        if seen.labels is None
        else {name: accuracy(logits, seen.labels) for name, logits in both.items()},
    }


def _describe_block(block: dict[str, Any], held_out: float) -> dict[str, Any]:
    loss = block["loss"]
    iterations, values = thinned(loss["iterations"], loss["values"], CURVE_POINTS)
    return block | {"error_held_out": held_out, "loss": {"iterations": iterations, "values": values}}


def thinned(iterations: list[int], values: list[float], at_most: int) -> tuple[list[int], list[float]]:
    """A curve of at most so many points: means of neighbouring values, each at its last one's iteration."""
    width = -(-len(values) // at_most)
    if width <= 1:
        return iterations, values
    groups = [values[start : start + width] for start in range(0, len(values), width)]
    ends = [min(start + width, len(values)) - 1 for start in range(0, len(values), width)]
    return [iterations[end] for end in ends], [sum(group) / len(group) for group in groups]


def describe_layer(model: QuantizedModel, name: str) -> dict[str, Any]:
    """A layer; where its input is quantized before it reaches it, ``input_from`` names the value in ``values``."""
    layer, mark = model.layers[name], mark_before(model.graph, name)
    return {
        "name": name,
        "op": layer.op,
        "weight_shape": list(layer.float_weight.shape),
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits if mark is None else model.quantizers[mark].activation_bits,
        "input_from": mark,
        "border_parameters": 0 if layer.border is None else layer.border.number_of_parameters(),
    }


def _measured_layer(model: QuantizedModel, name: str, run: Outcome) -> dict[str, Any]:
    layer, seen, of_input = model.layers[name], run.measurements.layers[name], _describe_input(name, run)
    described = describe_layer(model, name)
    return {
        **described,
        "step": None if layer.activation_scale is None else float(layer.activation_scale),
        "zero_point": layer.zero_point,
        "macs": seen["macs"],
        "bit_operations": seen["macs"] * described["weight_bits"] * described["activation_bits"],
        "border_evaluations": run.measurements.inputs.get(name, {"border_evaluations": 0})["border_evaluations"],
        **of_input,
        "sqnr_db": {
            "weight": seen["weight_sqnr_db"],
            "input": of_input["sqnr_db"],
            "output": seen["output_sqnr_db"],
        },
    }


def _describe_value(model: QuantizedModel, name: str, run: Outcome) -> dict[str, Any]:
    """A value that is quantized where it is made."""
    part = model.quantizers[name]
    step = None if part.activation_scale is None else float(part.activation_scale)
    return {
        "name": name,
        "bits": part.activation_bits,
        "step": step,
        "zero_point": part.zero_point,
        **_describe_input(name, run),
    }


def _describe_input(name: str, run: Outcome) -> dict[str, Any]:
    """What was measured of what a layer or a mark quantizes; null where it quantizes nothing."""
    seen = run.measurements.inputs.get(name, {})
    keys = ("sqnr_db", "clipped_share", "dead_channels", "border_shift", "distribution")
    return {key: seen.get(key) for key in keys} | {"clipped_share_calibration": run.calibrated.clipped_shares.get(name)}


def size_of(captured: CapturedModel, model: QuantizedModel) -> dict[str, Any]:
    """Bytes of the float network and of the quantized one's tensors, and the border's share of them."""
    tensors = checkpoint_torch.tensors_of(model)
    borders = [layer.border for layer in model.layers.values() if layer.border is not None]
    parameters = sum(border.number_of_parameters() for border in borders)
    folded = sum(tensor.numel() for kinds in model.graph.weights.values() for tensor in kinds.values())
    return {
        "float_bytes": captured.float_bytes(),
        "quantized_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "border_bytes": sum(tensor.nbytes for border in borders for tensor in border.stored()[0].values()),
        "border_parameters": parameters,
        "border_share": round(parameters / folded, 6),
        "checkpoint_bytes": None,  # until it is written
    }


def _operations(layers: list[dict[str, Any]]) -> dict[str, int]:
    """Of one image, in convolutions and linear layers."""
    totals = {key: sum(layer[key] for layer in layers) for key in ("macs", "bit_operations", "border_evaluations")}
    return totals | {"float_bit_operations": totals["macs"] * FLOAT_BITS**2}


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
