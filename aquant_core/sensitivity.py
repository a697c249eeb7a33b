"""Which layers hurt most: what raising a layer's bits would gain, and what it would cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from aquant_core.caches import Placement
from aquant_core.config import QuantizationConfig
from aquant_core.damage import damages
from aquant_core.evaluation import Z, decisions_to_meet, paired_difference
from aquant_core.graph import CapturedModel
from aquant_core.model import bits_of_layers
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources
from aquant_core.widths import raised, weight_bytes

_UNSURE = 1.0
"""TODO"""


def sensitivity(
    graph: CapturedModel,
    config: QuantizationConfig,
    images: Tensor,
    schedule: Schedule,
    logits: Mapping[str, Tensor],
    labels: Tensor | None,
    resources: Resources,
    placement: Placement,
    tell: Callable[[int, int], None],
) -> dict[str, Any]:
    """What more bits would gain a layer, and cost it; the report's ``sensitivity``.

    What the network lost against the float one is shared out among the layers by what each alone does to the float
    network's outputs (``damages``): a layer's gain is the share that goes away when it is raised.

    Args:
        graph: the folded float network, without marks.
        config: the widths that the network has.
        images: (N, C, H, W) calibration images.
        schedule: how it was learned.
        logits: (N, classes) of the ``float`` and the ``quantized`` network, of the evaluation images.
        labels: of these, or None.
        resources, placement, tell: see ``damages``.
    """
    metric, wanted = decisions_to_meet(logits["float"], labels)
    right = {name: values.argmax(1) == wanted for name, values in logits.items()}
    bits = bits_of_layers(graph, config)
    offered = {name: list(dict.fromkeys([widths, raised(widths)])) for name, widths in bits.items()}
    layers: list[dict[str, Any]] = []
    if any(len(widths) > 1 for widths in offered.values()):
        damage = damages(graph, offered, images, schedule, config.seed, resources, placement, tell)
        total = sum(done[0] for done in damage.values())
        lost, low, high = paired_difference(right["float"], right["quantized"])
        for name, (widths, *more) in offered.items():
            if not more:
                continue
            share = max(damage[name][0] - damage[name][1], 0.0) / total if total else 0.0
            numbers = graph.weights[name]["weight"].numel()
            layers.append(
                {
                    "layer": name,
                    "bits": list(widths),
                    "raised_bits": list(more[0]),
                    "share": round(share, 6),
                    "gain": round(share * max(lost, 0.0), 6),
                    "interval": [0, 0],
                    "cost_bytes": weight_bytes(numbers, more[0][0]) - weight_bytes(numbers, widths[0]),
                }
            )
    layers.sort(key=lambda layer: (-layer["gain"], -layer["share"], layer["cost_bytes"]))
    return {"metric": metric, "n": len(wanted), "layers": layers}
