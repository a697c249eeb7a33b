"""Accuracy cells: one network quantized one way, kept as soon as it is measured, so that a sweep can be cut off."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import command, commit, device_name, write

import aquant_core
from aquant_core.config import BorderConfig, QuantizationConfig
from aquant_core.evaluation import logits_of
from aquant_core.methods import PRESETS, Preset, settings_of

Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Cell:
    """What one run is asked for.

    Attributes:
        section: the table it belongs to.
        network: one of the caller's networks.
        bits: such as W2A4; 32 is float.
        method: of ``aquant_core.config.Method``.
        seed: of the run.
        variant: what the tables call its changes; empty for the method as it is.
        config: keys of the configuration that are set otherwise.
        preset: name of the preset, and ``changes`` of its settings.
    """

    section: str
    network: str
    bits: str
    method: str
    seed: int = 0
    variant: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    preset: str = "fast"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the run; the same run in two sections is run once."""
        words = [self.network, self.bits, self.method, self.preset, f"seed {self.seed}"]
        words += [json.dumps(part, sort_keys=True) for part in (self.config, self.changes) if part]
        return ", ".join(words)

    @property
    def configuration(self) -> QuantizationConfig:
        weight_bits, activation_bits = (int(part) for part in self.bits[1:].split("A"))
        return QuantizationConfig(
            method=self.method,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            preset=self.preset,
            seed=self.seed,
            **{"sensitivity": False, **self.config},
        )


@dataclass(frozen=True)
class Images:
    """A network and its images.

    Attributes:
        model, calibration: paths that ``aquant_core.quantize`` takes.
        load_evaluation: reads labelled images; the network is measured on all of them.
        architecture: what a state dict belongs to.
        score: measures the network instead, where there are more images than memory holds: from network and device to
            ``accuracy``, ``correct`` and whatever else is to be kept. ``quantize`` reports on ``load_evaluation``'s.
    """

    model: str
    calibration: Path
    load_evaluation: Callable[[], aquant_core.ImageSet]
    architecture: str | None = None
    score: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.device], dict[str, Any]] | None = None


def preset_of(cell: Cell) -> Preset:
    """The cell's preset with its changes, those of the method (``settings``) among them."""
    changes = dict(cell.changes)
    settings = changes.pop("settings", {})
    preset = replace(PRESETS[cell.preset], **changes)
    config = cell.configuration
    if config.iterations is not None:
        preset = replace(preset, iterations=config.iterations)
    of_method = {**preset.changes.get(config.method, {}), **settings}
    return replace(preset, changes={**preset.changes, config.method: of_method}) if settings else preset


def is_current(cell: Cell, result: dict[str, Any]) -> bool:
    """Whether a finished cell was run with what the cell stands for today: defaults are not part of its key."""
    preset, config = preset_of(cell), cell.configuration
    settings = settings_of(config.method, preset)
    rates = {name: value for name, value in vars(preset).items() if name != "changes"}
    return (
        result["settings"] == vars(settings)
        and rates.items() <= result["preset"].items()
        and (not settings.border or BorderConfig(**result["border"]) == config.border)
    )


def measure(cell: Cell, images: Images, threads: int, device: str = "cpu", revision: str = "") -> dict[str, Any]:
    """Runs a cell; what is kept of it, with the ``revision`` of what is measured."""
    torch.set_num_threads(threads)
    evaluation = images.load_evaluation()
    assert evaluation.labels is not None
    preset, config = preset_of(cell), cell.configuration
    if images.architecture is not None:
        config = config.model_copy(update={"architecture": images.architecture})
    resources = aquant_core.Resources(torch.device(device))
    result = aquant_core.quantize(
        images.model, images.calibration, config, evaluation, preset=preset, resources=resources
    )
    report = result.report
    if images.score is None:
        logits = logits_of(result.model, evaluation.images, resources.device)
        scores = {"accuracy": report["accuracy"], "correct": packed(logits.argmax(1) == evaluation.labels)}
    else:
        scores = images.score(result.model, resources.device)
    return {
        "cell": asdict(cell),
        **scores,
        "size": report["size"],
        "preset": report["preset"],
        "border": report["config"]["border"],
        "settings": report["settings"],
        "protocol": report["protocol"],
        "block_errors": {block["name"]: block["error_after"] for block in report["blocks"]},
        "seconds": report["seconds"],
        "digests": report["digests"],
        "versions": report["versions"],
        "device": device_name(resources.device),
        "threads": threads,
        "commit": revision or commit(),
        "command": command(),
    }


