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

_AT_LEAST, _AT_MOST = 1 / 4, 2.0
"""Of its estimate, what a gain may be without any chance in it: layers do not quite add up, the network's loss does not
quite go with its error, and the layers behind a coarse one learn to make up for some of it, the more the longer they
learn (``benchmarks/sensitivity.py`` counts how often the interval held)."""


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

    What each layer alone does to the float network's outputs is measured at its widths and at the raised ones
    (``damages``). What the network lost against the float one is then shared out, see ``expected_gain``.

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
        total = sum(at_its_widths for at_its_widths, *_ in damage.values())
        for name, (widths, *higher) in offered.items():
            if not higher:
                continue
            share = max(damage[name][0] - damage[name][1], 0.0) / total if total else 0.0
            gain, low, high = expected_gain(share, right["float"], right["quantized"])
            numbers = graph.weights[name]["weight"].numel()
            layers.append(
                {
                    "layer": name,
                    "bits": list(widths),
                    "raised_bits": list(higher[0]),
                    "error_share": round(share, 6),
                    "gain": round(gain, 6),
                    "interval": [round(low, 6), round(high, 6)],
                    "cost_bytes": weight_bytes(numbers, higher[0][0]) - weight_bytes(numbers, widths[0]),
                }
            )
    layers.sort(key=lambda layer: (-layer["gain"], -layer["error_share"], layer["cost_bytes"]))
    return {"metric": metric, "n": len(wanted), "layers": layers}


def expected_gain(share: float, of_float: Tensor, of_quantized: Tensor) -> tuple[float, float, float]:
    """Accuracy that a run with the layer raised should gain on the same images, and its 95 % interval.

    A decision is lost where the error of the logits exceeds their margin. Margins near 0 are about evenly spread, so
    what is lost goes with the error's amplitude: without ``share`` of its energy, sqrt(1 - share) of the loss is left.

    The interval holds three doubts: the estimate itself, by factors; the images; and that another run decides anew:
    about as many images as quantization has decided otherwise change sides, either way.

    Args:
        share: of the squared error, what goes away.
        of_float, of_quantized: (N,) whether either network had each image right.
    """
    lost, low, high = paired_difference(of_float, of_quantized)
    left_out = 1 - math.sqrt(max(1 - share, 0.0))
    gain = left_out * max(lost, 0.0)
    by_chance = Z * math.sqrt(float((of_float != of_quantized).sum()) + 1) / len(of_float)
    below, above = ((lost - low) * left_out, (high - lost) * left_out)
    return (
        gain,
        gain - math.hypot(gain * (1 - _AT_LEAST), below, by_chance),
        gain + math.hypot(gain * (_AT_MOST - 1), above, by_chance),
    )
