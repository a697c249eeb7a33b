"""Whether the exported ONNX computes what the quantized network does: codes, logits, predictions.

    python benchmarks/export_exactness.py

The examples, quantized by every method at several bit widths with preset smoke: codes and logits over the first of
their evaluation images, predictions over all; and the paper's six architectures with random weights, rounded to nearest
and with borders drawn at random, on random images of reduced size. A cell that is finished is kept, so that a run that
was cut off goes on. ``--page`` prints the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from inference import with_border
from record import RESULTS, about, write

import aquant_core
from aquant_core.architectures import build
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.evaluation import logits_of
from aquant_core.export_onnx import OUTPUT, onnx_model
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT
from aquant_core.methods import METHODS
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest
from aquant_core.onnx_agreement import Agreement, compare, open_session

EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORKS = {
    "residual": ("fashion_mnist", "residual.onnx"),
    "inverted_residual": ("fashion_mnist", "inverted_residual.onnx"),
    "plain": ("digits", "plain.onnx"),
}
BITS = ((2, 2), (3, 3), (4, 4), (8, 8))
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in get_args(Method)},
    "aquant, channel_mean": {"border": {"fusion": "channel_mean"}},
    "aquant, learned alpha": {"border": {"fusion": "channel_mean", "alpha": "learned"}},
    "aquant, by channel": {"border": {"fusion": "none", "granularity": "channel"}},
}

ARCHITECTURES = ("resnet18", "resnet50", "mobilenet_v2", "mnasnet2_0", "regnet_x_600mf", "regnet_x_3_2gf")
BORDERS: dict[str, BorderConfig | None] = {
    "nearest": None,
    "nearest, outputs": None,
    "border, channel_mean": BorderConfig(),
    "border, fusion none": BorderConfig(fusion="none"),
    "border, by channel": BorderConfig(fusion="none", granularity="channel"),
}
IMAGES, SIZE = 8, 64
"""Of the architectures."""
CODES_OF = 256
"""Evaluation images of which every code is compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "export_exactness.json")
    parser.add_argument("--page", action="store_true", help="print the tables of what is there")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"cells": {}}
    if options.page:
        print(page(results["cells"]))
        return
    results["about"] = about(torch.device("cpu"), seed=0, preset="smoke", images=IMAGES, size=SIZE, codes_of=CODES_OF)
    for key, measure in plan():
        if key in results["cells"] or options.only not in key:
            continue
        results["cells"][key] = row = measure()
        write(options.out, results)
        print(key, json.dumps(row), flush=True)


def plan() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every cell by its name."""
    for border in BORDERS:
        for architecture in ARCHITECTURES:
            yield f"{architecture} | W2A2 | {border}", lambda a=architecture, b=border: of_architecture(a, b)
    for weight_bits, activation_bits in BITS:
        for network in NETWORKS:
            for variant in VARIANTS:
                bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
                key = f"{network} | W{weight_bits}A{activation_bits} | {variant}"
                yield key, lambda n=network, v=variant, b=bits: of_example(n, v, b)


def of_example(network: str, variant: str, bits: dict[str, int]) -> dict[str, Any]:
    """An example, quantized, over its evaluation images."""
    folder = EXAMPLES / NETWORKS[network][0]
    config = QuantizationConfig(**{"preset": "smoke", **bits, **VARIANTS[variant]})
    result = aquant_core.quantize(folder / NETWORKS[network][1], folder / "calibration.npz", config)
    images = aquant_core.read_images(folder / "evaluation.npz", "evaluation").images
    exported = onnx_model(result.model)
    found = compare(result.model, exported, images[:CODES_OF])
    logits = logits_of(result.model, images)
    session = open_session(exported, spinning=False)
    batches = [session.run([OUTPUT], {INPUT: batch.numpy()})[0] for batch in torch.split(images, CODES_OF)]
    same = (np.concatenate(batches).argmax(1) == logits.numpy().argmax(1)).sum()
    return summary(found) | {"predicted": len(images), "same_top1": int(same)}


def of_architecture(name: str, border: str) -> dict[str, Any]:
    """A network with random weights on random images: how it is computed does not depend on what was learned."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    graph = fold_batch_norm(aquant_core.capture(build(name), example=images[:2]))
    config = QuantizationConfig(weight_bits=2, activation_bits=2)
    method = METHODS["qdrop" if border == "nearest, outputs" else "nearest"]
    graph = marked(graph, config, method)
    model: QuantizedModel = quantize_to_nearest(graph, images, config, method.placement)
    model = with_border(copy.deepcopy(model), BORDERS[border]).requires_grad_(False).eval()
    return summary(compare(model, onnx_model(model), images)) | {"predicted": len(images)}


def summary(found: Agreement) -> dict[str, Any]:
    """The sums over the quantized values."""
    row = dataclasses.asdict(found)
    for name in ("codes", "differing_given_input", "differing_in_run"):
        row[name] = sum(row[name].values())
    return {"values": len(found.codes), **row}


def page(cells: dict[str, Any]) -> str:
    """A table: one line for each network and variant, the bit widths summed up."""
    lines = [
        "| network | bits | | codes compared | differing, given the same input | differing in the whole run "
        "| logits differ by | same prediction |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for key, row in cells.items():
        network, bits, variant = key.split(" | ")
        groups.setdefault((network, variant), []).append((bits, row))
    for (network, variant), rows in groups.items():
        total = {name: sum(row[name] for _, row in rows) for name in rows[0][1] if name != "values"}
        share = total["differing_in_run"] / max(total["codes"], 1)
        difference = max(row["logits_difference"] / max(row["logits_scale"], 1e-30) for _, row in rows)
        logits = f"{difference:.1e}" if total["images_with_all_codes"] else "-"
        lines.append(
            f"| {network} | {', '.join(bits for bits, _ in rows)} | {variant} | {total['codes']:.3g} "
            f"| {total['differing_given_input']} | {share:.1e} | {logits} "
            f"| {total['same_top1']} of {total['predicted']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
