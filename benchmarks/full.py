"""One network quantized from beginning to end as the paper sets it, and how long each part took.

    python benchmarks/full.py --network resnet18 --preset paper

A network of ``aquant_core.architectures`` with random weights and 1,024 random images of 224 x 224 (time depends on
neither), or an example net with its calibration images and its accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from record import RESULTS, about, write

import aquant_core
from aquant_core.architectures import build
from aquant_core.config import Method, PresetName, QuantizationConfig
from aquant_core.resources import Resources

EXAMPLES = Path(__file__).parent.parent / "examples" / "fashion_mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--method", default="aquant", choices=get_args(Method))
    parser.add_argument("--preset", default="paper", choices=get_args(PresetName))
    parser.add_argument("--iterations", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="by default results/full_NETWORK_DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = QuantizationConfig(
        method=options.method,
        weight_bits=options.bits,
        activation_bits=options.bits,
        preset=options.preset,
        iterations=options.iterations,
        sensitivity=False,
    )
    example = EXAMPLES / f"{options.network}.onnx"
    if example.exists():
        given: Any = example
        images = aquant_core.read_images(EXAMPLES / "calibration.npz")
        evaluation = aquant_core.read_images(EXAMPLES / "evaluation.npz", what="evaluation")
    else:
        torch.manual_seed(0)
        given, evaluation = build(options.network).eval(), None
        images = aquant_core.ImageSet(torch.randn(options.images, 3, options.size, options.size))
    resources = Resources(device=device)
    report = aquant_core.quantize(given, images, config, evaluation, resources=resources).report
    settings = {name: getattr(options, name) for name in ("network", "method", "preset", "iterations", "bits")}
    kept = ("seconds", "preset", "forecast", "blocks", "digests", "accuracy", "fidelity", "seed")
    results = {"about": about(device, **settings, images=len(images.images)), **{k: report.get(k) for k in kept}}
    write(options.out or RESULTS / f"full_{options.network}_{device.type}.json", results)
    where = results["about"]["device"]
    print(f"{options.network} | {options.method} {options.preset} | {report['seconds']:.0f} s on {where}")


if __name__ == "__main__":
    main()
