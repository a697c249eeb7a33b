"""How small does the search for a target make the example networks, against networks of one width?

    python benchmarks/targets.py --drops 0.5 1 2

Every network is quantized at uniform widths (W2A2, W3A3, W4A4; first and last layer 8 bits, as in every run), and
searched for each drop. Drops are in points of top-1 on the example's 2,000 test images, sizes are the bytes of the
checkpoint's tensors. What is in ``benchmarks/results/targets.json`` is not run again; the searches of one network take
the blocks that they share from ``--folder``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write
from sensitivity import NETWORKS, quantize

from aquant_core.config import QuantizationConfig

FILE = RESULTS / "targets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--drops", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--uniform", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--iterations", type=int, help="steps per block, if not the preset's")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="where finished blocks are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for network in options.networks:
        key = f"{network}, {options.iterations or 'preset fast'} iterations, {options.images} images"
        entry = results.setdefault(key, {"network": network, "uniform": {}, "searched": {}})
        plain = {"iterations": options.iterations, "sensitivity": False}
        for bits in options.uniform:
            if f"W{bits}A{bits}" not in entry["uniform"]:
                config = plain | {"weight_bits": bits, "activation_bits": bits}
                entry["uniform"][f"W{bits}A{bits}"] = measured(network, config, options)
                write(FILE, results)
        for drop in options.drops:
            if f"{drop:g}" not in entry["searched"]:
                config = plain | {"target": {"max_accuracy_drop": drop}}
                entry["searched"][f"{drop:g}"] = measured(network, config, options)
                write(FILE, results)


def measured(network: str, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A run's size and drop, and how they were measured."""
    name = f"{network}-{options.iterations}-{options.images}"
    folder = options.folder / name if "target" in config else None
    checked = QuantizationConfig.model_validate(config)
    report = quantize(network, checked, options.images, resume_from=folder)
    accuracy = report["accuracy"]
    result = {
        "drop": round(100 * (accuracy["float"]["top1"] - accuracy["quantized"]["top1"]), 3),
        "bytes": report["size"]["quantized_bytes"],
        "target": report["target"],
        "seconds": report["seconds"],
        **about(torch.device("cpu"), images=options.images, config=report["config"], seed=report["seed"]),
    }
    found = "" if result["target"] is None else f", held: {result['target']['held']}"
    print(f"{network} {config}: {result['bytes']} bytes, drop {result['drop']}{found}", flush=True)
    return result


if __name__ == "__main__":
    main()
