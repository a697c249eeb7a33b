"""The checkpoint file, read and written with numpy and safetensors alone; its format is docs/checkpoint.md.

``checkpoint_torch`` makes a network of what is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aquant_core.encoding import decode_border, unpack_codes
from aquant_core.errors import CheckpointError

FORMAT = "aquant-checkpoint/2"
"""What is written."""

UNVERIFIED_FORMAT = "aquant-checkpoint/1"
"""The first version; it is read, but holds no digests of its tensors."""

REMEDY = "Copy or download it again from where it was written (a job's document has its sha256), or quantize anew."

_KEY = "aquant"  # the header has this one key: several would be written in no fixed order
_FLOAT = 32  # config.FLOAT_BITS; that module needs pydantic
_UNSIGNED = "0" * 64
_OF_FORMAT = frozenset(("format", "graph", "layers", "quantizers", "a_rounding", "border", "tensors", "sha256"))
_ONNX_FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # tags that may follow ONNX's version
_NAME_OF_TYPE = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8"}
_TYPES_OF_BORDER: dict[int, dict[str, type[np.generic]]] = {
    16: {"border": np.float16, "alpha": np.float16},
    8: {"border": np.int8, "alpha": np.uint8},
}


@dataclass(frozen=True)
class StoredLayer:
    """One conv2d or linear layer, its codes and border decoded.

    Attributes:
        weight: (O, C / groups, k_y, k_x) or (O, C): float32, or where it is quantized its codes, uint8.
        weight_bits, activation_bits: 2 to 8, or 32 for float.
        weight_scale, weight_zero_point: (O,) float32 and uint8; None where the weight is float.
        bias: (O,) float32, or None.
        input_scale: s, float32; None where the layer does not quantize its input.
        zero_point: z of the input.
        border: (P, C, K) float32: b0, b1 (and b2) by input channel and im2col position, K = 1 for one border a
            channel; None for rounding to nearest.
        alpha: (C, K) float32, or None for 1.
    """

    weight: np.ndarray
    weight_bits: int
    activation_bits: int
    weight_scale: np.ndarray | None
    weight_zero_point: np.ndarray | None
    bias: np.ndarray | None
    input_scale: np.float32 | None
    zero_point: int
    border: np.ndarray | None
    alpha: np.ndarray | None

    def dequantized_weight(self) -> np.ndarray:
        """s_w (w_q - z_w), float32."""
        if self.weight_scale is None or self.weight_zero_point is None:
            return self.weight
        by_output = (-1, *[1] * (self.weight.ndim - 1))
        codes, zero_point = self.weight.astype(np.float32), self.weight_zero_point.astype(np.float32)
        result: np.ndarray = (codes - zero_point.reshape(by_output)) * self.weight_scale.reshape(by_output)
        return result


@dataclass(frozen=True)
class StoredValue:
    """A value quantized where it is made: bits (32 for float), zero-point, and its step where it is quantized."""

    bits: int
    zero_point: int
    scale: np.float32 | None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        document: the JSON document of its header: graph, config, versions, ...
        layers: by node name, in the graph's order.
        values: by node name.
        constants: other tensors of the graph, float32, by ``node.kind``.
    """

    document: dict[str, Any]
    layers: dict[str, StoredLayer]
    values: dict[str, StoredValue]
    constants: dict[str, np.ndarray]

    @property
    def about(self) -> dict[str, Any]:
        """What was said of the run when it was saved: config, seed, versions, digests."""
        return {key: value for key, value in self.document.items() if key not in _OF_FORMAT}


