"""Captures a torch module: torch.fx traces it, each traced call becomes one node of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from aquant_core.errors import UnsupportedOperatorError
from aquant_core.graph import INPUT, CapturedModel
from aquant_core.graph_builder import GraphBuilder, unsupported


class _Value(str):
    """Name of a graph value, told apart from ordinary strings among a call's arguments."""

    __slots__ = ()


_UNARY_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.SiLU: ("silu", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.GELU: ("gelu", ("approximate",)),
    nn.Softmax: ("softmax", ("dim",)),
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.AvgPool2d: (
        "avg_pool2d",
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ("output_size",)),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
}
"""Modules without weights: operator and the settings that carry over by name."""

_IDENTITY_MODULES = ("Dropout", "Dropout2d", "Identity", "StochasticDepth", "DropPath", "AlphaDropout")
_IDENTITY_FUNCTIONS = ("dropout", "dropout2d", "stochastic_depth", "contiguous", "detach", "clone")

_UNARY_FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    "relu6": ("relu6", ()),
    "silu": ("silu", ()),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
    "hardswish": ("hardswish", ()),
    "hardsigmoid": ("hardsigmoid", ()),
    "leaky_relu": ("leaky_relu", ("negative_slope",)),
    "gelu": ("gelu", ("approximate",)),
    "softmax": ("softmax", ("dim",)),
    "clamp": ("clamp", ("min", "max")),
    "flatten": ("flatten", ("start_dim", "end_dim")),
    "max_pool2d": ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "boolean_dispatch": ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "avg_pool2d": (
        "avg_pool2d",
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", ("output_size",)),
}
"""Functions and tensor methods by name: operator and the order of their settings after the input."""

_BINARY_FUNCTIONS = {
    "add": "add", "iadd": "add", "sub": "sub", "isub": "sub", "mul": "mul", "imul": "mul",
    "truediv": "div", "div": "div",
}  # fmt: skip


