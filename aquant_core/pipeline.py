"""From a float network and calibration images to a quantized network and its report: ``quantize``."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aquant_core import checkpoint
from aquant_core.capture_model import capture
from aquant_core.config import QuantizationConfig
from aquant_core.errors import ImageSetError, NonFiniteError
from aquant_core.evaluation import accuracy, evaluation_batch_size, fidelity, logits_digest, logits_of
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.fold import fold_batch_norm
from aquant_core.forecast import forecast
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet, Kind, check_images, read_images
from aquant_core.methods import METHODS, PRESETS, Preset
from aquant_core.model import QuantizedModel, quantize_to_nearest
from aquant_core.partition import partition
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources
from aquant_core.sequence import reconstruct_blocks

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
    """
    started = time.monotonic()
    tell = on_progress or (lambda _: None)
    tell(Progress("capture"))
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    calibration = _image_set(calibration, "calibration")
    evaluation = None if evaluation is None else _image_set(evaluation, "evaluation")
    captured = capture(model, config.architecture, calibration.images[:2])
    warnings = check_images(captured, calibration, config, evaluation)
    resources = resources or Resources()
    graph = fold_batch_norm(captured).to(resources.device)
    blocks = partition(graph)
    digests = {"model": captured.digest(), "calibration": calibration.digest()}
    if evaluation is None:
        calibration, evaluation = _hold_back(calibration)
        warnings.append(f"No evaluation images: measured on {len(evaluation)} calibration images held back.")
    digests["evaluation"] = evaluation.digest()

    preset = preset or PRESETS[config.preset]
    if config.iterations is not None:
        preset = replace(preset, iterations=config.iterations)
    schedule = Schedule(METHODS[config.method], preset, config.border)
    count = sum(bool(block.layers) for block in blocks)
    expected = None
    if schedule.method.reconstruct:
        forecasting = partial(tell, Progress("forecast", blocks=count))
        expected = forecast(graph, blocks, calibration.images, config, schedule, resources, forecasting)
    expected_document = None if expected is None else expected.document()
    tell(Progress("nearest", blocks=count, forecast=expected_document))
    quantized = quantize_to_nearest(graph, calibration.images, config)
    float_logits = logits_of(graph, evaluation.images, resources.device)
    if not float_logits.isfinite().all():
        raise NonFiniteError(
            "The float network gives NaN or infinity for some evaluation images.",
            "Check its weights, and the images' scaling.",
        )
    nearest_logits = logits_of(quantized, evaluation.images, resources.device)
    history: list[dict[str, Any]] = []
    if expected is not None:
        finished = None
        if resume_from is not None:
            finished = FinishedBlocks(Path(resume_from), _identity(digests, len(calibration), config, preset))
        history = reconstruct_blocks(
            graph, quantized, blocks, calibration.images, schedule, config.seed, expected, resources, tell, finished
        )
    quantized.requires_grad_(False).eval()

    tell(Progress("evaluate", blocks=count))
    logits = logits_of(quantized, evaluation.images, resources.device)
    digests["logits"] = logits_digest(logits)
    if not logits.isfinite().all():
        warnings.append("The quantized network's outputs hold NaN or infinity: it is of no use as it is.")
    named = {"float": float_logits, "nearest": nearest_logits, "quantized": logits}
    report = {
        "accuracy": None
        if evaluation.labels is None
        else {name: accuracy(values, evaluation.labels) for name, values in named.items()},
        "fidelity": {name: fidelity(values, float_logits) for name, values in named.items() if name != "float"},
        "evaluation": {"images": len(evaluation), "batch_size": evaluation_batch_size(evaluation.images)},
        "blocks": history,
        "forecast": expected_document,
        "device": str(resources.device),
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


def _image_set(images: ImageSet | Tensor | str | Path, what: Kind) -> ImageSet:
    if isinstance(images, str | Path):
        return read_images(images, what)
    if isinstance(images, Tensor):
        return ImageSet(images)
    if not isinstance(images, ImageSet):
        raise ImageSetError(
            f"The {what} images are a {type(images).__name__}.",
            "Give a tensor (N, C, H, W), an ImageSet, or the path of a file.",
        )
    return images


def _identity(digests: dict[str, str], images: int, config: QuantizationConfig, preset: Preset) -> dict[str, Any]:
    """What decides how the blocks come out; ``images`` are those not held back."""
    kept = {name: digests[name] for name in ("model", "calibration")}
    return {"digests": kept, "images": images, "config": config.model_dump(mode="json"), "preset": vars(preset)}


def _hold_back(calibration: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Splits off the last images, to measure on what was not learned from."""
    count = max(min(len(calibration) // _HELD_BACK_SHARE, _HELD_BACK_AT_MOST), 1)
    labels = calibration.labels
    return (
        ImageSet(calibration.images[:-count], None if labels is None else labels[:-count]),
        ImageSet(calibration.images[-count:], None if labels is None else labels[-count:]),
    )


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
