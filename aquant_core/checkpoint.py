"""The quantized checkpoint: one safetensors file, packed integer codes, and a JSON document in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aquant_core.border import STORED_TYPE
from aquant_core.config import FLOAT_BITS, BorderConfig
from aquant_core.errors import CheckpointError, ModelFormatError
from aquant_core.graph import CapturedModel
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code

FORMAT = "aquant-checkpoint/1"
_KEY = "aquant"  # the header has this one key: several would be written in no fixed order
_REMEDY = "Download it again; its sha256 is in the job's document, under files."


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2^bits as a dense bit string, lowest bit first: uint8 of ceil(n bits / 8) bytes."""
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1, 1)
    return np.packbits(np.unpackbits(flat, axis=1, bitorder="little")[:, :bits], bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of ``pack_codes``: ``count`` codes, uint8."""
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little")[:, 0]


def tensors_of(model: QuantizedModel) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name; their bytes are the network's size."""
    tensors = {f"{name}.{kind}": t for name, kinds in model.constants.items() for kind, t in kinds.items()}
    for name, layer in model.layers.items():
        if layer.weight is None:
            tensors[f"{name}.weight"] = layer.float_weight
        else:
            packed = pack_codes(layer.weight.codes.cpu().numpy(), layer.weight_bits)
            tensors[f"{name}.weight"] = torch.from_numpy(packed)
            tensors[f"{name}.weight_scale"] = layer.weight.scale.flatten()
            tensors[f"{name}.weight_zero_point"] = layer.weight.zero_point.flatten().to(torch.uint8)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
        if layer.activation_scale is not None:
            tensors[f"{name}.input_scale"] = layer.activation_scale.reshape(1)
        if layer.border is not None:
            tensors[f"{name}.border"] = layer.border.coefficients.to(STORED_TYPE)
            if layer.border.alpha is not None:
                tensors[f"{name}.alpha"] = layer.border.alpha.to(STORED_TYPE)
    for name, quantizer in model.quantizers.items():
        if quantizer.activation_scale is not None:
            tensors[f"{name}.scale"] = quantizer.activation_scale.reshape(1)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
        ]
        for name, layer in model.layers.items()
    ]
    quantizers = [[name, part.activation_bits, part.zero_point] for name, part in model.quantizers.items()]
    border = next((layer.border_config for layer in model.layers.values() if layer.border is not None), None)
    document = {
        "format": FORMAT,
        **about,
        "graph": model.graph.document(),
        "layers": layers,
        "quantizers": quantizers,
        "a_rounding": any(layer.a_rounding for layer in model.layers.values()),
        "border": None if border is None else border.model_dump(),
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors_of(model), partial, {_KEY: json.dumps(document, separators=(",", ":"), sort_keys=True)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The quantized network of a checkpoint: a module from (N, C, H, W) images to logits.

    Its logits are those of the network that was saved, bit for bit on the same device and batch size.

    Raises:
        CheckpointError: not a checkpoint, another format version, or damaged; the tensor is named.
    """
    document, tensors = _read(Path(path))
    try:
        model = _rebuild(document, tensors)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, ModelFormatError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.", _REMEDY) from error
    return model.to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.", "Give the path of a downloaded checkpoint.")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            found = document.get("format") if isinstance(document, dict) else None
            if found != FORMAT:
                raise CheckpointError(
                    f"{path} has format {found!r}; this version reads {FORMAT!r}.", "Use a matching version."
                )
            return document, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", _REMEDY) from error


def _rebuild(document: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedModel:
    # Checkpoints of versions that quantized layers' inputs alone have neither quantizers nor a_rounding.
    quantizers = document.get("quantizers", [])
    names = {entry[0] for entry in (*document["layers"], *quantizers)}
    flat = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[0] not in names}
    weights: dict[str, WeightRounding] = {}
    for name, bits, _, _, shape, biased in document["layers"]:
        if bits == FLOAT_BITS:
            flat[f"{name}.weight"] = _tensor(tensors, f"{name}.weight", shape)
        else:
            weights[name] = _weight(tensors, name, bits, torch.Size(shape))
            flat[f"{name}.weight"] = weights[name]()
        if biased:
            flat[f"{name}.bias"] = _tensor(tensors, f"{name}.bias", [shape[0]])
    model = QuantizedModel(CapturedModel.from_document(document["graph"], flat))
    if set(model.layers) | set(model.quantizers) != names:
        raise CheckpointError("The layer table and the graph disagree.", _REMEDY)
    for name, weight_bits, activation_bits, zero_point, *_ in document["layers"]:
        layer = model.layers[name]
        layer.weight, layer.weight_bits = weights.get(name), weight_bits
        layer.a_rounding = document.get("a_rounding", False)
        _quantize(layer, f"{name}.input_scale", activation_bits, zero_point, tensors)
        if activation_bits != FLOAT_BITS and document["border"] is not None:
            _add_border(layer, name, BorderConfig(**document["border"]), tensors)
    for name, bits, zero_point in quantizers:
        _quantize(model.quantizers[name], f"{name}.scale", bits, zero_point, tensors)
    return model.requires_grad_(False)


def _quantize(
    part: ActivationQuantizer, scale_name: str, bits: int, zero_point: int, tensors: Mapping[str, Tensor]
) -> None:
    if bits != FLOAT_BITS:
        scale = _tensor(tensors, scale_name, [1]).reshape(())
        part.quantize_activation(UniformGrid(scale, torch.tensor(float(zero_point)), largest_code(bits)), bits)


def _add_border(layer: QuantizedLayer, name: str, config: BorderConfig, tensors: Mapping[str, Tensor]) -> None:
    border = layer.add_border(config)
    with torch.no_grad():
        border.coefficients.copy_(_tensor(tensors, f"{name}.border", list(border.coefficients.shape)))
        if border.alpha is not None:
            border.alpha.copy_(_tensor(tensors, f"{name}.alpha", list(border.alpha.shape)))


def _weight(tensors: Mapping[str, Tensor], name: str, bits: int, shape: torch.Size) -> WeightRounding:
    count = shape.numel()
    packed = _tensor(tensors, f"{name}.weight", [(count * bits + 7) // 8])
    codes = torch.from_numpy(unpack_codes(packed.numpy(), bits, count)).reshape(shape[0], -1).float()
    scale = _tensor(tensors, f"{name}.weight_scale", [shape[0]]).reshape(-1, 1)
    zero_point = _tensor(tensors, f"{name}.weight_zero_point", [shape[0]]).reshape(-1, 1).float()
    return WeightRounding(codes, UniformGrid(scale, zero_point, largest_code(bits)), shape)


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: list[int]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"Tensor {name!r} is missing.", _REMEDY)
    tensor = tensors[name]
    if list(tensor.shape) != list(shape):
        raise CheckpointError(f"Tensor {name!r} has shape {list(tensor.shape)} instead of {list(shape)}.", _REMEDY)
    return tensor
