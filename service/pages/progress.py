"""How far a job has come, as its page shows it: its stages, its blocks, the loss of the one under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from aquant_core.config import QuantizationConfig
from aquant_core.report.formats import NAMES, duration, fixed
from aquant_core.report.plots import loss_plot
from aquant_core.report.schema import Target
from service.jobs.schemas import JobDocument
from service.jobs.states import JobState
from service.pages.render import about

STAGES = {
    "intake": "Check the files",
    "capture": "Read the network",
    "forecast": "Forecast",
    "search": "Search widths",
    "nearest": "Round to nearest",
    "reconstruct": "Reconstruct blocks",
    "evaluate": "Evaluate",
    "sensitivity": "Rank layers",
    "save": "Save",
}
"""The stages of a job in their order, in words."""

STATES = {
    JobState.QUEUED: "Waiting",
    JobState.RUNNING: "Running",
    JobState.CANCELLING: "Stopping",
    JobState.SUCCEEDED: "Succeeded",
    JobState.FAILED: "Failed",
    JobState.CANCELLED: "Cancelled",
}


def stages_of(job: JobDocument) -> dict[str, str]:
    """Those that this job goes through: only a target is searched for, and a dry run ends with the forecast."""
    left_out = set() if job.config.target is not None else {"search"}
    names = list(STAGES)
    if job.config.dry_run:
        left_out |= set(names[names.index("forecast") + 1 :])
    return {name: words for name, words in STAGES.items() if name not in left_out}


@dataclass(frozen=True)
class BlockRow:
    """One block of the method under way."""

    number: int
    name: str
    seconds: float | None
    state: str
    loss: float | None


@dataclass(frozen=True)
class Happened:
    """A block that is finished."""

    method: str | None
    block: int
    loss: float | None


def blocks_of(job: JobDocument, finished: Sequence[Happened]) -> list[BlockRow]:
    """The blocks of the method under way; those of other methods are only counted in the job's stages."""
    progress = job.progress
    losses = {each.block: each.loss for each in finished if each.method == progress.method}
    forecast = [] if progress.forecast is None else progress.forecast.blocks
    expected = [block for block in forecast if block.learned]
    rows = []
    for number in range(1, progress.blocks + 1):
        known = expected[number - 1] if number <= len(expected) else None
        under_way = number == progress.block and job.state in (JobState.RUNNING, JobState.CANCELLING)
        rows.append(
            BlockRow(
                number,
                known.name if known is not None else f"block {number}",
                None if known is None else known.seconds,
                "finished" if number in losses else "under way" if under_way else "to come",
                losses.get(number, progress.loss if under_way else None),
            )
        )
    return rows


def curve_of(job: JobDocument) -> Markup | None:
    """The loss of the block under way."""
    if job.progress.curve is None:
        return None
    return loss_plot(job.progress.curve, job.progress.iterations, str(job.progress.block), "loss")


def in_short(job: JobDocument) -> str:
    """Where a job stands, for a screen reader: what is worth an interruption, and no seconds."""
    progress = job.progress
    words = [STATES[job.state]]
    if job.state == JobState.RUNNING and job.stage is not None:
        words.append(STAGES.get(job.stage, job.stage).lower())
        if progress.block:
            method = NAMES.get(progress.method or "", "")
            words.append(f"{method} block {progress.block} of {progress.blocks}".strip())
    return ", ".join(words)


def waiting_for(job: JobDocument) -> str:
    """What a queued job waits for: its place among its owner's that wait; what runs stands in no line."""
    if job.workers == 0:
        return "for a worker to start"
    before = job.queue_position or 0
    return "first in line" if before == 0 else f"number {before + 1} in line"


def facts_of(job: JobDocument, target: Target | None = None) -> list[tuple[str, str, str]]:
    """What stands large at the top of a job's page: a name, a value, and a remark; what became of a target is one."""
    progress = job.progress
    facts: list[tuple[str, str, str]] = []
    if job.state == JobState.QUEUED:
        facts.append(("Waits", waiting_for(job), "" if job.device is None else f"to run on a {job.device.upper()}"))
    elif job.stage is not None and not job.finished:
        stages = list(stages_of(job))
        of_all = f"{stages.index(job.stage) + 1} of {len(stages)}" if job.stage in stages else ""
        facts.append(("Stage", STAGES.get(job.stage, job.stage), of_all))
    if progress.block and not job.finished:
        step = f"iteration {progress.iteration:,} of {progress.iterations:,}"
        facts.append((NAMES.get(progress.method or "", "Blocks"), f"Block {progress.block} of {progress.blocks}", step))
    if not job.finished and job.state != JobState.QUEUED:
        facts.append(("Time left", *_time_left(job)))
    if job.finished and job.started_at is not None and job.finished_at is not None:
        took = duration((job.finished_at - job.started_at).total_seconds())
        facts.append(("Took", took, "" if job.attempt == 1 else f"in {job.attempt} attempts"))
    if target is not None:
        metric = "top-1" if target.metric == "top1" else "agreement"
        lost = f"a drop of {fixed(target.drop, 2)} points of {metric}, at most {target.max_accuracy_drop:g} wanted"
        facts.append(("Target", "Held" if target.held else "Not held", lost))
    return facts


def _time_left(job: JobDocument) -> tuple[str, str]:
    """What is known of it, and until when: it is estimated for blocks, and for nothing before or after them."""
    progress, stages = job.progress, list(stages_of(job))
    tries = job.stage in ("search", "sensitivity") and progress.iterations
    tried = f"width {progress.iteration} of {progress.iterations}" if tries else ""
    if "reconstruct" not in stages:
        return "not estimated", ""
    if job.stage in stages[stages.index("reconstruct") + 1 :]:
        done = "all blocks are done" if progress.blocks else ""
        return "not estimated", ", ".join(filter(None, (done, tried)))
    left = "not known yet" if progress.eta_seconds is None else about(progress.eta_seconds)
    return left, tried or "until all blocks are done"


def settings_of(job: JobDocument) -> dict[str, Any]:
    """What was asked for, and nothing that goes without saying."""
    config = job.config
    given = {name: getattr(config, name) for name in ("weight_bits", "activation_bits", "preset")}
    bare = QuantizationConfig.model_validate(given).model_dump(mode="json")
    always = ("method", "weight_bits", "activation_bits", "preset", "protocol", "seed")
    return {
        name: value for name, value in config.model_dump(mode="json").items() if name in always or value != bare[name]
    }
