"""A target instead of settings: searches the layers' bit widths for the smallest network that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from aquant_core import checkpoint_torch
from aquant_core.config import LayerOverride, Method, QuantizationConfig, Target
from aquant_core.damage import damages
from aquant_core.evaluation import decisions_to_meet, logits_of, paired_difference
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.forecast import Forecast
from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet
from aquant_core.model import QuantizedModel, bits_of_layers, quantize_to_nearest
from aquant_core.partition import Block
from aquant_core.progress import OnProgress, Progress
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources
from aquant_core.sequence import Run, reconstruct_blocks
from aquant_core.widths import Choice, Widths, chain, choices, thinned, weight_bytes

CANDIDATES = 31
"""Assignments of widths among which the search halves: five of them are learned."""


@dataclass(frozen=True)
class Task:
    """What all candidates share.

    Attributes:
        method: the method's name.
        graph: the folded float network, marked where the method quantizes values.
        blocks: its blocks.
        schedule: how a block is learned.
        forecast: what learning all blocks once takes.
        images: (N, C, H, W) calibration images.
        evaluation: what the target is measured on.
        float_logits: (N, classes) of the evaluation images.
        resources: device and folder.
        finished: where the blocks of a configuration are kept; blocks of equal widths, behind equal ones, are learned
            once.
    """

    method: Method
    graph: CapturedModel
    blocks: list[Block]
    schedule: Schedule
    forecast: Forecast
    images: Tensor
    evaluation: ImageSet
    float_logits: Tensor
    resources: Resources
    finished: Callable[[QuantizationConfig], FinishedBlocks]

    def quantized(self, config: QuantizationConfig, tell: OnProgress) -> QuantizedModel:
        """The network at the configuration's widths."""
        model = quantize_to_nearest(self.graph, self.images, config, self.schedule.method.placement)
        if self.schedule.method.reconstruct:
            run = Run(self.method, model, self.blocks, self.schedule, self.forecast, self.finished(config))
            reconstruct_blocks([run], self.images, config.seed, self.resources, tell)
        for layer in model.layers.values():
            layer.a_rounding = self.schedule.method.a_rounding
        return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    Attributes:
        config: the configuration without a target, every layer's widths in it.
        forecast: what learning all candidates was to take.
        document: the report's ``target``.
        warnings: what a reader should know of it.
    """

    config: QuantizationConfig
    forecast: Forecast
    document: dict[str, Any]
    warnings: list[str]


def search(task: Task, unmarked: CapturedModel, config: QuantizationConfig, tell: OnProgress) -> Found:
    """The smallest network, in bytes of the checkpoint, that holds the target, of a chain of at most ``CANDIDATES``.

    What each layer alone does to the outputs is measured at each width (see ``damage``); from that follows a chain of
    assignments, each larger than the one before (see ``widths.chain``). In it the search halves: a candidate is learned
    as a run of its own would learn it; if it holds, the next one tried is smaller, if not, larger. What is tried next
    depends on nothing but what held, so that a larger drop allowed never gives a larger network.

    Args:
        task: what candidates are made of.
        unmarked: the folded float network as it is.
        config: with a target.
        tell: told of the widths tried, and of the blocks over all candidates.
    """
    target = config.target
    assert target is not None
    candidates = _candidates(task, unmarked, config, tell)
    rounds = len(candidates).bit_length()
    expected = Forecast(rounds * task.forecast.blocks)
    count = sum(block.has_parts for block in task.blocks)
    tell(Progress("nearest", blocks=rounds * count, forecast=expected.document() if expected.blocks else None))
    tried: dict[int, dict[str, Any]] = {}

    def holds(index: int) -> bool:
        later = rounds - len(tried) - 1
        told = _Told(tell, len(tried) * count, rounds * count, later * task.forecast.seconds)
        tried[index] = _measured(task, candidates[index], target, told)
        return bool(tried[index]["held"])

    first = first_that_holds(len(candidates), holds)
    held = first < len(candidates)
    best = first if held else min(tried, key=lambda index: (tried[index]["drop"], index))
    document = {
        "max_accuracy_drop": target.max_accuracy_drop,
        "metric": decisions_to_meet(task.float_logits, task.evaluation.labels)[0],
        "n": len(task.evaluation),
        "held": held,
        "drop": tried[best]["drop"],
        "interval": tried[best]["interval"],
        "candidates": list(tried.values()),
        "chosen": list(tried).index(best),
    }
    return Found(candidates[best], expected, document, _warnings(document))


def first_that_holds(count: int, holds: Callable[[int], bool]) -> int:
    """The first of ``count`` in a row that holds, if all behind one that holds do; ``count`` if none does.

    It asks at most ``count.bit_length()`` times. Where not all behind one hold, the answer still has held, and the one
    before it has not.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