def packed(correct: torch.Tensor) -> str:
    """Which images were right, a bit each, as base64."""
    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def unpacked(result: dict[str, Any]) -> np.ndarray:
    """(N,) whether each image was right, as float."""
    count = result["accuracy"]["quantized"]["n"]
    bits = np.frombuffer(base64.b64decode(result["correct"]), np.uint8)
    return np.unpackbits(bits, count=count).astype(np.float64)


class Results:
    """The finished cells of a sweep in one JSON file, written anew after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = json.loads(path.read_text())["cells"] if path.exists() else {}

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self.cells and is_current(cell, self.cells[cell.key])

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        self.cells[cell.key] = result
        write(self.path, {"cells": self.cells})

    def of(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """Results of those cells that are finished, in their order."""
        return [self.cells[cell.key] for cell in cells if cell in self]


def sweep(
    cells: list[Cell], results: Results, images: Callable[[str], Images], processes: int, threads: int, device: str
) -> None:
    """Measures the cells that are not finished, several at a time, in order; each is kept when it ends."""
    left: dict[str, Cell] = {}
    for cell in cells:
        if cell not in results:
            left.setdefault(cell.key, cell)
    revision = commit()
    jobs = [(cell, images(cell.network), threads, device, revision) for cell in left.values()]
    print(f"{len(jobs)} cells to be measured, {len({cell.key for cell in cells}) - len(jobs)} are there", flush=True)
    if not jobs:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; what is finished is kept"))  # and the children
    failed: list[str] = []
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=4) as pool:
        for cell, result in pool.imap_unordered(_measure, jobs):
            if isinstance(result, str):
                failed.append(cell.key)
                print(f"failed: {cell.key}\n{result}", flush=True)
                continue
            results.add(cell, result)
            top1 = result["accuracy"]["quantized"]["top1"]
            print(f"{top1:8.2%} {result['seconds']:6.0f} s  {cell.variant or cell.method}: {cell.key}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} cells failed, the others are kept: {'; '.join(failed)}")


def _measure(job: tuple[Cell, Images, int, str, str]) -> tuple[Cell, dict[str, Any] | str]:
    try:
        return job[0], measure(*job)
    except Exception:  # of one cell: the others go on
        return job[0], traceback.format_exc()


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float]:
    """Mean difference of accuracy on the same images, and half its 95 % interval, paired by image.

    The interval says what other images would change, for just these seeds; not what other seeds would.

    Args:
        ours, theirs: for each seed, (N,) whether each image was right.
    """
    per_image = np.mean(ours, 0) - np.mean(theirs, 0)
    return float(per_image.mean()), float(Z * per_image.std(ddof=1) / np.sqrt(len(per_image)))


def recovered(
    float_right: np.ndarray, ours: list[np.ndarray], theirs: list[np.ndarray], draws: int = 2000
) -> tuple[float, float, float] | None:
    """Share of the accuracy that ``theirs`` lost which ``ours`` has, and its 95 % interval by bootstrap over images.

    None where the loss cannot be told from nothing.
    """
    ours_right, theirs_right = np.mean(ours, 0), np.mean(theirs, 0)
    gained, lost = ours_right - theirs_right, float_right - theirs_right
    random = np.random.default_rng(0)
    counts = random.multinomial(len(lost), np.full(len(lost), 1 / len(lost)), size=draws)  # (draws, N)
    losses = counts @ lost
    if losses.min() <= 0:
        return None
    low, high = np.quantile((counts @ gained) / losses, [0.025, 0.975])
    return float(gained.sum() / lost.sum()), float(low), float(high)
