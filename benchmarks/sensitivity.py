"""Does a layer that is raised gain what the report says? Re-runs the layers that a report names first, raised.

    python benchmarks/sensitivity.py --seeds 0 1 2

Every example network is quantized to W2A2; then the report's first layers are given their ``raised_bits``, one at a
time, and the whole network is quantized again with the same seed. The gain is top-1 on the example's 2,000 test images.
What is in ``benchmarks/results/sensitivity.json`` is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write

import aquant_core
from aquant_core.config import LayerOverride, QuantizationConfig
from aquant_core.progress import Progress

EXAMPLES = Path(__file__).parent.parent / "examples"
NETWORKS = {"residual": "fashion_mnist", "inverted_residual": "fashion_mnist", "plain": "digits"}
FILE = RESULTS / "sensitivity.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--layers", type=int, default=1, help="how many of a report's layers are re-run")
    parser.add_argument("--iterations", type=int, help="steps per block, if not the preset's")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(FILE.read_text())["runs"] if FILE.exists() else {}
    for network, seed in itertools.product(options.networks, options.seeds):
        config = QuantizationConfig.model_validate(
            {"weight_bits": 2, "activation_bits": 2, "iterations": options.iterations, "seed": seed}
        )
        key = f"{network}, {options.iterations or 'preset fast'} iterations, {options.images} images, seed {seed}"
        if key not in results:
            results[key] = {"network": network, **first_run(network, config, options.images), "raised": {}}
            keep(results)
        entry = results[key]
        for layer in entry["sensitivity"]["layers"][: options.layers]:
            if layer["layer"] not in entry["raised"]:
                entry["raised"][layer["layer"]] = raised_run(network, config, options.images, layer, entry)
                keep(results)


def first_run(network: str, config: QuantizationConfig, images: int) -> dict[str, Any]:
    """The network as it is asked for, and its report's sensitivities."""
    seen: dict[str, float] = {}

    def tell(progress: Progress) -> None:
        seen.setdefault(progress.stage, time.monotonic())

    report = quantize(network, config, images, on_progress=tell)
    seconds = time.monotonic() - seen["sensitivity"]
    return {
        **about(torch.device("cpu"), images=images, config=report["config"], seed=report["seed"]),
        "accuracy": report["accuracy"],
        "bytes": report["size"]["quantized_bytes"],
        "seconds": {"run": report["seconds"], "sensitivity": round(seconds, 3)},
        "sensitivity": report["sensitivity"],
    }


def raised_run(
    network: str, config: QuantizationConfig, images: int, layer: dict[str, Any], first: dict[str, Any]
) -> dict[str, Any]:
    """The network with one layer raised, against what was said of it."""
    weight_bits, activation_bits = layer["raised_bits"]
    override = LayerOverride(weight_bits=weight_bits, activation_bits=activation_bits)
    layers = {layer["layer"]: override}
    report = quantize(network, config.model_copy(update={"layers": layers, "sensitivity": False}), images)
    gain = report["accuracy"]["quantized"]["top1"] - first["accuracy"]["quantized"]["top1"]
    low, high = layer["interval"]
    result = {
        "said": layer["gain"],
        "interval": layer["interval"],
        "gained": round(gain, 6),
        "within": low <= gain <= high,
        "bytes_said": layer["cost_bytes"],
        "bytes": report["size"]["quantized_bytes"] - first["bytes"],
    }
    print(network, layer["layer"], result, flush=True)
    return result


def quantize(network: str, config: QuantizationConfig, images: int, **how: Any) -> dict[str, Any]:
    """The report of a run on the example's images."""
    folder = EXAMPLES / NETWORKS[network]
    calibration = aquant_core.ImageSet(aquant_core.read_images(folder / "calibration.npz").images[:images])
    model, evaluation = folder / f"{network}.onnx", folder / "evaluation.npz"
    return aquant_core.quantize(model, calibration, config, evaluation, **how).report


def keep(results: dict[str, Any]) -> None:
    """Writes what there is, and how often the interval held."""
    tried = [layer for entry in results.values() for layer in entry["raised"].values()]
    held = sum(layer["within"] for layer in tried)
    write(FILE, {"raised": len(tried), "within_the_interval": held, "runs": results})


if __name__ == "__main__":
    main()
