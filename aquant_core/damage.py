"""What quantizing a single layer does to the float network's outputs, layer by layer, from one pass over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from aquant_core.caches import BlockCache, Placement
from aquant_core.config import FLOAT_BITS, LayerOverride, QuantizationConfig
from aquant_core.evaluation import energy, logits_of
from aquant_core.graph import CapturedModel, Node, evaluate_nodes
from aquant_core.methods import PRESETS
from aquant_core.model import CALIBRATED_ON, QuantizedModel, quantize_nodes_to_nearest
from aquant_core.partition import Block, partition
from aquant_core.reconstruction import Schedule, reconstruct_block
from aquant_core.resources import Resources, return_free_memory
from aquant_core.sequence import FloatValues, seed_of_block
from aquant_core.widths import Widths

_SHORT, _SHARE = PRESETS["smoke"], 15
"""Twenty iterations, at rates with which so few already do something; in a short run, no more than a fifteenth of its
own, so that two tries of every layer take about a quarter of its time."""


def damages(
    graph: CapturedModel,
    offered: Mapping[str, Sequence[Widths]],
    images: Tensor,
    schedule: Schedule,
    seed: int,
    resources: Resources,
    placement: Placement,
    tell: Callable[[int, int], None],
) -> dict[str, list[float]]:
    """Relative squared error of the logits while one layer alone is quantized and everything else is float.

    Each layer is learned in short at each of its widths, from the float network's values before and behind its block.
    Errors of different layers hardly depend on each other, so that those of a whole network add up, nearly.

    Args:
        graph: the folded float network, without marks: inputs are quantized where layers read them.
        offered: by layer, the bits of weight and input that are tried.
        images: (N, C, H, W) calibration images; the first ``CALIBRATED_ON`` are used.
        schedule: how the run that this is for learns a block; here it is fewer iterations, at ``smoke``'s rates.
        seed: of every random draw.
        resources: the device, and where mapped files lie.
        placement: where the float network's values are kept.
        tell: called with the number of tries begun and of all tries; may raise to stop.

    Returns:
        By layer, one number for each of its widths.
    """
    images = images[:CALIBRATED_ON]
    iterations = min(schedule.preset.iterations // _SHARE, _SHORT.iterations)
    short = replace(
        schedule,
        method=replace(schedule.method, placement="input", unit="block"),
        preset=replace(_SHORT, iterations=iterations),
    )
    blocks = partition(graph)
    logits = logits_of(graph, images, resources.device)
    whole = max(energy(logits), 1e-300)
    values, found = FloatValues(images, resources), dict[str, list[float]]()
    begun, all_of_them = 0, sum(map(len, offered.values()))
    for index, block in enumerate(blocks):
        values.enter(graph, block, placement)
        behind = [node for later in blocks[index + 1 :] for node in later.nodes]
        for node in block.layers:
            found[node.name] = []
            for widths in offered.get(node.name, ()):
                begun += 1
                model = _learned(
                    graph, block, node.name, widths, values, short, seed, partial(tell, begun, all_of_them)
                )
                output = values.through(partial(_rest, graph, model, block, behind), values.clean, "memory")
                error = output.read(0, len(output)).cpu().flatten(1) - logits
                found[node.name].append(energy(error) / whole)
                return_free_memory()
        values.leave()
    return {name: found[name] for name in offered}


def _learned(
    graph: CapturedModel,
    block: Block,
    layer: str,
    widths: Widths,
    values: FloatValues,
    schedule: Schedule,
    seed: int,
    tell: Callable[[], None],
) -> QuantizedModel:
    """A network in which the layer has been quantized, and learned if the method learns."""
    tell()
    override = LayerOverride(weight_bits=widths[0], activation_bits=widths[1])
    config = QuantizationConfig(
        weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS, border=schedule.border, layers={layer: override}
    )
    model = QuantizedModel(graph)
    entering = {block.input: values.clean.read(0, len(values.clean))}
    quantize_nodes_to_nearest(model, block.nodes, entering, config, "input")
    if schedule.method.reconstruct and schedule.preset.iterations:
        device = values.resources.device
        generator = torch.Generator(device).manual_seed(seed_of_block(seed, f"{layer}/{widths[0]}/{widths[1]}"))
        cache = BlockCache(values.clean, values.clean, values.target)
        reconstruct_block(model, block, cache, schedule, generator, lambda *_: tell())
    model.layers[layer].a_rounding = schedule.method.a_rounding
    return model.requires_grad_(False)


@torch.inference_mode()
def _rest(graph: CapturedModel, model: QuantizedModel, block: Block, behind: Sequence[Node], x: Tensor) -> Tensor:
    """The logits for the block's input: through the block, then the float network."""
    y = model.run_block(block, x)
    if not behind:
        return y
    return next(iter(evaluate_nodes(behind, {block.output: y}, graph.run_node).values()))
