"""Whole networks on integers, side by side with float and with rounding to nearest.

    python benchmarks/inference.py --networks resnet18 mobilenet_v2

Networks of ``aquant_core.architectures`` with random weights, each quantized to nearest (W2A2, first and last layer at
8 bits) and given borders drawn at random: speed does not depend on what was learned. Variants run in turns within one
run; each is captured as a CUDA graph, so that the host has no share. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, in_turns, ratio, replayable, write

import aquant_core
from aquant_core.architectures import build
from aquant_core.config import BorderConfig, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.model import QuantizedModel, quantize_to_nearest
from aquant_core.runtime import IntegerModel

BORDERS: dict[str, BorderConfig | None] = {
    "nearest": None,
    "border, fusion none": BorderConfig(fusion="none"),
    "border, fusion none, by channel": BorderConfig(fusion="none", granularity="channel"),
    "border, channel_mean": BorderConfig(),
}
BORDER_SPREAD = 0.3
"""Standard deviation of the random coefficients: near what is learned, and thresholds exist."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None, help="by default results/inference_DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    settings = {key: getattr(options, key) for key in ("batch", "size", "bits", "rounds", "repeats")}
    results: dict[str, Any] = {"about": about(device, **settings, seed=0), "networks": {}}
    for network in options.networks:
        results["networks"][network] = measure(network, device, options)
        write(options.out or RESULTS / f"inference_{device.type}.json", results)


def measure(network: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a batch and ratios, by variant."""
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    graph = fold_batch_norm(aquant_core.capture(build(network).eval(), example=images[:2])).to(device)
    config = QuantizationConfig(weight_bits=options.bits, activation_bits=options.bits)
    nearest = quantize_to_nearest(graph, images[:8], config)
    runs = float_variants(graph, images, device)
    for name, border in BORDERS.items():
        runs[name] = integer_variant(with_border(nearest, border), images, device)
    times = in_turns(runs, device, options.rounds, options.repeats)
    row = {
        name: {
            "microseconds": round(statistics.median(measured), 1),
            "fastest": round(min(measured), 1),
            "over_nearest": round(ratio(times, name, "nearest"), 4),
            "over_float16": round(ratio(times, name, "float16, channels last"), 4),
        }
        for name, measured in times.items()
    }
    for name, found in row.items():
        print(
            f"{network} | {name} | {found['microseconds']:.0f} us | {found['over_nearest']:.3f} of nearest", flush=True
        )
    return row


def with_border(model: QuantizedModel, border: BorderConfig | None) -> QuantizedModel:
    """A copy whose quantized inputs have borders of random coefficients."""
    if border is None:
        return model
    generator = torch.Generator(next(iter(model.layers.values())).float_weight.device).manual_seed(1)
    model = copy.deepcopy(model)
    for layer in model.layers.values():
        layer.add_border(border)
        assert layer.border is not None
        with torch.no_grad():
            layer.border.coefficients.normal_(0, BORDER_SPREAD, generator=generator)
        layer.border.round_to_stored()
    return model


def float_variants(graph: CapturedModel, images: torch.Tensor, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The folded float network in torch: fp32, and fp16 with the channels last."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, dtype, layout in (
        ("float32", torch.float32, torch.contiguous_format),
        ("float16, channels last", torch.float16, torch.channels_last),
    ):
        moved = graph.to(device)
        for tensors in moved.weights.values():
            for kind, tensor in tensors.items():
                cast = tensor.to(dtype)
                tensors[kind] = cast.contiguous(memory_format=layout) if cast.dim() == 4 else cast
        x = images.to(device, dtype).contiguous(memory_format=layout)
        runs[name] = replayable(lambda moved=moved, x=x: moved(x), device)
    return runs


def integer_variant(model: QuantizedModel, images: torch.Tensor, device: torch.device) -> Callable[[], Any]:
    """The quantized network in fp16 between the layers."""
    network = IntegerModel(model, device, torch.float16)
    x = images.to(device, torch.float16).contiguous(memory_format=torch.channels_last)
    return replayable(lambda: network(x), device)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main()
