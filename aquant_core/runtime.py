"""A quantized network run with integers: int8 codes times int8 weights, summed in int32, layer by layer."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from aquant_core.graph import INPUT, LAYERS, OPERATORS, Node, evaluate_nodes
from aquant_core.images import named_if_unfit
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel
from aquant_core.resources import usable_device
from cupy_kernels.ops import integer_convolution, integer_route
from cupy_kernels.packing import PackedLayer, pack

_INTEGER_LAYER = "integer_layer"


class IntegerModel:
    """A loaded checkpoint for inference: on a GPU by the fused kernels, on a CPU by their plain torch reference.

    Each layer with quantized weight and input is one operator: the border's codes, the integer product, scale, bias,
    and the residual and ReLU that follow. Everything between the layers runs in ``dtype``, so logits differ from the
    simulation that ``load`` returns by what that rounding moves across a border. Layers of which only the weight or
    only the input is quantized, and values quantized where they are made, run as that simulation does.

    >>> network = IntegerModel(load("quantized.safetensors"), device="cuda")
    >>> logits = network(images)

    Attributes:
        device: where it computes.
        dtype: of the values between layers; by default float16 on a GPU, float32 on a CPU. Activations beyond 65,504
            need float32.
        layers: the packed layers by name; ``evaluated_because`` says why one has no thresholds.
    """

    def __init__(
        self, model: QuantizedModel, device: str | int | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Packs the layers for ``device`` (by default the model's own).

        Raises:
            TypeError: no quantized network, such as ``load`` returns.
            DeviceError: the device is not there.
            ValueError: another dtype than float16 and float32, a network that was cast from float32, or a layer whose
                sums could pass the range of int32.
        """
        if not isinstance(model, QuantizedModel):
            raise TypeError(
                f"an IntegerModel is made of what aquant_core.load returns, not of a {type(model).__name__}"
            )
        first = next(iter(model.layers.values()))
        self.device = usable_device(first.float_weight.device if device is None else device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"an IntegerModel computes in float16 or float32, not in {self.dtype}")
        self.layers: dict[str, PackedLayer] = {}
        self._simulated: dict[str, ActivationQuantizer] = {
            name: copy.deepcopy(quantizer).to(self.device) for name, quantizer in model.quantizers.items()
        }
        for name, layer in model.layers.items():
            if layer.weight is None or layer.activation_scale is None or layer.a_rounding:
                self._simulated[name] = copy.deepcopy(layer).to(self.device)
                continue
            try:
                self.layers[name] = _packed(layer, self.device, self.dtype)
            except ValueError as error:
                raise ValueError(f"Layer {name!r}: {error}.") from error
        self._input_shape = model.graph.input_shape
        self._nodes = fused_nodes(model.graph.nodes, set(self.layers))
        self._constants = {
            name: {kind: tensor.to(self.device, self.dtype) for kind, tensor in tensors.items()}
            for name, tensors in model.constants.items()
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images, anywhere and of any floating point type, to fp32 logits on ``device``.

        Raises:
            ImageSetError: they are not what the network takes.
        """
        with named_if_unfit(self._input_shape, images):
            x = images.to(self.device, self.dtype)
            if self.device.type == "cuda":
                x = x.contiguous(memory_format=torch.channels_last)
            return evaluate_nodes(self._nodes, {INPUT: x}, self._run)[self._nodes[-1].name].float()

    def _run(self, node: Node, values: list[Tensor]) -> Tensor:
        if node.op == _INTEGER_LAYER:
            return self._run_layer(node, *values)
        if node.name in self._simulated:
            simulated: Tensor = self._simulated[node.name](values[0].float())
            return simulated.to(self.dtype)
        return OPERATORS[node.op](node.attributes, self._constants.get(node.name, {}), *values)

    def _run_layer(self, node: Node, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layer, relu = self.layers[node.attributes["layer"]], node.attributes["relu"]
        if node.attributes["linear"]:
            features = x.reshape(x[..., 0].numel(), x.shape[-1], 1, 1)
            return integer_convolution(features, layer, None, relu).reshape(*x.shape[:-1], layer.out_channels)
        shape = (len(x), layer.out_channels, *layer.window.output_size(x.shape[2], x.shape[3]))
        if residual is None or residual.shape == shape:
            return integer_convolution(x, layer, residual, relu)
        total = integer_convolution(x, layer) + residual  # one that is broadcast
        return total.relu_() if relu else total


def _packed(layer: QuantizedLayer, device: torch.device, dtype: torch.dtype) -> PackedLayer:
    assert layer.weight is not None
    assert layer.activation_scale is not None
    shape = layer.weight.shape if layer.op == "conv2d" else torch.Size((*layer.weight.shape, 1, 1))
    border = None if layer.border is None else layer.border.coefficients.detach()
    alpha = None if layer.border is None or layer.border.alpha is None else layer.border.alpha.detach()
    spec = layer.specification(layer.is_fused)
    packed = pack(
        integer_route(shape, layer.groups, device),
        layer.weight.codes.reshape(shape),
        layer.weight.scale.flatten(),
        layer.weight.zero_point.flatten(),
        layer.weight.levels,
        layer.bias,
        layer.activation_scale.detach(),
        border,
        alpha,
        layer.window,
        layer.groups,
        spec,
        dtype,
    )
    return packed.to(device)


def fused_nodes(nodes: list[Node], layers: set[str]) -> list[Node]:
    """The graph with each integer layer, the addition after it and the ReLU after that as one node.

    An addition goes to the later of the two values it adds, if that is a convolution which nothing else reads; the
    other one then is its residual. The fused node bears the name of the last node it stands for.
    """
    uses = Counter(name for node in nodes for name in node.inputs) + Counter([nodes[-1].name])
    found: dict[str, Node] = {}  # the nodes so far by the name of their value, in order
    for node in nodes:
        last = found.get(node.inputs[-1] if node.inputs else "")
        if node.op in LAYERS and node.name in layers:
            attributes = {"layer": node.name, "linear": node.op == "linear", "relu": False}
            found[node.name] = Node(node.name, _INTEGER_LAYER, node.inputs, attributes)
        elif node.op == "relu" and last is not None and _is_open(last, uses):
            _replace(found, last, Node(node.name, last.op, last.inputs, last.attributes | {"relu": True}))
        elif node.op == "add" and len(node.inputs) == 2 and (sides := _sides(node, found)) is not None:
            layer, residual = sides
            if _is_open(layer, uses) and len(layer.inputs) == 1 and not layer.attributes["linear"]:
                _replace(found, layer, replace(layer, name=node.name, inputs=(*layer.inputs, residual)))
            else:
                found[node.name] = node
        else:
            found[node.name] = node
    return list(found.values())


def _is_open(node: Node, uses: Counter[str]) -> bool:
    """Whether more can be fused to it: an integer layer before its ReLU, read once."""
    return node.op == _INTEGER_LAYER and not node.attributes["relu"] and uses[node.name] == 1


def _sides(addition: Node, found: dict[str, Node]) -> tuple[Node, str] | None:
    """The later of the two nodes added and the name of the other; None where there are not two nodes."""
    first, second = addition.inputs
    order = {name: index for index, name in enumerate(found)}
    later = max((first, second), key=lambda name: order.get(name, -1))
    if first == second or later not in found:
        return None
    return found[later], second if later == first else first


def _replace(found: dict[str, Node], old: Node, new: Node) -> None:
    """Puts ``new`` in the place of ``old``, under its own name."""
    items = [(new.name, new) if name == old.name else (name, node) for name, node in found.items()]
    found.clear()
    found.update(items)
