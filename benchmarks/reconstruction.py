"""What an iteration of reconstruction costs, block by block: time, memory, and how much of it is matrix product.

    python benchmarks/reconstruction.py --networks residual inverted_residual

Each block is learned for a few iterations of a whole schedule by ``aquant_no_border``, by ``aquant``, and by ``aquant``
on the plain torch reference, in turns within one run; times are medians over the rounds, to be read as ratios. Example
nets come from ``examples/fashion_mnist``; ``depthwise`` is a chain of depthwise layers, each a block; any name of
``aquant_core.architectures`` serves, too. Both have random weights and random images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

import aquant_core
from aquant_core.caches import BlockCache, Cache
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import CapturedModel
from aquant_core.methods import METHODS, PRESETS
from aquant_core.model import QuantizedModel, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.reconstruction import Schedule, reconstruct_block
from aquant_core.resources import PeakMemory
from cupy_kernels.ops import reference_only

EXAMPLES = Path(__file__).parent.parent / "examples" / "fashion_mnist"
VARIANTS: dict[str, tuple[Method, bool]] = {
    "aquant_no_border": ("aquant_no_border", False),
    "aquant": ("aquant", False),
    "aquant_reference": ("aquant", True),
}
"""Name -> method, and whether the plain torch reference computes."""
REFERENCE_ITERATIONS = 5
"""The reference is slow, and its ratio large: one round of these."""
PROFILED_ITERATIONS = 20
PRODUCTS = ("bmm", "mm", "addmm", "baddbmm", "convolution", "convolution_backward", "mkldnn_convolution", "cudnn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["residual", "inverted_residual"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU")
    parser.add_argument("--iterations", type=int, default=20, help="of a whole schedule, by block and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--blocks", nargs="+", default=None, help="only these blocks")
    parser.add_argument("--out", type=Path, default=None, help="by default results/reconstruction_DEVICE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    out: Path = options.out or RESULTS / f"reconstruction_{device.type}.json"
    settings = {"iterations": options.iterations, "rounds": options.rounds, "bits": "W2A2", "seed": 0}
    results: dict[str, Any] = {"about": about(device, **settings), "networks": {}}
    for network in options.networks:
        rows = results["networks"][network] = []
        for model, block, cache in blocks_of(network, device):
            if options.blocks is None or block.name in options.blocks:
                rows.append(measure(model, block, cache, options))
                print(row_of_table(network, rows[-1]), flush=True)
        results["extrapolated"] = results.get("extrapolated", {}) | {network: extrapolated(rows)}
        write(out, results)


def extrapolated(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds that the paper's 20,000 iterations of every block would take at the measured pace; not a measurement."""
    named = [name for name in VARIANTS if all(name in row for row in rows)]
    return {name: round(sum(20 * row[name]["milliseconds"] for row in rows), 1) for name in named}


def blocks_of(network: str, device: torch.device) -> list[tuple[QuantizedModel, Block, BlockCache]]:
    """Each block that has layers, with its float inputs and targets; nothing has been learned yet."""
    graph, images = load(network)
    graph = graph.to(device)
    model = quantize_to_nearest(graph, images, QuantizationConfig(weight_bits=2, activation_bits=2))
    found, value = [], images.to(device)
    with torch.no_grad():
        for block in partition(graph):
            target = run_float_block(graph, block, value)
            if block.layers:
                found.append((model, block, BlockCache(*(Cache.of(t, device) for t in (value, value, target)))))
            value = target
    return found


def load(network: str) -> tuple[CapturedModel, torch.Tensor]:
    """A folded float network and 64 images for it."""
    path = EXAMPLES / f"{network}.onnx"
    if path.exists():
        images = aquant_core.read_images(EXAMPLES / "calibration.npz").images[:64]
        return fold_batch_norm(aquant_core.capture(path, example=images[:2])), images
    torch.manual_seed(0)
    if network == "depthwise":
        layers = [nn.Conv2d(96, 96, 3, stride, 1, groups=96) for stride in (1, 2, 1)]
        chain = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        images = torch.randn(64, 96, 28, 28)
        return fold_batch_norm(aquant_core.capture(chain.eval(), example=images[:2])), images
    images = torch.randn(64, 3, 224, 224)
    from aquant_core.architectures import build

    return fold_batch_norm(aquant_core.capture(build(network).eval(), example=images[:2])), images