def read(path: str | Path) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Raises:
        CheckpointError: not a checkpoint, another format version, or damaged; a tensor at fault is named.
    """
    path = Path(path)
    text, document, tensors = _read_file(path)
    try:
        if document["format"] == FORMAT or "sha256" in document:
            _verify(text, document, tensors)
        return _parse(document, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error.detail}", error.remedy) from error
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_why(error)}.", REMEDY) from error


def write(path: str | Path, document: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a checkpoint, whole or not at all, through a neighbouring temporary file.

    Args:
        path: where to.
        document: JSON values; format version and digests are added.
        tensors: by name, of float32, float16, uint8 or int8.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    digests = _digests(contiguous)
    signed = {**document, "format": FORMAT, "tensors": _short(digests), "sha256": _UNSIGNED}
    text = json.dumps(signed, separators=(",", ":"), sort_keys=True)
    text = text.replace(_field(_UNSIGNED), _field(_digest_of_all(text, digests)))
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()  # as any new file is made: the library's own are its user's alone
        mode = partial.stat().st_mode
        save_file(contiguous, partial, {_KEY: text})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digests(tensors: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """sha256 of each tensor's name, type, shape and little-endian bytes, in the order of their names."""
    digests = {}
    for name, tensor in sorted(tensors.items()):
        kind = _NAME_OF_TYPE.get(tensor.dtype.name, tensor.dtype.name)
        sha = hashlib.sha256(f"{name} {kind} {','.join(map(str, tensor.shape))}\n".encode())
        sha.update(tensor.tobytes())
        digests[name] = sha.digest()
    return digests


def _short(digests: Mapping[str, bytes]) -> str:
    """What tells which tensor is at fault: eight hexadecimal digits of each."""
    return "".join(digest[:4].hex() for digest in digests.values())


def _digest_of_all(text: str, digests: Mapping[str, bytes]) -> str:
    """sha256 of the document, its own digest being zeros, and of the tensors' digests."""
    return hashlib.sha256(text.encode() + b"".join(digests.values())).hexdigest()


def _field(digest: object) -> str:
    return f'"sha256":"{digest}"'


def _read_file(path: Path) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The document, as text and as values, and the tensors."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.", "Give the path of a downloaded checkpoint.")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY, "{}")
            document = json.loads(text)
            found = document.get("format") if isinstance(document, dict) else None
            if found not in (FORMAT, UNVERIFIED_FORMAT):
                raise CheckpointError(
                    f"{path} has format {found!r}; this version reads {FORMAT!r} and {UNVERIFIED_FORMAT!r}.",
                    "Use a matching version.",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        cut = _first_cut_off(path)
        if cut is None and _is_onnx(path):
            raise CheckpointError(
                f"{path} is no checkpoint, it looks like ONNX.",
                "Give what `aquant quantize` has made of it, or `aquant download` has fetched.",
            ) from error
        why = _why(error) if cut is None else f"it ends before tensor {cut!r} does"
        raise CheckpointError(f"{path} cannot be read: {why}.", REMEDY) from error
    return text, document, tensors


def _why(error: Exception) -> str:
    """What went wrong, in words for people."""
    return "its document is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _is_onnx(path: Path) -> bool:
    """Whether a file begins as ONNX does, with its version; a checkpoint has the length of its header and a brace."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return len(head) == 9 and head[0] == 0x08 and head[1] < 0x80 and head[2] in _ONNX_FIELDS and head[8:] != b"{"


def _first_cut_off(path: Path) -> str | None:
    """The first tensor whose end a truncated file has not; None where that is not what is wrong."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = path.stat().st_size - 8 - length
            header = json.loads(file.read(length)) if data >= 0 else {}
        ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        beyond = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > data]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return beyond[0] if beyond else None