def capture_module(model: nn.Module, example: Tensor) -> CapturedModel:
    """Captures ``model`` in evaluation mode.

    Args:
        model: a module whose forward takes one (N, C, H, W) batch and returns one tensor.
        example: a batch of at least two images.

    Raises:
        UnsupportedOperatorError: the module cannot be traced, or calls something no graph can hold.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        traced = torch.fx.symbolic_trace(model)
        return _Conversion(traced, example).run()
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedOperatorError(
            f"{type(model).__name__} cannot be traced: {str(error).splitlines()[0]}.",
            "Its forward must not branch on values; or export it to ONNX and submit that.",
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


class _Conversion:
    def __init__(self, traced: torch.fx.GraphModule, example: Tensor) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.builder = GraphBuilder(example)
        self.known: dict[torch.fx.Node, Any] = {}

    def run(self) -> CapturedModel:
        convert: dict[str, Callable[[torch.fx.Node, list[Any], dict[str, Any]], Any]] = {
            "call_module": self._module,
            "call_function": self._function,
            "call_method": self._function,
        }
        for node in self.traced.graph.nodes:
            args = torch.fx.map_arg(node.args, lambda n: self.known[n])
            kwargs = torch.fx.map_arg(node.kwargs, lambda n: self.known[n])
            if node.op == "placeholder":
                if INPUT in self.known.values():
                    if node.args:  # an optional second input keeps its default
                        self.known[node] = args[0]
                        continue
                    raise UnsupportedOperatorError("The network takes more than one input.", "Give it one image batch.")
                self.known[node] = _Value(INPUT)
            elif node.op == "get_attr":
                self.known[node] = operator.attrgetter(node.target)(self.traced)
            elif node.op == "output":
                if not isinstance(args[0], _Value):
                    raise UnsupportedOperatorError(
                        f"The network returns {type(args[0]).__name__}, not one tensor.",
                        "Wrap it in a module that returns its logits alone.",
                    )
                return self.builder.finish(args[0])
            else:
                self.known[node] = convert[node.op](node, list(args), dict(kwargs))
        raise AssertionError("a traced graph ends in an output")

    def _module(self, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        path = str(node.target)
        module = self.modules[path]
        kind = type(module)
        if kwargs or len(args) != 1 or not isinstance(args[0], _Value):
            raise unsupported(f"{kind.__name__} with other than one input", path)
        source = args[0]
        if kind.__name__ in _IDENTITY_MODULES:
            return source
        if isinstance(module, nn.Conv2d):
            return self._conv(module, path, source)
        if isinstance(module, nn.Linear):
            return _Value(self.builder.add("linear", path, [source], {}, _tensors(module)))
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.running_mean, module.running_var
            if mean is None or variance is None:
                raise unsupported("BatchNorm2d without running statistics", path)
            weights = _tensors(module) | {"running_mean": mean, "running_var": variance}
            return _Value(self.builder.add("batch_norm", path, [source], {"eps": module.eps}, weights))
        if kind in _UNARY_MODULES:
            op, settings = _UNARY_MODULES[kind]
            return self._unary(op, path, source, {key: getattr(module, key) for key in settings})
        raise unsupported(kind.__name__, path)

    def _conv(self, module: nn.Conv2d, path: str, source: str) -> _Value:
        if module.padding_mode != "zeros":
            raise unsupported(f"Conv2d with padding_mode {module.padding_mode!r}", path)
        padding: Any = module.padding
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(extent % 2 for extent in total):
                raise unsupported("Conv2d with padding 'same' and an even kernel", path)
            padding = tuple(extent // 2 for extent in total)
        attributes = {
            "stride": list(module.stride),
            "padding": list(padding),
            "dilation": list(module.dilation),
            "groups": module.groups,
        }
        return _Value(self.builder.add("conv2d", path, [source], attributes, _tensors(module)))

    def _unary(self, op: str, name: str, source: str, settings: Mapping[str, Any]) -> _Value:
        attributes = {
            key: list(value) if isinstance(value, (tuple, torch.Size)) else value
            for key, value in settings.items()
            if value is not None
        }
        return _Value(self.builder.add(op, name, [source], attributes))

    def _function(self, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if not any(isinstance(value, _Value) for value in _flat([*args, *kwargs.values()])):
            if callable(target):
                return target(*args, **kwargs)
            return getattr(args[0], name)(*args[1:], **kwargs)
        if name in ("size", "getattr", "dim"):
            example = self.builder.values[args[0]]
            return getattr(example, name)(*args[1:]) if name != "getattr" else getattr(example, args[1])
        if name in _IDENTITY_FUNCTIONS:
            return args[0]
        if name in _BINARY_FUNCTIONS and len(args) == 2 and not kwargs:
            return self._binary(_BINARY_FUNCTIONS[name], node.name, args)
        if name in ("cat", "concat"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return _Value(self.builder.add("concat", node.name, args[0], {"dim": dim}))
        if name in ("view", "reshape"):
            shape = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            return _Value(self.builder.add_reshape(node.name, args[0], shape))
        if name == "mean":
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keepdim = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
            dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
            return _Value(self.builder.add("mean", node.name, [args[0]], {"dims": dims, "keepdim": keepdim}))
        if name in ("transpose", "permute"):
            dims = list(range(self.builder.values[args[0]].dim()))
            if name == "transpose":
                dims[args[1]], dims[args[2]] = dims[args[2]], dims[args[1]]
            else:
                dims = list(args[1] if isinstance(args[1], (tuple, list)) else args[1:])
            return _Value(self.builder.add("permute", node.name, [args[0]], {"dims": dims}))
        if name == "chunk":
            return self._chunks(node.name, args[0], args[1], kwargs.get("dim", args[2] if len(args) > 2 else 0))
        if name == "getitem" and not isinstance(args[0], _Value):
            return args[0][args[1]]
        if (
            name == "pad"
            and len(args) >= 2
            and len(args[1]) == 4
            and not any(args[2:])
            and kwargs.get("mode", "constant") == "constant"
            and not kwargs.get("value")
        ):
            return _Value(self.builder.add("pad", node.name, [args[0]], {"pads": list(args[1])}))
        if name in _UNARY_FUNCTIONS:
            op, order = _UNARY_FUNCTIONS[name]
            settings = dict(zip(order, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in order}
            return self._unary(op, node.name, args[0], settings)
        raise unsupported(name, node.name)

    def _binary(self, op: str, name: str, operands: list[Any]) -> _Value:
        if all(isinstance(operand, _Value) for operand in operands):
            return _Value(self.builder.add(op, name, operands))
        value, constant = operands
        if not isinstance(value, _Value):
            if op not in ("add", "mul"):
                raise unsupported(f"{op} with a constant on the left", name)
            value, constant = constant, value
        return _Value(self.builder.add(op, name, [value], {}, {"constant": torch.as_tensor(constant)}))

    def _chunks(self, name: str, source: str, count: int, dim: int) -> list[_Value]:
        parts, start = [], 0
        for part in self.builder.values[source].chunk(count, dim):
            length = part.shape[dim]
            attributes = {"dim": dim, "start": start, "length": length}
            parts.append(_Value(self.builder.add("slice", name, [source], attributes)))
            start += length
        return parts


def _flat(values: list[Any]) -> list[Any]:
    return [v for value in values for v in (_flat(list(value)) if isinstance(value, (list, tuple)) else [value])]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter is not None}
