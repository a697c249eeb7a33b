"""Each kernel by itself on the layers of ResNet-18: microseconds, GB/s, and the floor by memory.

    python benchmarks/kernels.py

Integer inference (fp16, batch 32): the layer as im2col to int8 and a library's product, and as implicit GEMM, each with
rounding to nearest, with the border without fusion and with the channel's mean. Training (fp32): the border's forward
and backward beside torch.compile's fusion of the plain torch reference, with gradients of everything. "floor" is the
time to read the inputs and write the outputs once at ``--copy-rate``, which is measured first where it is not given.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, in_turns, ratio, replayable, write

from cupy_kernels import ops, reference
from cupy_kernels.packing import PackedLayer, Route, pack
from cupy_kernels.specification import BorderSpecification, Window

LAYERS: dict[str, tuple[int, int, int, Window]] = {
    "conv1": (3, 64, 224, Window((7, 7), (2, 2), (3, 3))),
    "layer1": (64, 64, 56, Window((3, 3), padding=(1, 1))),
    "layer2": (128, 128, 28, Window((3, 3), padding=(1, 1))),
    "layer2 shortcut": (64, 128, 56, Window((1, 1), (2, 2))),
    "layer3": (256, 256, 14, Window((3, 3), padding=(1, 1))),
    "layer4": (512, 512, 7, Window((3, 3), padding=(1, 1))),
}
"""Input channels, output channels, size of the input, window."""
LEVELS = 3
SPREAD = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divide the layers' sizes by this, to rehearse")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--copy-rate", type=float, default=None, help="bytes a second that a copy reads and writes")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--training-layers", nargs="*", default=["layer1", "layer3"], choices=LAYERS)
    parser.add_argument("--out", type=Path, default=None, help="by default results/kernels_DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    rate = options.copy_rate or copy_rate(device)
    settings = {key: getattr(options, key) for key in ("batch", "shrink", "rounds", "repeats")}
    results: dict[str, Any] = {"about": about(device, **settings, copy_bytes_per_second=rate, seed=0), "layers": {}}
    # Training last: torch.compile takes its time.
    for measure, layers in ((inference, options.layers), (training, options.training_layers)):
        for name in layers:
            found = measure(name, device, options, rate)
            results["layers"].setdefault(name, {})[measure.__name__] = found
            for variant, numbers in found.items():
                print(f"{name} | {measure.__name__} | {variant} | {numbers}", flush=True)
            write(options.out or RESULTS / f"kernels_{device.type}.json", results)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, device, 5, 5)["copy"]
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def problem(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Inputs of one layer: half of them 0 as after a ReLU, a border near what is learned."""
    channels, out_channels, size, window = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, channels, size // options.shrink, size // options.shrink, generator=generator)
    border = SPREAD * torch.randn(3, channels, window.positions, generator=generator)
    return {
        "x": x.relu_().to(device),
        "scale": torch.tensor(0.5, device=device),
        "border": border.half().float().to(device),
        "window": window,
        "codes": torch.randint(0, LEVELS + 1, (out_channels, channels, *window.kernel_size), generator=generator),
    }


def inference(name: str, device: torch.device, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The layer on integers by each route and rounding."""
    given = problem(name, device, options)
    x = given["x"].half().contiguous(memory_format=torch.channels_last)
    layers: dict[str, PackedLayer] = {}
    outputs = {}
    routes: list[Route] = (
        ["columns", "implicit"] if device.type == "cuda" and ops.kernels_available(device) else ["reference"]
    )
    for route in routes:
        if route == "implicit" and x.shape[1] < 16:
            continue
        for rounding, fused in (("nearest", False), ("fusion none", False), ("channel_mean", True)):
            spec = BorderSpecification(LEVELS, fused=fused and given["window"].positions > 1)
            layer = packed(route, given, spec, None if rounding == "nearest" else given["border"])
            layers[f"{route}, {rounding}"] = layer
            if layer.thresholds is not None:  # the same without them
                layers[f"{route}, {rounding}, evaluated"] = replace(layer, thresholds=None)
    runs: dict[str, Callable[[], Any]] = {}
    for variant, layer in layers.items():
        outputs[variant] = ops.integer_convolution(x, layer, relu=True)
        runs[variant] = replayable(lambda layer=layer: ops.integer_convolution(x, layer, relu=True), device)
    times = in_turns(runs, device, options.rounds, options.repeats)
    out = next(iter(outputs.values()))
    moved = 2 * (x.numel() + out.numel()) + given["codes"].numel()
    return rows(times, moved, rate, lambda variant: f"{variant.split(', ')[0]}, nearest")


def packed(route: Route, given: dict[str, Any], spec: BorderSpecification, border: torch.Tensor | None) -> PackedLayer:
    codes, device = given["codes"], given["x"].device
    outputs = len(codes)
    layer = pack(
        route, codes, torch.full((outputs,), 0.02), torch.ones(outputs), LEVELS, torch.zeros(outputs),
        given["scale"].cpu(), None if border is None else border.cpu(), None, given["window"], 1, spec, torch.float16,
    )  # fmt: skip
    return layer.to(device)


def training(name: str, device: torch.device, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Forward and backward of the border, fused in one kernel each, and as torch.compile fuses the reference."""
    given = problem(name, device, options)
    x, scale, border, window = given["x"], given["scale"], given["border"], given["window"]
    spec = BorderSpecification(LEVELS, fused=window.positions > 1)
    rounding = torch.tensor(0.5, device=device)
    arguments = (x, scale, border, None, window, spec, rounding)
    with torch.no_grad():
        columns = reference.forward(*arguments)
    grad = torch.randn_like(columns)
    kernels = ops.implementation(x)
    compiled_forward = torch.compile(reference.forward, dynamic=False)
    compiled_backward = torch.compile(reference.backward, dynamic=False)
    runs: dict[str, Callable[[], Any]] = {}
    for direction, ours, theirs, given_first in (
        ("forward", kernels.forward, compiled_forward, ()),
        ("backward", kernels.backward, compiled_backward, (grad,)),
    ):
        runs[f"{direction}, fused"] = replayable(lambda f=ours, g=given_first: f(*g, *arguments), device)
        runs[f"{direction}, torch.compile"] = replayable(lambda f=theirs, g=given_first: f(*g, *arguments), device)
    with torch.no_grad():
        times = in_turns(runs, device, options.rounds, max(options.repeats // 4, 1))
    forward_bytes = 4 * (x.numel() + columns.numel())
    found = rows({k: v for k, v in times.items() if k.startswith("forward")}, forward_bytes, rate, _compiled)
    return found | rows(
        {k: v for k, v in times.items() if k.startswith("backward")}, forward_bytes + 4 * x.numel(), rate, _compiled
    )


def _compiled(variant: str) -> str:
    return f"{variant.split(', ')[0]}, torch.compile"


def rows(times: dict[str, list[float]], moved: int, rate: float, compared_with: Callable[[str], str]) -> dict[str, Any]:
    """Times, achieved GB/s over the bytes that must move, the floor, and the ratio to what each is compared with."""
    return {
        variant: {
            "microseconds": round(statistics.median(measured), 2),
            "floor_microseconds": round(1e6 * moved / rate, 2),
            "gigabytes_per_second": round(moved / statistics.median(measured) / 1e3, 1),
            "ratio": round(ratio(times, variant, compared_with(variant)), 4),
        }
        for variant, measured in times.items()
    }


if __name__ == "__main__":
    main()
