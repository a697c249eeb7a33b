"""What comes before a run: everything read and checked, cut into blocks, and what it will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aquant_core.capture_model import capture
from aquant_core.config import Method, Preprocess, QuantizationConfig
from aquant_core.errors import ImageSetError
from aquant_core.fold import fold_batch_norm
from aquant_core.forecast import Forecast, forecast, together
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet, Kind, check_images, check_values, read_images
from aquant_core.methods import PRESETS, Preset, settings_of
from aquant_core.model import marked
from aquant_core.partition import Block, partition
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources
from aquant_core.scales import like_bytes, of_different_scales, scales_of

_HELD_BACK_SHARE, _HELD_BACK_AT_MOST = 8, 256
"""Without evaluation images, one calibration image in eight is held back to measure on, at most 256."""


@dataclass(frozen=True)
class Preparation:
    """A run that could begin.

    Attributes:
        config: method, bits and switches.
        preset: iterations and rates.
        resources: device and memory budgets.
        captured: the network as it came.
        graph: the same with BatchNorm folded, on the device.
        calibration: the images to learn from.
        evaluation: those to measure on.
        scales: what the images' values are like (the report's key).
        warnings: what does not stop the run.
        digests: of network and images.
        schedules: of every method, the main one first.
        graphs: ``graph`` with marks where each method quantizes values.
        blocks: each method's.
        forecasts: of the methods that learn.
    """

    config: QuantizationConfig
    preset: Preset
    resources: Resources
    captured: CapturedModel
    graph: CapturedModel
    calibration: ImageSet
    evaluation: ImageSet
    scales: dict[str, Any]
    warnings: list[str]
    digests: dict[str, str]
    schedules: dict[Method, Schedule]
    graphs: dict[Method, CapturedModel]
    blocks: dict[Method, list[Block]]
    forecasts: dict[Method, Forecast]

    @property
    def count(self) -> int:
        """How many blocks of the main method are learned."""
        return sum(block.has_parts for block in self.blocks[self.config.method])

    @property
    def forecast(self) -> dict[str, Any] | None:
        """Of all methods together, as JSON values; None if none learns."""
        return together(list(self.forecasts.values())).document() if self.forecasts else None


def prepare(
    model: CapturedModel | nn.Module | str | Path,
    calibration: ImageSet | Tensor | str | Path,
    config: QuantizationConfig,
    evaluation: ImageSet | Tensor | str | Path | None,
    tell: OnProgress,
    preset: Preset | None,
    resources: Resources | None,
) -> Preparation:
    """Reads and checks everything and tries each block; see ``pipeline.quantize`` for the arguments.

    Raises:
        AQuantError: one of its subclasses.
    """
    calibration = _image_set(calibration, "calibration", config.preprocess)
    evaluation = None if evaluation is None else _image_set(evaluation, "evaluation", config.preprocess)
    captured = capture(model, config.architecture, calibration.images[:2])
    warnings = check_images(captured, calibration, config, evaluation)
    resources = resources or Resources()
    graph = fold_batch_norm(captured).to(resources.device)
    digests = {"model": captured.digest(), "calibration": calibration.digest()}
    if evaluation is None:
        calibration, evaluation = _hold_back(calibration)
        warnings.append(f"No evaluation images: measured on {len(evaluation)} calibration images held back.")
    digests["evaluation"] = evaluation.digest()
    scales = scales_of(calibration.images, evaluation.images)
    if scales["differ"]:  # before what else is strange, which likely comes of it
        warnings.insert(0, of_different_scales(scales))
    elif (unscaled := like_bytes(calibration.images, "calibration")) is not None:
        warnings.insert(0, unscaled)

    preset = preset or PRESETS[config.preset]
    if config.iterations is not None:
        preset = replace(preset, iterations=config.iterations)
    schedules = {
        name: Schedule(settings_of(name, preset), preset, config.border) for name in (config.method, *config.compare)
    }
    graphs = {name: marked(graph, config, schedule.method) for name, schedule in schedules.items()}
    blocks = {name: partition(marked_graph) for name, marked_graph in graphs.items()}
    count = sum(block.has_parts for block in blocks[config.method])
    learned = [name for name, schedule in schedules.items() if schedule.method.reconstruct]
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
    return Preparation(
        config,
        preset,
        resources,
        captured,
        graph,
        calibration,
        evaluation,
        scales,
        warnings,
        digests,
        schedules,
        graphs,
        blocks,
        forecasts,
    )


def names_of(
    names: Mapping[str, str] | None, model: object, calibration: object, evaluation: object
) -> dict[str, str | None]:
    """The report's ``sources``: what the files are called, without their folders; None for what no file was read for.

    Args:
        names: by ``model``, ``calibration`` and ``evaluation``, where others have read the files.
        model, calibration, evaluation: as a run was given them.
    """
    given = {"model": model, "calibration": calibration, "evaluation": evaluation}
    if names is not None:
        return {name: names.get(name) for name in given}
    return {name: Path(source).name if isinstance(source, str | Path) else None for name, source in given.items()}


def _image_set(images: ImageSet | Tensor | str | Path, what: Kind, preprocess: Preprocess | None) -> ImageSet:
    if isinstance(images, str | Path):
        return read_images(images, what, preprocess)
    if isinstance(images, Tensor):
        images = ImageSet(images)
    if not isinstance(images, ImageSet):
        raise ImageSetError(
            f"The {what} images are a {type(images).__name__}.",
            "Give a tensor (N, C, H, W), an ImageSet, or the path of a file.",
        )
    check_values(images.images, what)
    return images


def _hold_back(calibration: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Splits off the last images, to measure on what was not learned from."""
    count = max(min(len(calibration) // _HELD_BACK_SHARE, _HELD_BACK_AT_MOST), 1)
    labels = calibration.labels
    return (
        ImageSet(calibration.images[:-count], None if labels is None else labels[:-count]),
        ImageSet(calibration.images[-count:], None if labels is None else labels[-count:]),
    )
