"""What no kernel can beat: convolutions by memory, tensor cores and border arithmetic. Computed, not measured.

    python benchmarks/floors.py --network resnet18

For each design and each layer the longer of its memory and its product time, summed over the layers, fp16 in and out.
The rates are one H200's as measured there by others' code (device-to-device copy, 8192 cubed bf16 product); int8 is
taken as twice bf16. An instruction a column element costs all of them over the lanes' rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write

import aquant_core
from aquant_core.architectures import build
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT, LAYERS, Node, evaluate_nodes

COPY_RATE, BF16_RATE, LANES_RATE = 4.3e12, 790e12, 132 * 128 * 1.98e9
"""Bytes, operations and fp32 instructions a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS / "floors.json")
    options = parser.parse_args()
    layers = [count(*layer, options.batch) for layer in shapes(options.network, options.size)]
    totals = {
        key: sum(layer[key] for layer in layers) for key in ("operations", "input", "output", "columns", "weights")
    }
    floors = {
        "float16, implicit GEMM": floor(
            layers, BF16_RATE, lambda one: 2 * (one["input"] + one["output"] + one["weights"])
        ),
        "border in the product's prologue": floor(
            layers, 2 * BF16_RATE, lambda one: 2 * (one["input"] + one["output"]) + one["weights"]
        ),
        "columns in int8, then a product": floor(
            layers,
            2 * BF16_RATE,
            lambda one: 2 * (one["input"] + one["output"]) + one["weights"] + 2 * one["columns"],
        ),
    }
    results = {
        "about": about(torch.device("cpu"), network=options.network, batch=options.batch, size=options.size, seed=0),
        "rates": {"copy": COPY_RATE, "bf16": BF16_RATE, "lanes": LANES_RATE},
        "elements": totals,
        "microseconds": floors,
        "microseconds_by_instruction_on_each_column_element": round(1e6 * totals["columns"] / LANES_RATE, 1),
    }
    write(options.out, results)
    for design, microseconds in floors.items():
        print(f"{design}: {microseconds} us")
    print(f"one instruction a column element: {results['microseconds_by_instruction_on_each_column_element']} us")


def shapes(network: str, size: int) -> list[tuple[torch.Size, torch.Size, torch.Size]]:
    """Input, weight and output shape of each layer for one image."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, size, size)
    graph = fold_batch_norm(aquant_core.capture(build(network).eval(), example=images))
    found = []

    def run(node: Node, values: list[torch.Tensor]) -> torch.Tensor:
        result = graph.run_node(node, values)
        if node.op in LAYERS:
            found.append((values[0].shape, graph.weights[node.name]["weight"].shape, result.shape))
        return result

    with torch.no_grad():
        evaluate_nodes(graph.nodes, {INPUT: images}, run)
    return found


def count(x: torch.Size, weight: torch.Size, out: torch.Size, batch: int) -> dict[str, int]:
    """Elements of one layer, and operations (a multiplication and an addition each)."""
    windows = out[2:].numel()
    return {
        "input": batch * x.numel(),
        "output": batch * out.numel(),
        "weights": weight.numel(),
        "columns": batch * windows * x[1] * weight[2:].numel(),
        "operations": 2 * batch * windows * weight.numel(),
    }


def floor(layers: list[dict[str, int]], rate: float, moved: Any) -> float:
    """Microseconds: for each layer the longer of memory and product."""
    return round(sum(1e6 * max(moved(one) / COPY_RATE, one["operations"] / rate) for one in layers), 1)


if __name__ == "__main__":
    main()