def _verify(text: str, document: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Document and tensors against their digests; a tensor that is at fault is named."""
    digests, stated = _digests(tensors), document["sha256"]
    if stated == _digest_of_all(text.replace(_field(stated), _field(_UNSIGNED)), digests):
        return
    written, found = document["tensors"], _short(digests)
    if len(found) != len(written):
        _parse(document, tensors)  # which names a tensor that is missing
        raise CheckpointError(f"It holds {len(found) // 8} tensors instead of {len(written) // 8}.", REMEDY)
    for index, name in enumerate(digests):
        if found[8 * index :][:8] != written[8 * index :][:8]:
            raise CheckpointError(f"Tensor {name!r} and its digest disagree.", REMEDY)
    raise CheckpointError("Its document and its digest disagree.", REMEDY)


def _take(
    tensors: Mapping[str, np.ndarray], name: str, dtype: type[np.generic], shape: Sequence[int] | None = None
) -> np.ndarray:
    """The tensor of that name, if it has the type and shape."""
    if name not in tensors:
        raise CheckpointError(f"Tensor {name!r} is missing.", REMEDY)
    tensor = tensors[name]
    if shape is not None and list(tensor.shape) != list(shape):
        raise CheckpointError(f"Tensor {name!r} has shape {list(tensor.shape)} instead of {list(shape)}.", REMEDY)
    if tensor.dtype != dtype:
        raise CheckpointError(f"Tensor {name!r} is {tensor.dtype} instead of {np.dtype(dtype)}.", REMEDY)
    return tensor


def _parse(document: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Checkpoint:
    take = partial(_take, tensors)
    # Checkpoints of versions that quantized layers' inputs alone have no quantizers.
    tables = document["layers"], document.get("quantizers", [])
    groups = {name: attributes.get("groups", 1) for name, _, _, attributes in document["graph"]["nodes"]}
    layers = {entry[0]: _layer(take, document["border"], groups[entry[0]], *entry) for entry in tables[0]}
    values = {}
    for name, bits, zero_point in tables[1]:
        scale = None if _is_float(bits, name) else np.float32(take(f"{name}.scale", np.float32, [1])[0])
        values[name] = StoredValue(bits, zero_point, scale)
    constants = {name: take(name, np.float32) for name in tensors if name.rsplit(".", 1)[0] not in (*layers, *values)}
    return Checkpoint(document, layers, values, constants)


def _is_float(bits: Any, name: str) -> bool:
    if type(bits) is not int or not (2 <= bits <= 8 or bits == _FLOAT):
        raise CheckpointError(f"{name!r} has {bits!r} bits, not 2 to 8, nor {_FLOAT} for float.", REMEDY)
    return bits == _FLOAT


def _layer(
    take: Callable[..., np.ndarray],
    border: Mapping[str, Any] | None,
    groups: int,
    name: str,
    weight_bits: int,
    activation_bits: int,
    zero_point: int,
    shape: Sequence[int],
    has_bias: bool,
    *border_steps: float,
) -> StoredLayer:
    """A row of the layer table and its tensors."""
    outputs = shape[0]
    scale = weight_zero_point = input_scale = None
    if _is_float(weight_bits, name):
        weight = take(f"{name}.weight", np.float32, shape)
    else:
        count = math.prod(shape)
        packed = take(f"{name}.weight", np.uint8, [(count * weight_bits + 7) // 8])
        weight = unpack_codes(packed, weight_bits, count).reshape(shape)
        scale = take(f"{name}.weight_scale", np.float32, [outputs])
        weight_zero_point = take(f"{name}.weight_zero_point", np.uint8, [outputs])
    bias = take(f"{name}.bias", np.float32, [outputs]) if has_bias else None
    coefficients = alpha = None
    if not _is_float(activation_bits, name):
        input_scale = np.float32(take(f"{name}.input_scale", np.float32, [1])[0])
        if border is not None:
            positions = math.prod(shape[2:]) if border["granularity"] == "position" else 1
            coefficients, alpha = _border(take, border, name, groups * shape[1], positions, border_steps)
    return StoredLayer(
        weight, weight_bits, activation_bits, scale, weight_zero_point, bias, input_scale, zero_point, coefficients,
        alpha,
    )  # fmt: skip


def _border(
    take: Callable[..., np.ndarray],
    config: Mapping[str, Any],
    name: str,
    channels: int,
    positions: int,
    steps: Sequence[float],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Coefficients and alpha of a layer."""
    types = _TYPES_OF_BORDER[config.get("bits", 16)]  # the first version has no bits
    terms = 3 if config["form"] == "quadratic" else 2
    stored = {"border": take(f"{name}.border", types["border"], [terms, channels, positions])}
    if config["alpha"] == "learned" and positions > 1:
        stored["alpha"] = take(f"{name}.alpha", types["alpha"], [channels, positions])
    if len(steps) != (terms if types["border"] is np.int8 else 0):
        raise CheckpointError(f"Layer {name!r} has {len(steps)} steps of its border.", REMEDY)
    return decode_border(stored, steps)
