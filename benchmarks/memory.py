"""Forecast and measured peak memory, and the same bytes with a budget below the need; at real image sizes.

    python benchmarks/memory.py --networks resnet18 mobilenet_v2

Each network of ``aquant_core.architectures`` has random weights and random images of 224 x 224; a few iterations a
block, since memory does not depend on their number. It is quantized twice, each time in a fresh process: with ample
memory, and with a budget that leaves no room for block inputs, so that they go to mapped files. Results are added to
those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "memory.json"
NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "regnet_x_600mf", "regnet_x_3_2gf", "mnasnet2_0"]
SIZE = 224


def main() -> None:
    from record import command, commit

    from aquant_core.reporting import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--budgets", nargs="+", default=["ample", "none"], choices=["ample", "none"])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(quantize(options)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": {}}
    for network in options.networks:
        row: dict[str, Any] = {}
        for budget in options.budgets:
            argv = [sys.executable, __file__, "--networks", network, "--child", budget]
            for name in ("images", "iterations", "bits"):
                argv += [f"--{name}", str(getattr(options, name))]
            row[budget] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
        logits = {row[budget].pop("logits") for budget in options.budgets}
        if len(options.budgets) > 1:
            row["same_bytes"] = len(logits) == 1
        row |= {"images": options.images, "batch_size": 32, "versions": versions(), "commit": commit()}
        row |= {"command": command(), "threads": os.cpu_count()}
        results["networks"][network] = row
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        shares = [f"{budget} {row[budget]['measured'] / row[budget]['forecast']:.2f}" for budget in options.budgets]
        print(network, "measured / forecast:", *shares, "same bytes:", row.get("same_bytes"), flush=True)


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    """What the child does: the run's forecast and its measured peak, bytes of the process, by block."""
    import torch

    import aquant_core
    from aquant_core.architectures import build

    network, generator = options.networks[0], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build(network).eval()
    images = torch.randn(options.images, 3, SIZE, SIZE, generator=generator)
    config = aquant_core.QuantizationConfig(
        weight_bits=options.bits, activation_bits=options.bits, iterations=options.iterations, sensitivity=False
    )
    with tempfile.TemporaryDirectory() as folder:
        memory = None if options.child == "ample" else 0
        report = aquant_core.quantize(
            model, images, config, resources=aquant_core.Resources(memory_bytes=memory, folder=Path(folder))
        ).report
    expected = {block["name"]: block for block in report["forecast"]["blocks"]}
    blocks = [
        {
            "name": block["name"],
            "forecast": expected[block["name"]]["peak_bytes"],
            "measured": block["peak_bytes"],
            "placement": block["placement"],
            "seconds_forecast": expected[block["name"]]["seconds"],
            "seconds": block["seconds"],
        }
        for block in report["blocks"]
    ]
    return {
        "forecast": max(block["forecast"] for block in blocks),
        "measured": max(block["measured"] for block in blocks),
        "placements": sorted({block["placement"] for block in blocks}),
        "seconds": report["seconds"],
        "logits": report["digests"]["logits"],
        "blocks": blocks,
    }


if __name__ == "__main__":
    main()