class _Told:
    """Passes on one candidate's progress as that of the whole search."""

    def __init__(self, tell: OnProgress, before: int, blocks: int, seconds_after: float) -> None:
        self._tell, self._before, self._blocks, self._after = tell, before, blocks, seconds_after

    def __call__(self, progress: Progress) -> None:
        eta = None if progress.eta_seconds is None else round(progress.eta_seconds + self._after, 1)
        self._tell(replace(progress, block=self._before + progress.block, blocks=self._blocks, eta_seconds=eta))


def _candidates(
    task: Task, unmarked: CapturedModel, config: QuantizationConfig, tell: OnProgress
) -> list[QuantizationConfig]:
    """Configurations without a target, from the smallest network to the largest."""
    kept = {name for name, override in config.layers.items() if override != LayerOverride()}
    lowest = bits_of_layers(task.graph, config)
    offered = {name: choices(bits) for name, bits in lowest.items() if name not in kept}
    offered = {name: widths for name, widths in offered.items() if len(widths) > 1}
    damage = damages(
        unmarked, offered, task.images, task.schedule, config.seed, task.resources, task.forecast.placement,
        lambda begun, tries: tell(Progress("search", iteration=begun, iterations=tries, method=task.method)),
    )  # fmt: skip
    numbers = {node.name: task.graph.weights[node.name]["weight"].numel() for node in task.graph.layers}
    layers = {
        name: [
            Choice(widths, weight_bytes(numbers[name], widths[0]), done)
            for widths, done in zip(offered[name], damage[name], strict=True)
        ]
        for name in offered
    }
    return [
        with_widths(config.model_copy(update={"target": None}), {n: choice.widths for n, choice in assignment.items()})
        for assignment in thinned(chain(layers), CANDIDATES)
    ]


def with_widths(config: QuantizationConfig, widths: Mapping[str, Widths]) -> QuantizationConfig:
    """The configuration with these layers at these bits of weight and input."""
    layers = {name: LayerOverride(weight_bits=bits[0], activation_bits=bits[1]) for name, bits in widths.items()}
    return config.model_copy(update={"layers": {**config.layers, **layers}})


def _measured(task: Task, config: QuantizationConfig, target: Target, tell: OnProgress) -> dict[str, Any]:
    """A candidate's part of the report."""
    model = task.quantized(config, tell)
    wanted = decisions_to_meet(task.float_logits, task.evaluation.labels)[1]
    logits = logits_of(model, task.evaluation.images, task.resources.device)
    of_float, of_model = task.float_logits.argmax(1) == wanted, logits.argmax(1) == wanted
    drop, low, high = (round(100 * value, 4) for value in paired_difference(of_float, of_model))
    bits = bits_of_layers(task.graph, config)
    numbers = {name: layer.float_weight.numel() for name, layer in model.layers.items()}
    weighted = sum(numbers[name] * bits[name][0] for name in bits)
    return {
        "layers": {name: list(widths) for name, widths in bits.items()},
        "mean_weight_bits": round(weighted / sum(numbers.values()), 3),
        "bytes": sum(tensor.nbytes for tensor in checkpoint_torch.tensors_of(model).values()),
        "accuracy": round(float(of_model.float().mean()), 6),
        "drop": drop,
        "interval": [low, high],
        "held": drop <= target.max_accuracy_drop,
    }


def _warnings(document: dict[str, Any]) -> list[str]:
    wanted, drop, high = document["max_accuracy_drop"], document["drop"], document["interval"][1]
    warnings = []
    if not document["held"]:
        warnings.append(
            f"No network that was tried holds a drop of {wanted:g} points: the best of {len(document['candidates'])} "
            f"drops {drop:.2f}, and is what was saved."
        )
    elif high > wanted:
        warnings.append(
            f"The drop of {drop:.2f} points is that of {document['n']} images; on others like them it may be up to "
            f"{high:.2f}."
        )
    if document["metric"] == "agreement":
        warnings.append("No labels: every decision other than the float network's was counted as a drop of accuracy.")
    return warnings
