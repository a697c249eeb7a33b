"""From a float network and calibration images to a quantized network and its report: ``quantize``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core import checkpoint
from aquant_core.capture_model import capture
from aquant_core.config import QuantizationConfig
from aquant_core.errors import ImageSetError, NonFiniteError
from aquant_core.evaluation import logits_of
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.fold import fold_batch_norm
from aquant_core.forecast import forecast, together
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet, Kind, check_images, check_values, read_images
from aquant_core.measurements import clipped_shares, measure
from aquant_core.methods import METHODS, PRESETS, Preset, settings_of
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest, search_weights
from aquant_core.partition import partition
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule
from aquant_core.report.commands import Sources
from aquant_core.reporting import Calibrated, Outcome, report_of
from aquant_core.resources import Resources
from aquant_core.sequence import Run, reconstruct_blocks

_HELD_BACK_SHARE, _HELD_BACK_AT_MOST = 8, 256
"""Without evaluation images, one calibration image in eight is held back to measure on, at most 256."""


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized network and what is known of it.

    Attributes:
        model: a module from images to logits.
        report: JSON values (see ``aquant_core.report.schema``).
    """

    model: QuantizedModel
    report: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes the checkpoint (see ``aquant_core.checkpoint``); its size is noted in the report."""
        about = {key: self.report[key] for key in ("config", "seed", "protocol", "versions", "digests")}
        checkpoint.save(self.model, path, about)
        self.report["size"]["checkpoint_bytes"] = Path(path).stat().st_size


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
    clock = _Clock()

    def tell(progress: Progress) -> None:
        clock.enter(progress.stage)
        if on_progress is not None:
            on_progress(progress)

    tell(Progress("capture"))
    sources = Sources(
        _name(model, "MODEL"),
        _name(calibration, "CALIBRATION"),
        None if evaluation is None else _name(evaluation, "EVALUATION"),
    )
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    calibration = _image_set(calibration, "calibration")
    evaluation = None if evaluation is None else _image_set(evaluation, "evaluation")
    captured = capture(model, config.architecture, calibration.images[:2])
    warnings = check_images(captured, calibration, config, evaluation)
    resources = resources or Resources()
    graph = fold_batch_norm(captured).to(resources.device)
    digests = {"model": captured.digest(), "calibration": calibration.digest()}
    if evaluation is None:
        calibration, evaluation = _hold_back(calibration)
        warnings.append(f"No evaluation images: measured on {len(evaluation)} calibration images held back.")
    digests["evaluation"] = evaluation.digest()

    preset = preset or PRESETS[config.preset]
    if config.iterations is not None:
        preset = replace(preset, iterations=config.iterations)
    methods = [config.method, *config.compare]
    schedules = {name: Schedule(settings_of(name, preset), preset, config.border) for name in methods}
    graphs = {name: marked(graph, config, schedule.method) for name, schedule in schedules.items()}
    blocks = {name: partition(marked_graph) for name, marked_graph in graphs.items()}
    count = sum(block.has_parts for block in blocks[config.method])
    learned = [name for name in methods if schedules[name].method.reconstruct]
    forecasts = {
        name: forecast(
            graphs[name],
            blocks[name],
            calibration.images,
            config,
            schedules[name],
            resources,
            partial(tell, Progress("forecast", blocks=count, method=name)),
            others=len(learned) - 1,
        )
        for name in learned
    }
    expected = together(list(forecasts.values())).document() if learned else None
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
    nearest_logits = logits_of(nearest, evaluation.images, resources.device)
    del weights, nearest
    runs = {name: Run(name, models[name], blocks[name], schedules[name], forecasts[name]) for name in learned}
    if resume_from is not None:
        for name, run in runs.items():
            identity = _identity(digests, len(calibration), config, run)
            run.finished = FinishedBlocks(Path(resume_from), identity, name)
    if runs:
        clock.enter("reconstruct")
        reconstruct_blocks(list(runs.values()), calibration.images, config.seed, resources, tell)

    logits = {}
    for name, quantized in models.items():
        tell(Progress("evaluate", blocks=count, method=name))
        quantized.requires_grad_(False).eval()
        for layer in quantized.layers.values():
            layer.a_rounding = schedules[name].method.a_rounding
        logits[name] = logits_of(quantized, evaluation.images, resources.device)
    clock.enter("measure")
    main = models[config.method]
    report = report_of(
        Outcome(
            captured=captured,
            sources=sources,
            config=config,
            preset=preset,
            settings=schedules[config.method].method,
            device=str(resources.device),
            evaluation=evaluation,
            models=models,
            histories={name: runs[name].history if name in runs else [] for name in methods},
            float_logits=float_logits,
            nearest_logits=nearest_logits,
            logits=logits,
            calibrated=_calibrated(graph, main, calibration, len(evaluation), resources.device),
            measurements=measure(main, blocks[config.method], evaluation.images),
            forecast=expected,
            digests=digests,
            warnings=warnings,
        )
    )
    return QuantizationResult(main, report | clock.document())


class _Clock:
    """Seconds of each stage of a run."""

    def __init__(self) -> None:
        self._started = self._entered = time.monotonic()
        self._stage, self._seconds = "", dict[str, float]()

    def enter(self, stage: str) -> None:
        """Ends the stage before."""
        if stage != self._stage:
            now = time.monotonic()
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._entered
            self._stage, self._entered = stage, now

    def document(self) -> dict[str, Any]:
        """``seconds`` in all, and of each stage, until now."""
        self.enter("")
        stages = {stage: round(seconds, 3) for stage, seconds in self._seconds.items() if stage}
        return {"seconds": round(time.monotonic() - self._started, 3), "stages": stages}


def _calibrated(
    graph: CapturedModel, model: QuantizedModel, calibration: ImageSet, at_most: int, device: torch.device
) -> Calibrated:
    """What both networks make of the calibration images, as many as there are evaluation images."""
    images, labels = calibration.images[:at_most], calibration.labels
    return Calibrated(
        float_logits=logits_of(graph, images, device),
        logits=logits_of(model, images, device),
        labels=None if labels is None else labels[:at_most],
        clipped_shares=clipped_shares(model, images),
    )


def _name(source: object, otherwise: str) -> str:
    """Its path, if it is one."""
    return str(source) if isinstance(source, str | Path) else otherwise


def _image_set(images: ImageSet | Tensor | str | Path, what: Kind) -> ImageSet:
    if isinstance(images, str | Path):
        return read_images(images, what)
    if isinstance(images, Tensor):
        images = ImageSet(images)
    if not isinstance(images, ImageSet):
        raise ImageSetError(
            f"The {what} images are a {type(images).__name__}.",
            "Give a tensor (N, C, H, W), an ImageSet, or the path of a file.",
        )
    check_values(images.images, what)
    return images


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


def _hold_back(calibration: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Splits off the last images, to measure on what was not learned from."""
    count = max(min(len(calibration) // _HELD_BACK_SHARE, _HELD_BACK_AT_MOST), 1)
    labels = calibration.labels
    return (
        ImageSet(calibration.images[:-count], None if labels is None else labels[:-count]),
        ImageSet(calibration.images[-count:], None if labels is None else labels[-count:]),
    )
