"""How far a network on integers decides as its simulation does, by the type of the values between the layers.

    python benchmarks/agreement.py --networks residual

The example nets at W2A2, quantized by the ``smoke`` preset, on the labelled test images of ``examples/fashion_mnist``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write
from torch import Tensor

import aquant_core
from aquant_core.resources import Resources

EXAMPLES = Path(__file__).parent.parent / "examples" / "fashion_mnist"
BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["residual"])
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="by default results/agreement_DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    evaluation = aquant_core.read_images(EXAMPLES / "evaluation.npz", what="evaluation")
    assert evaluation.labels is not None
    config = aquant_core.QuantizationConfig(weight_bits=2, activation_bits=2, preset=options.preset)
    settings = {"preset": options.preset, "bits": "W2A2", "images": len(evaluation.images), "seed": config.seed}
    results: dict[str, Any] = {"about": about(device, **settings), "networks": {}}
    for network in options.networks:
        model = aquant_core.quantize(
            EXAMPLES / f"{network}.onnx", EXAMPLES / "calibration.npz", config, resources=Resources(device)
        ).model
        simulated = decisions(model, evaluation.images.to(device))
        row = results["networks"][network] = {"simulation": {"top1": share(simulated, evaluation.labels)}}
        for dtype in (torch.float32, torch.float16):
            found = decisions(aquant_core.IntegerModel(model, device, dtype), evaluation.images)
            row[str(dtype).removeprefix("torch.")] = {
                "as_simulated": share(found, simulated),
                "top1": share(found, evaluation.labels),
            }
        print(network, row, flush=True)
        write(options.out or RESULTS / f"agreement_{device.type}.json", results)


def decisions(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1).cpu() for part in images.split(BATCH)])


def share(found: Tensor, wanted: Tensor) -> float:
    return round(float((found == wanted).double().mean()), 4)


if __name__ == "__main__":
    main()
