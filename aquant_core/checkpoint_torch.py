"""Between a quantized network and its checkpoint file: ``load`` and ``save``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from aquant_core import checkpoint
from aquant_core.checkpoint import REMEDY, Checkpoint, StoredLayer
from aquant_core.config import BorderConfig
from aquant_core.encoding import pack_codes
from aquant_core.errors import CheckpointError, ModelFormatError
from aquant_core.graph import CapturedModel
from aquant_core.layers import ActivationQuantizer
from aquant_core.model import QuantizedModel
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code
from aquant_core.resources import usable_device


def tensors_of(model: QuantizedModel) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by name; their bytes are the network's size."""
    tensors = {f"{name}.{kind}": t for name, kinds in model.constants.items() for kind, t in kinds.items()}
    stored: dict[str, np.ndarray] = {}
    for name, layer in model.layers.items():
        if layer.weight is None:
            tensors[f"{name}.weight"] = layer.float_weight
        else:
            stored[f"{name}.weight"] = pack_codes(layer.weight.codes.cpu().numpy(), layer.weight_bits)
            tensors[f"{name}.weight_scale"] = layer.weight.scale.flatten()
            tensors[f"{name}.weight_zero_point"] = layer.weight.zero_point.flatten().to(torch.uint8)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
        if layer.activation_scale is not None:
            tensors[f"{name}.input_scale"] = layer.activation_scale.reshape(1)
        if layer.border is not None:
            stored |= {f"{name}.{kind}": array for kind, array in layer.border.stored()[0].items()}
    for name, quantizer in model.quantizers.items():
        if quantizer.activation_scale is not None:
            tensors[f"{name}.scale"] = quantizer.activation_scale.reshape(1)
    return stored | {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def save(model: QuantizedModel, path: str | Path, about: Mapping[str, Any]) -> None:
    """Writes the checkpoint.

    Args:
        model: a finished network.
        path: where to; written through a neighbouring temporary file.
        about: JSON values for the header: config, seed, versions, digests.
    """
    layers = [
        [
            name,
            layer.weight_bits,
            layer.activation_bits,
            layer.zero_point,
            list(layer.float_weight.shape),
            layer.bias is not None,
            *([] if layer.border is None else layer.border.stored()[1]),
        ]
        for name, layer in model.layers.items()
    ]
    quantizers = [[name, part.activation_bits, part.zero_point] for name, part in model.quantizers.items()]
    border = next((layer.border_config for layer in model.layers.values() if layer.border is not None), None)
    document = {
        **about,
        "graph": model.graph.document(),
        "layers": layers,
        "quantizers": quantizers,
        "a_rounding": any(layer.a_rounding for layer in model.layers.values()),
        "border": None if border is None else border.model_dump(),
    }
    checkpoint.write(path, document, tensors_of(model))


def load(path: str | Path, device: str | int | torch.device = "cpu") -> nn.Module:
    """The quantized network of a checkpoint: a module from (N, C, H, W) images to logits.

    Its logits are those of the network that was saved, bit for bit on the same device and batch size.

    Args:
        path: a checkpoint file.
        device: where the module is put.

    Raises:
        CheckpointError: not a checkpoint, another format version, or damaged; the tensor is named.
        DeviceError: the device is not there.
    """
    device = usable_device(device)
    stored = checkpoint.read(path)
    try:
        model = _rebuild(stored)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, ModelFormatError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.", REMEDY) from error
    return model.to(device).eval()


def _rebuild(stored: Checkpoint) -> QuantizedModel:
    flat = {name: torch.from_numpy(constant) for name, constant in stored.constants.items()}
    weights: dict[str, WeightRounding] = {}
    for name, row in stored.layers.items():
        if row.weight_scale is None:
            flat[f"{name}.weight"] = torch.from_numpy(row.weight)
        else:
            weights[name] = _weight(row)
            flat[f"{name}.weight"] = weights[name]()
        if row.bias is not None:
            flat[f"{name}.bias"] = torch.from_numpy(row.bias)
    model = QuantizedModel(CapturedModel.from_document(stored.document["graph"], flat))
    if model.layers.keys() != stored.layers.keys() or model.quantizers.keys() != stored.values.keys():
        raise CheckpointError("The layer table and the graph disagree.", REMEDY)
    config = None if stored.document["border"] is None else BorderConfig(**stored.document["border"])
    for name, row in stored.layers.items():
        layer = model.layers[name]
        layer.weight, layer.weight_bits = weights.get(name), row.weight_bits
        # The first checkpoints were of methods without it.
        layer.a_rounding = stored.document.get("a_rounding", False)
        _quantize(layer, row.activation_bits, row.zero_point, row.input_scale)
        if row.border is not None:
            assert config is not None
            layer.add_border(config).restore(row.border, row.alpha)
    for name, value in stored.values.items():
        _quantize(model.quantizers[name], value.bits, value.zero_point, value.scale)
    return model.requires_grad_(False)


def _quantize(part: ActivationQuantizer, bits: int, zero_point: int, scale: np.float32 | None) -> None:
    if scale is not None:
        part.quantize_activation(
            UniformGrid(torch.tensor(scale), torch.tensor(float(zero_point)), largest_code(bits)), bits
        )


def _weight(row: StoredLayer) -> WeightRounding:
    assert row.weight_scale is not None
    assert row.weight_zero_point is not None
    codes = torch.from_numpy(row.weight).float().flatten(1)
    scale = torch.from_numpy(row.weight_scale).reshape(-1, 1)
    zero_point = torch.from_numpy(row.weight_zero_point).reshape(-1, 1).float()
    return WeightRounding(
        codes, UniformGrid(scale, zero_point, largest_code(row.weight_bits)), torch.Size(row.weight.shape)
    )
