"""Bytes of a checkpoint on disk, part by part, for the paper's six architectures at W2A2.

    python benchmarks/checkpoint_size.py

Writes ``benchmarks/results/checkpoint_size.json``. First and last layer at 8 bits, three border parameters a position,
in fp16 and in 8 bits. Weights are random and steps are not searched, since no size depends on them. ``float32`` counts
the network's weights, norms and their statistics as they were before folding; ``ideal`` is bits times weights, and
nothing else.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write

from aquant_core import QuantizationConfig, capture, checkpoint_torch
from aquant_core.architectures import build
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.model import QuantizedModel, bits_of_layers
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code
from aquant_core.reporting import versions

ARCHITECTURES = ["resnet18", "resnet50", "mobilenet_v2", "regnet_x_600mf", "regnet_x_3_2gf", "mnasnet2_0"]
PARTS = {
    "weight": "codes", "border": "borders", "weight_scale": "steps and zero-points",
    "weight_zero_point": "steps and zero-points", "input_scale": "steps and zero-points", "bias": "biases",
}  # fmt: skip


def quantized(graph: CapturedModel, config: QuantizationConfig) -> QuantizedModel:
    """The network with every part a finished one has; its values mean nothing."""
    model = QuantizedModel(graph)
    for name, (weight_bits, activation_bits) in bits_of_layers(graph, config).items():
        layer, weight = model.layers[name], graph.weights[name]["weight"]
        levels = largest_code(weight_bits)
        scale = (weight.flatten(1).abs().amax(1, keepdim=True) * 2 / levels).clamp(min=1e-8)  # (O, 1)
        grid = UniformGrid(scale, torch.full_like(scale, levels // 2), levels)
        layer.weight, layer.weight_bits = WeightRounding.nearest(weight, grid), weight_bits
        step = UniformGrid(torch.tensor(0.1), torch.tensor(0.0), largest_code(activation_bits))
        layer.quantize_activation(step, activation_bits)
        border = layer.add_border(config.border)
        torch.nn.init.normal_(border.coefficients)
        border.round_to_stored()
    return model


def measure(graph: CapturedModel, bits: int, folder: Path) -> dict[str, Any]:
    """Bytes of the file and of its parts; ``ideal`` is the codes' bits alone."""
    config = QuantizationConfig(weight_bits=2, activation_bits=2, preset="paper", border={"bits": bits})
    model = quantized(graph, config)
    path = folder / "quantized.safetensors"
    about = {"config": config.model_dump(mode="json"), "seed": 0, "versions": versions()}
    checkpoint_torch.save(model, path, about | {"digests": dict.fromkeys(("model", "calibration", "logits"), "0" * 64)})
    parts = Counter({"header": 8 + int.from_bytes(path.read_bytes()[:8], "little")})
    for name, tensor in checkpoint_torch.tensors_of(model).items():
        parts[PARTS[name.rsplit(".", 1)[1]]] += tensor.nbytes
    size = path.stat().st_size
    assert sum(parts.values()) == size, "every byte is counted"
    ideal = sum(layer.weight_bits * layer.float_weight.numel() for layer in model.layers.values())
    return {"layers": len(model.layers), "bytes": size, "parts": dict(parts), "ideal": math.ceil(ideal / 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_size.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"about": about(torch.device("cpu"), bits="W2A2", first_last_bits=8), "networks": {}}
    for name in options.architectures:
        captured = capture(build(name), example=torch.rand(1, 3, 64, 64))
        graph, row = fold_batch_norm(captured), {"float32": captured.float_bytes()}
        with tempfile.TemporaryDirectory() as folder:
            for bits in (16, 8):
                found = measure(graph, bits, Path(folder))
                row[f"{bits}-bit borders"] = found
                print(
                    f"{name}, {bits}-bit borders: {found['bytes']:,} bytes, 1/{row['float32'] / found['bytes']:.2f} of "
                    f"float32, {found['bytes'] / found['ideal']:.3f} times the ideal; {found['parts']}",
                    flush=True,
                )
        results["networks"][name] = row
    write(options.out, results)


if __name__ == "__main__":
    main()
