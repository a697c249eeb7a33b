"""The exported network in onnxruntime on the CPU beside its float network: milliseconds and ratios within one run.

    python benchmarks/export.py

Networks with random weights, rounded to nearest, with borders by channel drawn at random: speed does not depend on
what was learned. The float network is written by the same exporter, BatchNorm folded. Variants run in turns, so that
whatever else the machine does meets all of them; ratios are medians over the rounds, with their quartiles. Then where
the time goes, by operator; single convolutions in every integer form that onnxruntime has, which is what the
exporter's choice rests on; and ways from a layer's sums to the next one's codes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from export_exactness import EXAMPLES, NETWORKS
from inference import with_border
from onnx import TensorProto, helper, numpy_helper
from record import RESULTS, about, write

import aquant_core
from aquant_core.architectures import build
from aquant_core.config import BorderConfig, QuantizationConfig
from aquant_core.export_onnx import onnx_model
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT
from aquant_core.model import QuantizedModel, quantize_to_nearest
from aquant_core.onnx_agreement import open_session

BY_CHANNEL = BorderConfig(fusion="none", granularity="channel")
SIZE = 224
CELLS = ((1, 1), (32, 1), (1, 2), (32, 2))
"""Images a batch, threads."""
BITS = {"resnet18": (2, 4, 8), "mobilenet_v2": (2,), **dict.fromkeys(NETWORKS, (2,))}
SECONDS, FEWEST, MOST = 1.0, 5, 20
"""Of one variant's runs of a cell, and how many runs that may be."""

CONVOLUTIONS = (
    # images, channels, size, outputs, kernel, stride, groups
    (1, 64, 56, 64, 3, 1, 1),
    (1, 256, 14, 256, 3, 1, 1),
    (8, 128, 28, 128, 3, 1, 1),
    (1, 64, 56, 128, 1, 1, 1),
    (1, 3, 224, 64, 7, 2, 1),
    (1, 96, 28, 96, 3, 1, 4),
    (1, 144, 56, 144, 3, 1, 144),
    (8, 144, 56, 144, 3, 1, 144),
)

