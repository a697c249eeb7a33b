"""Accuracy of each method on the example nets, cell by cell; a cell that is already in the results is not run again.

    python benchmarks/accuracy.py --networks residual inverted_residual --bits W2A2 --seeds 0

Evaluated on the 2,000 labelled test images of ``examples/fashion_mnist``.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any, get_args

import torch
from record import command, commit

import aquant_core
from aquant_core.config import Method, PresetName, QuantizationConfig

EXAMPLES = Path(__file__).parent.parent / "examples" / "fashion_mnist"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["residual", "inverted_residual"])
    parser.add_argument("--methods", nargs="+", default=list(get_args(Method)), choices=get_args(Method))
    parser.add_argument("--bits", nargs="+", default=["W2A2"], help="such as W2A4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--preset", default="fast", choices=get_args(PresetName))
    options = parser.parse_args()
    calibration = aquant_core.read_images(EXAMPLES / "calibration.npz")
    evaluation = aquant_core.read_images(EXAMPLES / "evaluation.npz", what="evaluation")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": []}
    for network in options.networks:
        for bits in options.bits:
            weight_bits, activation_bits = (int(part) for part in bits[1:].split("A"))
            for method in options.methods:
                for seed in options.seeds:
                    cell = {"network": network, "bits": bits, "method": method, "preset": options.preset, "seed": seed}
                    if any(cell.items() <= done.items() for done in results["cells"]):
                        continue
                    config = QuantizationConfig(
                        method=method,
                        weight_bits=weight_bits,
                        activation_bits=activation_bits,
                        preset=options.preset,
                        seed=seed,
                    )
                    report = aquant_core.quantize(EXAMPLES / f"{network}.onnx", calibration, config, evaluation).report
                    results["cells"].append(cell | measured(report))
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    print(bits, network, method, seed, f"{report['accuracy']['quantized']['top1']:.2%}", flush=True)
    print(table(results["cells"]))


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of its report, and where it was measured."""
    return {
        "accuracy": report["accuracy"],
        "size": report["size"],
        "preset_settings": report["preset"],
        "block_errors": {block["name"]: block["error_after"] for block in report["blocks"]},
        "seconds": report["seconds"],
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": report["versions"],
        "digests": report["digests"],
        "commit": commit(),
        "command": command(),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """One Markdown row a cell."""
    lines = [
        "| network | bits | method | seed | top-1 | 95 % interval | float | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        accuracy = cell["accuracy"]["quantized"]
        low, high = accuracy["interval"]
        lines.append(
            f"| {cell['network']} | {cell['bits']} | {cell['method']} | {cell['seed']} | {accuracy['top1']:.2%} "
            f"| {low:.2%} - {high:.2%} | {cell['accuracy']['float']['top1']:.2%} | {cell['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
