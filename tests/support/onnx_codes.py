"""Codes by onnxruntime and by torch, layer by layer, each layer given the same input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor
from torch import Tensor

from aquant_core.a_rounding import a_rounded_convolution
from aquant_core.graph import INPUT, LAYERS, QUANTIZE, Node, evaluate_nodes
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel
from aquant_core.onnx_layers import CODES
from aquant_core.quantizers import UniformGrid, largest_code
from cupy_kernels.ops import border_codes
from cupy_kernels.specification import Window


def session_of(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU; two threads may share the machine with other work."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def torch_codes(model: QuantizedModel, images: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every quantized value of a run: name, the value and its codes as the network's own operators have them."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def run(node: Node, values: list[Tensor]) -> Tensor:
        part: ActivationQuantizer | None = None
        if node.op in LAYERS:
            part = model.layers[node.name]
        elif node.op == QUANTIZE:
            part = model.quantizers[node.name]
        if part is not None and part.activation_scale is not None:
            found.append((node.name, values[0], codes_of(part, values[0])))
        return model.run_node(node, values)

    evaluate_nodes(model.graph.nodes, {INPUT: images}, run)
    yield from found


def codes_of(part: ActivationQuantizer, x: Tensor) -> Tensor:
    """The specification's codes: of x's shape, or (N, C K, L) with a border by position."""
    assert part.activation_scale is not None
    if isinstance(part, QuantizedLayer) and part.a_rounding:
        return _a_rounded_codes(part, x)
    border = None if part.border is None else part.border.coefficients
    alpha = None if part.border is None else part.border.alpha
    if isinstance(part, QuantizedLayer) and part.has_border_by_position:
        spec = part.specification(part.border_config.fusion == "channel_mean")
        return border_codes(x, part.activation_scale, border, alpha, part.window, spec)
    maps = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
    codes = border_codes(maps, part.activation_scale, border, None, Window(), part.specification(fused=False))
    return codes.reshape(x.shape)


def _a_rounded_codes(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Those behind ``a_rounded_convolution``: what it gives for a weight that passes each slot on, in whole steps."""
    assert layer.activation_scale is not None
    maps = x if layer.op == "conv2d" else x.reshape(-1, x.shape[-1], 1, 1)
    rows = layer.in_channels // layer.groups * layer.window.positions
    passing = torch.eye(rows).reshape(rows, -1, *layer.window.kernel_size).repeat(layer.groups, 1, 1, 1)
    grid = UniformGrid(layer.activation_scale, torch.tensor(layer.zero_point), largest_code(layer.activation_bits))
    x_hat = a_rounded_convolution(maps, grid, passing, None, layer.window, layer.groups)
    codes = (x_hat / layer.activation_scale).round() + layer.zero_point
    return codes.to(torch.uint8).reshape(x.shape if layer.op == "linear" else codes.shape)


def differing_codes(model: QuantizedModel, exported: onnx.ModelProto, images: Tensor) -> dict[str, tuple[int, int]]:
    """By quantized value: codes that onnxruntime has otherwise, given torch's input, and how many there are."""
    values = list(torch_codes(model, images))
    sources = {name: _source(model, name) for name, _, _ in values}
    session = session_of(_codes_alone(exported, sources))
    feed = {sources[name]: x.numpy() for name, x, _ in values}
    names = [name + CODES for name, _, _ in values]
    results = session.run(names, feed)
    return {
        name: (int((codes.numpy().reshape(result.shape) != result).sum()), result.size)
        for (name, _, codes), result in zip(values, results, strict=True)
    }


def _source(model: QuantizedModel, name: str) -> str:
    """The value that a layer or mark quantizes, looking through marks that leave it float."""
    by_name = {node.name: node for node in model.graph.nodes}
    source = by_name[name].inputs[0]
    while source != INPUT and by_name[source].op == QUANTIZE and model.quantizers[source].activation_scale is None:
        source = by_name[source].inputs[0]
    return source


def _codes_alone(exported: onnx.ModelProto, sources: Mapping[str, str]) -> onnx.ModelProto:
    """The part of the graph from every quantized value to its codes; the values are its inputs."""
    typed = onnx.shape_inference.infer_shapes(exported)
    return Extractor(typed).extract_model(sorted(set(sources.values())), [name + CODES for name in sources])


def run_with_codes(model: QuantizedModel, exported: onnx.ModelProto, images: Tensor) -> tuple[np.ndarray, dict[str, float]]:
    """A run of the whole network: logits, and by quantized value the share of codes that differ from torch's run."""
    expected = {name: codes for name, _, codes in torch_codes(model, images)}
    whole = onnx.ModelProto()
    whole.CopyFrom(exported)
    whole.graph.output.extend(
        onnx.helper.make_tensor_value_info(name + CODES, onnx.TensorProto.UINT8, None) for name in expected
    )
    logits, *results = session_of(whole).run(None, {INPUT: images.numpy()})
    shares = {
        name: float((codes.numpy().reshape(result.shape) != result).mean())
        for (name, codes), result in zip(expected.items(), results, strict=True)
    }
    return logits, shares
