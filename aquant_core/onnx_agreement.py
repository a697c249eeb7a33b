"""Compares an ONNX file in onnxruntime with the network it was written of: codes, logits, predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor
from torch import Tensor

from aquant_core.a_rounding import a_rounded_columns
from aquant_core.graph import INPUT, Node, evaluate_nodes
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel
from aquant_core.onnx_layers import CODES
from aquant_core.quantizers import UniformGrid, largest_code
from cupy_kernels.ops import border_codes
from cupy_kernels.specification import Window

_AT_ONCE = 50
"""Images of which all codes are held."""


@dataclass
class Agreement:
    """What was compared, over ``images`` images.

    Attributes:
        codes: how many codes each quantized value has, by its name.
        differing_given_input: of these, how many onnxruntime has otherwise where it is given torch's input.
        differing_in_run: the same where each runs the whole network by itself, so that sums in another order may
            bring a value across a border.
        images_with_all_codes: images of which no code differs in the run.
        logits_difference: the largest, over those images.
        logits_scale: torch's largest logit.
        same_top1: images of which the prediction is the same.
    """

    images: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    differing_given_input: dict[str, int] = field(default_factory=dict)
    differing_in_run: dict[str, int] = field(default_factory=dict)
    images_with_all_codes: int = 0
    logits_difference: float = 0.0
    logits_scale: float = 0.0
    same_top1: int = 0

    @property
    def share_differing(self) -> float:
        """Of all codes, in the run of the whole network."""
        return sum(self.differing_in_run.values()) / max(sum(self.codes.values()), 1)


def open_session(
    model: onnx.ModelProto | str | Path, threads: int = 0, spinning: bool = True
) -> onnxruntime.InferenceSession:
    """onnxruntime on the CPU.

    Args:
        model: the file, or what is in it.
        threads: how many compute; 0 leaves that to onnxruntime.
        spinning: whether they spin while they wait, as is onnxruntime's way; others may have use for the processor.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def compare(
    model: QuantizedModel, exported: onnx.ModelProto, images: Tensor, tell: Callable[[int, int], None] | None = None
) -> Agreement:
    """Runs both, on the CPU.

    Args:
        model: the network.
        exported: ``onnx_model(model)``, perhaps written and read again.
        images: (N, C, H, W).
        tell: called with how many of the images are compared, and how many there are.
    """
    found = Agreement()
    plain, whole = (open_session(file, spinning=False) for file in (exported, _with_codes(model, exported)))
    sources = {node.name: _source(model, node) for node in model.graph.nodes if node.name in model.quantizing}
    names = [name + CODES for name in sources]
    alone = open_session(_codes_alone(exported, sources), spinning=False) if names else None
    for batch in torch.split(images, _AT_ONCE):
        if tell is not None:
            tell(found.images, len(images))
        values, logits = _run(model, batch)
        feed = {sources[name]: x.numpy() for name, (x, _) in values.items()}
        given = [] if alone is None else alone.run(names, feed)
        in_run = [] if alone is None else whole.run(names, {INPUT: batch.numpy()})
        all_same = np.ones(len(batch), bool)
        for (name, (_, codes)), one, other in zip(values.items(), given, in_run, strict=True):
            expected = codes.numpy().reshape(one.shape)
            differs = (other != expected).reshape(len(batch), -1)
            all_same &= ~differs.any(1)
            found.codes[name] = found.codes.get(name, 0) + expected.size
            for counts, count in (
                (found.differing_given_input, (one != expected).sum()),
                (found.differing_in_run, differs.sum()),
            ):
                counts[name] = counts.get(name, 0) + int(count)
        _count_logits(found, logits.numpy(), plain.run(None, {INPUT: batch.numpy()})[0], all_same)
    return found


def _count_logits(found: Agreement, expected: np.ndarray, logits: np.ndarray, all_same: np.ndarray) -> None:
    found.images += len(expected)
    found.images_with_all_codes += int(all_same.sum())
    difference = float(np.abs(logits - expected)[all_same].max(initial=0.0))
    found.logits_difference = max(found.logits_difference, difference)
    found.logits_scale = max(found.logits_scale, float(np.abs(expected).max(initial=0.0)))
    found.same_top1 += int((logits.argmax(1) == expected.argmax(1)).sum())


def codes_of(part: ActivationQuantizer, x: Tensor) -> Tensor:
    """A layer's or mark's codes for its input, by the specification: of x's shape, or one for each im2col slot."""
    assert part.activation_scale is not None
    maps = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
    if isinstance(part, QuantizedLayer) and part.a_rounding:
        z = torch.tensor(part.zero_point)
        grid = UniformGrid(part.activation_scale, z, largest_code(part.activation_bits))
        return (a_rounded_columns(maps, grid, part.window, part.groups) + z).to(torch.uint8)
    border = None if part.border is None else part.border.coefficients
    if isinstance(part, QuantizedLayer) and part.border is not None and part.has_border_by_position:
        spec = part.specification(part.is_fused)
        return border_codes(x, part.activation_scale, border, part.border.alpha, part.window, spec)
    return border_codes(maps, part.activation_scale, border, None, Window(), part.specification(fused=False))


def _run(model: QuantizedModel, images: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Every quantized value of a run with its codes, and the logits."""
    parts, found = model.quantizing, {}

    def run(node: Node, values: list[Tensor]) -> Tensor:
        if node.name in parts:
            found[node.name] = values[0], codes_of(parts[node.name], values[0])
        return model.run_node(node, values)

    return found, evaluate_nodes(model.graph.nodes, {INPUT: images}, run)[model.graph.output]


def _source(model: QuantizedModel, node: Node) -> str:
    """The value that a layer or mark quantizes, by its name in the file: marks that leave it float have none."""
    by_name = {node.name: node for node in model.graph.nodes}
    source = node.inputs[0]
    while source in model.quantizers and source not in model.quantizing:
        source = by_name[source].inputs[0]
    return source


def _with_codes(model: QuantizedModel, exported: onnx.ModelProto) -> onnx.ModelProto:
    """The file with all codes as outputs."""
    whole = onnx.ModelProto()
    whole.CopyFrom(exported)
    whole.graph.output.extend(
        onnx.helper.make_tensor_value_info(node.name + CODES, onnx.TensorProto.UINT8, None)
        for node in model.graph.nodes
        if node.name in model.quantizing
    )
    return whole


def _codes_alone(exported: onnx.ModelProto, sources: dict[str, str]) -> onnx.ModelProto:
    """The part of the file from every quantized value to its codes; the values are its inputs."""
    typed = onnx.shape_inference.infer_shapes(exported)
    part = Extractor(typed).extract_model(sorted(set(sources.values())), [name + CODES for name in sources])
    assert isinstance(part, onnx.ModelProto)
    return part