def measure(model: QuantizedModel, block: Block, cache: BlockCache, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per iteration, peak memory above the start, share of matrix products; by variant."""
    iterations = {name: REFERENCE_ITERATIONS if VARIANTS[name][1] else options.iterations for name in options.variants}
    learn = {name: learner(name, model, block, cache, iterations[name]) for name in options.variants}
    shorter = {name: min(count, PROFILED_ITERATIONS) for name, count in iterations.items()}
    times: dict[str, list[float]] = {name: [] for name in learn}
    row: dict[str, Any] = {
        "block": block.name,
        "layers": [list(weight_shape(model, node.name)) for node in block.layers],
    }
    for name, run in learn.items():
        run()  # compiles, warms up
        peak = PeakMemory(cache.noised.device)
        run()
        row[name] = {
            "iterations": iterations[name],
            "peak_bytes": peak.read() - peak.start,
            "product_share": round(product_share(learner(name, model, block, cache, shorter[name]), peak), 3),
        }
    for number in range(options.rounds):
        for name, run in learn.items():
            if number == 0 or not VARIANTS[name][1]:
                times[name].append(1e3 * run() / iterations[name])
    for name, measured in times.items():
        row[name]["milliseconds"] = round(statistics.median(measured), 2)
        row[name]["fastest"] = round(min(measured), 2)
    if {"aquant", "aquant_no_border"} <= set(times):
        ratios = [one / other for one, other in zip(times["aquant"], times["aquant_no_border"], strict=True)]
        row["ratio"] = round(statistics.median(ratios), 2)
    return row


def weight_shape(model: QuantizedModel, layer: str) -> torch.Size:
    return model.layers[layer].float_weight.shape


def learner(name: str, model: QuantizedModel, block: Block, cache: BlockCache, iterations: int) -> Any:
    """A function that learns a fresh copy of the block and returns the seconds it took."""
    method, by_reference = VARIANTS[name]
    schedule = Schedule(METHODS[method], replace(PRESETS["fast"], iterations=iterations), BorderConfig())

    def run() -> float:
        fresh = copy.copy(model)
        fresh.layers = model.layers | {node.name: copy.deepcopy(model.layers[node.name]) for node in block.layers}
        generator = torch.Generator(cache.noised.device).manual_seed(0)
        with reference_only() if by_reference else contextlib.nullcontext():
            synchronize(cache.noised.device)
            started = time.perf_counter()
            reconstruct_block(fresh, block, cache, schedule, generator, lambda *_: None)
            synchronize(cache.noised.device)
            return time.perf_counter() - started

    return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_share(run: Any, peak: PeakMemory) -> float:
    """Share of the operators' own time that matrix products and convolutions take."""
    on_gpu = peak.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        run()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    own = {event.key: getattr(event, attribute) for event in recorded.key_averages()}
    products = sum(time for name, time in own.items() if is_product(name))
    return products / max(sum(own.values()), 1e-9)


def is_product(name: str) -> bool:
    """By the operator's name on a CPU, by the kernel's on a GPU."""
    return name.removeprefix("aten::") in PRODUCTS or any(
        word in name for word in ("gemm", "xmma", "cutlass", "conv2d")
    )


def row_of_table(network: str, row: dict[str, Any]) -> str:
    found = [row[name] for name in VARIANTS if name in row]
    cells = [f"{one['milliseconds']:.1f} ms, {one['peak_bytes'] / 2**20:.0f} MiB" for one in found]
    return " | ".join([network, row["block"], *cells, f"ratio {row.get('ratio', '-')}"])


if __name__ == "__main__":
    main()