STAGES = (
    # channels, size, bits
    (64, 56, 2),
    (64, 56, 4),
    (256, 14, 2),
    (144, 56, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BITS))
    parser.add_argument("--out", type=Path, default=RESULTS / "export_cpu.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"about": about(torch.device("cpu"), seed=0, size=SIZE), "networks": {}}
    results["about"]["versions"]["onnxruntime"] = onnxruntime.__version__
    for network in options.networks:
        results["networks"][network] = of_network(network)
        write(options.out, results)
    results["operators"] = {name: of_operators(name) for name in options.networks if name not in NETWORKS}
    results["convolutions"] = [of_convolution(*shape) for shape in CONVOLUTIONS]
    results["stages"] = [of_stage(*stage) for stage in STAGES]
    write(options.out, results)


def of_network(network: str) -> list[dict[str, Any]]:
    """A row for each batch size, number of threads and variant."""
    files, images = exported(network, BITS.get(network, (2,)), max(batch for batch, _ in CELLS))
    rows = []
    for batch, threads in CELLS:
        feed = {INPUT: images[:batch].numpy()}
        sessions = {name: open_session(file, threads) for name, file in files.items()}
        runs = {name: lambda s=session, f=feed: s.run(None, f) for name, session in sessions.items()}
        for name, row in in_turns(runs, "float").items():
            rows.append({"batch": batch, "threads": threads, "variant": name, **row})
            print(network, rows[-1], flush=True)
    return rows


def exported(network: str, widths: tuple[int, ...], most: int) -> tuple[dict[str, onnx.ModelProto], torch.Tensor]:
    """The float network and its quantized variants, and up to ``most`` images."""
    torch.manual_seed(0)
    if network in NETWORKS:
        folder, file = NETWORKS[network]
        images = aquant_core.read_images(EXAMPLES / folder / "calibration.npz").images[:most]
        captured = aquant_core.capture(EXAMPLES / folder / file, example=images[:2])
    else:
        images = torch.randn(most, 3, SIZE, SIZE)
        captured = aquant_core.capture(build(network), example=images[:2])
    graph = fold_batch_norm(captured)
    files = {"float": onnx_model(QuantizedModel(graph).eval())}
    for bits in widths:
        nearest = quantize_to_nearest(graph, images[:8], QuantizationConfig(weight_bits=bits, activation_bits=bits))
        files[f"nearest, W{bits}A{bits}"] = onnx_model(nearest)
        files[f"border by channel, W{bits}A{bits}"] = onnx_model(with_border(nearest, BY_CHANNEL))
    return files, images


def of_operators(network: str) -> dict[str, dict[str, Any]]:
    """How often each operator is there once onnxruntime has rearranged the graph, and its milliseconds: one image, one
    thread, the least time of each node over the runs.
    """
    files, images = exported(network, (2,), 2)
    found: dict[str, dict[str, Any]] = {}
    for variant, file in files.items():
        with tempfile.TemporaryDirectory() as folder:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session = onnxruntime.InferenceSession(file.SerializeToString(), options, ["CPUExecutionProvider"])
            for _ in range(MOST):
                session.run(None, {INPUT: images[:1].numpy()})
            events = json.loads(Path(session.end_profiling()).read_text())
        least: dict[tuple[str, str], float] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["args"]["op_name"], event["name"]
                least[node] = min(least.get(node, math.inf), event["dur"] / 1e3)
        rows: dict[str, Any] = {"all": {"nodes": len(least), "milliseconds": round(sum(least.values()), 3)}}
        for op in sorted({op for op, _ in least}):
            times = [time for (kind, _), time in least.items() if kind == op]
            rows[op] = {"nodes": len(times), "milliseconds": round(sum(times), 3)}
        found[variant] = rows
        print(network, variant, rows["all"], flush=True)
    return found


def in_turns(runs: dict[str, Callable[[], Any]], base: str) -> dict[str, dict[str, Any]]:
    """Milliseconds by run, and over those of ``base`` in the same round: median and quartiles.

    On a machine that does other work, too, the processor's time (``cpu``) says more than the clock's, where there is
    one thread; with two, onnxruntime's threads spin while they wait.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    while len(times[base]) < FEWEST or (
        len(times[base]) < MOST and time.perf_counter() - started < SECONDS * len(runs)
    ):
        for name, run in runs.items():
            begun, used = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(1e3 * (time.process_time() - used))
            times[name].append(1e3 * (time.perf_counter() - begun))
    rows = {}
    for name in runs:
        row: dict[str, Any] = {"rounds": len(times[name])}
        for kind, found in (("", times), ("cpu_", cpu)):
            ratios = [one / other for one, other in zip(found[name], found[base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[f"{kind}milliseconds"] = round(statistics.median(found[name]), 3)
            row[f"{kind}fastest"] = round(min(found[name]), 3)
            row[f"{kind}over_float"] = round(middle, 3)
            row[f"{kind}quartiles"] = [round(low, 3), round(high, 3)]
        rows[name] = row
    return rows


def of_convolution(
    images: int, channels: int, size: int, outputs: int, kernel: int, stride: int, groups: int
) -> dict[str, Any]:
    """One convolution as float Conv and in integer forms, each from uint8 codes, one thread."""
    generator = np.random.default_rng(0)
    pad = kernel // 2
    attributes = {"kernel_shape": [kernel] * 2, "pads": [pad] * 4, "strides": [stride] * 2, "group": groups}
    x = generator.integers(0, 4, (images, channels, size, size)).astype(np.uint8)
    w = generator.integers(0, 4, (outputs, channels // groups, kernel, kernel))
    forms: dict[str, Callable[[], Any]] = {}
    float_node = [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)]
    forms["Conv, float"] = _single(float_node, {"w": w.astype(np.float32)}, x.astype(np.float32), TensorProto.FLOAT)
    for dtype in (np.uint8, np.int8):
        named = {"w": w.astype(dtype), "z": np.uint8(0), "w_z": dtype(0), "s": np.float32(1)}
        node = helper.make_node("ConvInteger", ["x", "w", "z", "w_z"], ["y"], **attributes)
        forms[f"ConvInteger, {dtype.__name__} weight"] = _single([node], named, x, TensorProto.INT32)
        inputs = ["x", "s", "z", "w", "s", "w_z", "s", "z"]
        node = helper.make_node("QLinearConv", inputs, ["y"], **attributes)
        forms[f"QLinearConv, {dtype.__name__} weight"] = _single([node], named, x, TensorProto.UINT8)
        if groups == 1:
            forms[f"MatMulInteger, {dtype.__name__} weight"] = _over_columns(x, w.astype(dtype), stride)
    row: dict[str, Any] = {"images": images, "channels": channels, "size": size, "outputs": outputs}
    row |= {"kernel": kernel, "stride": stride, "groups": groups, "forms": in_turns(forms, "Conv, float")}
    print({name: form["over_float"] for name, form in row["forms"].items()}, flush=True)
    return row


def of_stage(channels: int, size: int, bits: int) -> dict[str, Any]:
    """From the int32 sums of a layer to the codes of one that alone reads it, over a float 3 x 3 convolution between
    as many channels: through values, as the exporter does; by thresholds on the sums; by a table of all sums.
    """
    generator = np.random.default_rng(0)
    most = 9 * channels * (2**bits - 1) ** 2 // 2
    sums = generator.integers(-most // 4, most // 4, (1, channels, size, size)).astype(np.int32)
    borders = np.sort(generator.integers(-most // 4, most // 4, (2**bits - 1, 1, channels, 1, 1)).astype(np.int32), 0)
    by_channel = (1, channels, 1, 1)
    scaled = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["biased"]),
        helper.make_node("Relu", ["biased"], ["value"]),
    ]
    constants: dict[str, Any] = {"scale": np.full(by_channel, 1, np.float32), "bias": np.zeros(by_channel, np.float32)}
    values = {f"t{number}": border.astype(np.float32) for number, border in enumerate(borders)}
    looked_up = [
        helper.make_node("Clip", ["x", "low", "high"], ["within"]),
        helper.make_node("Add", ["within", "start"], ["place"]),
        helper.make_node("Gather", ["table", "place"], ["y"]),
    ]
    table = {
        "low": np.int32(-most),
        "high": np.int32(most),
        "start": (np.arange(channels, dtype=np.int32) * (2 * most + 1) + most).reshape(by_channel),
        "table": np.zeros(channels * (2 * most + 1), np.uint8),
    }
    weight = generator.standard_normal((channels, channels, 3, 3)).astype(np.float32)
    convolution = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    uint8 = TensorProto.UINT8
    forms = {
        "Conv, float": _single(convolution, {"w": weight}, sums.astype(np.float32), TensorProto.FLOAT),
        "values": _single([*scaled, *_counted("value", len(borders))], constants | values, sums, uint8),
        "sums": _single(
            _counted("x", len(borders)), {f"t{number}": border for number, border in enumerate(borders)}, sums, uint8
        ),
        "table": _single(looked_up, table, sums, uint8),
    }
    row: dict[str, Any] = {"channels": channels, "size": size, "bits": bits, "forms": in_turns(forms, "Conv, float")}
    print({name: form["over_float"] for name, form in row["forms"].items()}, flush=True)
    return row


def _counted(name: str, thresholds: int) -> list[onnx.NodeProto]:
    """How many thresholds a value is above."""
    nodes, above = [], []
    for number in range(thresholds):
        nodes.append(helper.make_node("Greater", [name, f"t{number}"], [f"above{number}"]))
        nodes.append(helper.make_node("Cast", [f"above{number}"], [f"one{number}"], to=TensorProto.UINT8))
        above.append(f"one{number}")
    total = above[0]
    for number, one in enumerate(above[1:], 1):
        following = "y" if number == thresholds - 1 else f"total{number}"
        nodes.append(helper.make_node("Add", [total, one], [following]))
        total = following
    return nodes


def _over_columns(x: np.ndarray, w: np.ndarray, stride: int) -> Callable[[], Any]:
    """As the exporter writes it: codes with the channels last, slices side by side, a matrix product and back."""
    pad, kernel = w.shape[2] // 2, w.shape[2]
    constants: dict[str, Any] = {
        "w": w.transpose(2, 3, 1, 0).reshape(-1, len(w)),
        "pads": np.array([0, pad, pad, 0] * 2),
        "axes": np.array([1, 2]),
        "steps": np.array([stride] * 2),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Pad", ["last", "pads"], ["padded"]),
    ]
    views = []
    for place in np.ndindex(kernel, kernel):
        names = [f"{kind}{place}" for kind in ("start", "end", "view")]
        constants[names[0]] = np.array(place)
        constants[names[1]] = np.array([at - (kernel - 1) or np.iinfo(np.int64).max for at in place])
        nodes.append(helper.make_node("Slice", ["padded", *names[:2], "axes", "steps"], [names[2]]))
        views.append(names[2])
    nodes.append(helper.make_node("Concat", views, ["columns"], axis=3))
    nodes.append(helper.make_node("MatMulInteger", ["columns", "w"], ["sums"]))
    nodes.append(helper.make_node("Transpose", ["sums"], ["y"], perm=[0, 3, 1, 2]))
    return _single(nodes, constants, x, TensorProto.INT32)


def _single(nodes: list[onnx.NodeProto], constants: dict[str, Any], x: np.ndarray, result: int) -> Callable[[], Any]:
    """A session of these nodes, from x to y, ready to be run."""
    source = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    output = helper.make_tensor_value_info("y", result, [None] * 4)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "convolution", [source], [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model, threads=1)
    return lambda: session.run(None, {"x": x})


if __name__ == "__main__":
    main()
