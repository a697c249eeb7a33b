"""From a float network and calibration images to a quantized network and its report: ``quantize``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core import checkpoint_torch
from aquant_core.config import Method, QuantizationConfig
from aquant_core.errors import DryRunError, NonFiniteError
from aquant_core.evaluation import logits_of
from aquant_core.export_onnx import write_onnx
from aquant_core.finished_blocks import FinishedBlocks, words_of_widths
from aquant_core.forecast import Forecast
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet
from aquant_core.measurements import clipped_shares, measure
from aquant_core.methods import METHODS, Preset
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest, search_weights
from aquant_core.preparation import names_of, prepare
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule
from aquant_core.report.commands import Sources
from aquant_core.reporting import Calibrated, Outcome, report_of
from aquant_core.resources import Resources
from aquant_core.sensitivity import sensitivity
from aquant_core.sequence import Run, reconstruct_blocks
from aquant_core.target import Task, search


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
        """Writes the checkpoint (see docs/checkpoint.md); its size is noted in the report."""
        about = {key: self.report[key] for key in ("config", "seed", "protocol", "versions", "digests")}
        checkpoint_torch.save(self.model, path, about)
        self.report["size"]["checkpoint_bytes"] = Path(path).stat().st_size

    def export_onnx(self, path: str | Path) -> None:
        """Writes the network as ONNX (see ``aquant_core.write_onnx``)."""
        write_onnx(self.model, path)


def quantize(
    model: CapturedModel | nn.Module | str | Path,
    calibration: ImageSet | Tensor | str | Path,
    config: QuantizationConfig | dict[str, Any],
    evaluation: ImageSet | Tensor | str | Path | None = None,
    on_progress: OnProgress | None = None,
    preset: Preset | None = None,
    resources: Resources | None = None,
    resume_from: str | Path | None = None,
    names: Mapping[str, str] | None = None,
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
        names: what the files are called, by ``model``, ``calibration`` and ``evaluation``, for the report to tell;
            by default those of the paths given.

    Raises:
        AQuantError: one of its subclasses, before any reconstruction.
        pydantic.ValidationError: ``config`` is a dict with a key or value that a ``QuantizationConfig`` does not take.
    """
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    if config.dry_run:
        raise DryRunError(
            "dry_run asks for a forecast, and this would run.", "Call aquant_core.plan, or leave dry_run out."
        )
    if config.target is not None and resume_from is None:  # candidates take blocks from each other by way of files
        with TemporaryDirectory(prefix="aquant-search-", dir=resources.folder if resources else None) as folder:
            return quantize(model, calibration, config, evaluation, on_progress, preset, resources, folder, names)
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
    called = names_of(names, model, calibration, evaluation)
    ready = prepare(model, calibration, config, evaluation, tell, preset, resources)
    preset, resources = ready.preset, ready.resources
    captured, graph, graphs, blocks, count = ready.captured, ready.graph, ready.graphs, ready.blocks, ready.count
    calibration, evaluation, digests, warnings = ready.calibration, ready.evaluation, ready.digests, ready.warnings
    schedules, methods, learned = ready.schedules, list(ready.schedules), list(ready.forecasts)
    forecasts, expected = ready.forecasts, ready.forecast
    searching = config.target is not None
    tell(Progress("search" if searching else "nearest", blocks=count, forecast=None if searching else expected))
    float_logits = logits_of(graph, evaluation.images, resources.device)
    if not float_logits.isfinite().all():
        raise NonFiniteError(
            "The float network gives NaN or infinity for some evaluation images.",
            "Check its weights, and the images' scaling.",
        )

    def finished(name: Method, widths: QuantizationConfig) -> FinishedBlocks:
        assert resume_from is not None
        identity = _identity(digests, len(calibration), config, schedules[name])
        words = words_of_widths(graphs[name], blocks[name], widths) if searching else None
        return FinishedBlocks(Path(resume_from), identity, name, words)

    chosen, target = config, None
    if searching:
        name = config.method
        task = Task(
            name,
            graphs[name],
            blocks[name],
            schedules[name],
            forecasts.get(name, Forecast()),
            calibration.images,
            evaluation,
            float_logits,
            resources,
            partial(finished, name),
        )
        found = search(task, graph, config, tell)
        chosen, target = found.config, found.document
        expected = found.forecast.document() if learned else None
        warnings += found.warnings
    weights = search_weights(graph, chosen)
    models = {
        name: quantize_to_nearest(graphs[name], calibration.images, chosen, schedules[name].method.placement, weights)
        for name in methods
    }
    nearest = next((models[name] for name in methods if schedules[name].method.placement == "input"), None)
    if nearest is None:
        nearest_graph = marked(graph, config, METHODS["nearest"])
        nearest = quantize_to_nearest(nearest_graph, calibration.images, chosen, weights=weights)
    nearest_logits = logits_of(nearest, evaluation.images, resources.device)
    del weights, nearest
    runs = {name: Run(name, models[name], blocks[name], schedules[name], forecasts[name]) for name in learned}
    if resume_from is not None:
        for name, run in runs.items():
            run.finished = finished(name, chosen)
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
    main = models[config.method]
    sensitivities = None
    if config.sensitivity:
        sensitivities = sensitivity(
            graph,
            chosen,
            calibration.images,
            schedules[config.method],
            {"float": float_logits, "quantized": logits[config.method]},
            evaluation.labels,
            resources,
            forecasts.get(config.method, Forecast()).placement,
            lambda begun, tries: tell(
                Progress("sensitivity", blocks=count, iteration=begun, iterations=tries, method=config.method)
            ),
        )
    clock.enter("measure")
    report = report_of(
        Outcome(
            captured=captured,
            sources=sources,
            names=called,
            config=config,
            preset=preset,
            settings=schedules[config.method].method,
            device=str(resources.device),
            evaluation=evaluation,
            scales=ready.scales,
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
            target=target,
            sensitivity=sensitivities,
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


def _identity(digests: dict[str, str], images: int, config: QuantizationConfig, schedule: Schedule) -> dict[str, Any]:
    """What decides how a method's blocks come out; ``images`` are those not held back.

    In a search the layers' widths are part of the blocks' names instead, and what is wanted of the network is none of
    the blocks' business: a search for another target takes them, too.
    """
    beside = {"method", "compare", "target", "sensitivity"} | ({"layers"} if config.target is not None else set())
    return {
        "digests": {name: digests[name] for name in ("model", "calibration")},
        "images": images,
        "config": config.model_dump(mode="json", exclude=beside),
        "protocol": config.resolved_protocol.model_dump(),
        "preset": vars(schedule.preset),
        "settings": vars(schedule.method),
    }
