"""Tells by its content what a model file is, and refuses what is damaged or never read.

What needs the model itself (operators, weights, shapes) is checked later, in the worker's sandbox.
"""

from __future__ import annotations

from typing import BinaryIO

from service.jobs.errors import ArchitectureMissingError, ModelInvalidError, ModelRefusedError
from service.jobs.safetensors_header import HeaderError, looks_like_safetensors, read_header
from service.jobs.zip_directory import DAMAGED, open_zip

FORMATS = "Send an ONNX file, or a safetensors state dict together with config.architecture."

# ModelProto's fields (onnx.proto): number -> wire type
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_ONNX_GRAPH = 7
_MAX_ONNX_FIELDS = 10_000


def check_model(file: BinaryIO, size: int, architecture: str | None) -> str:
    """The format of a model file: ``onnx``, ``safetensors`` or ``pth`` (a state dict, for the sandbox only).

    Raises:
        ModelRefusedError: a format that runs code when read.
        ModelInvalidError: not a model, or damaged; or ONNX, and an architecture besides.
        ArchitectureMissingError: a state dict, but of which network is not said.
    """
    head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        kind = _check_zip(file, size)
    elif head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ModelRefusedError(
            "The model is a bare pickle, which can run code when it is read.",
            "Save the weights with safetensors.torch.save_file(model.state_dict(), path) and name the "
            "network in config.architecture, or export the model with torch.onnx.export.",
        )
    elif looks_like_safetensors(head):
        kind = _check_safetensors(file, size)
    else:
        _check_onnx(file, size)
        if architecture is not None:  # as aquant_core.capture_model refuses it
            raise ModelInvalidError(
                f"The model is ONNX, and config.architecture names a network for a state dict: {architecture!r}.",
                "Leave it out, as ONNX holds its own network, or send the state dict that it was meant for.",
            )
        return "onnx"
    if architecture is None:
        raise ArchitectureMissingError(
            f"The model is a state dict ({kind}), which does not say what network it belongs to.",
            "Name the network in config.architecture (for example resnet18), or send an ONNX file.",
        )
    return kind


def _check_safetensors(file: BinaryIO, size: int) -> str:
    try:
        entries = read_header(file, size)
    except HeaderError as error:
        raise ModelInvalidError(
            f"The model is a damaged safetensors file: {error}.", "Save or upload it again."
        ) from error
    if not entries:
        raise ModelInvalidError("The model is a safetensors file without a tensor.", "Save it again.")
    return "safetensors"


def _check_zip(file: BinaryIO, size: int) -> str:
    """A zip is what torch.save, torch.jit.save and torch.export.save write; only the first is ever read."""
    try:
        with open_zip(file, size) as archive:
            entries = archive.infolist()
    except DAMAGED as error:
        raise ModelInvalidError(
            f"The model is a damaged zip archive ({error}), cut short perhaps.", "Save or upload it again."
        ) from error
    inner = {entry.filename.split("/", 1)[-1] for entry in entries}
    export = "torch.onnx.export(model, example, path, dynamo=True)"
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ModelRefusedError(
            "The model is a TorchScript archive, which carries code.",
            f"Load it where you trust it and export it to ONNX: {export}.",
        )
    if any(name.startswith(("models/", "serialized_", "archive_format")) for name in inner):
        raise ModelRefusedError(
            "The model is a torch.export archive (.pt2), whose reader is not safe with foreign files.",
            f"Load it where you trust it and export it to ONNX: {export}.",
        )
    if "data.pkl" not in inner:
        raise ModelInvalidError("The model is a zip archive, but not of PyTorch weights.", FORMATS)
    if any(entry.compress_size != entry.file_size for entry in entries):
        raise ModelInvalidError(
            "The model's archive is compressed, as torch.save never writes it.", "Send the file as torch.save wrote it."
        )
    return "pth"


def _check_onnx(file: BinaryIO, size: int) -> None:
    """Walk the outermost fields of the protobuf message, enough to notice another format or a cut."""
    position, count, seen = 0, 0, set()
    while position < size:
        count += 1
        if count > _MAX_ONNX_FIELDS:
            raise ModelInvalidError(f"The model is an ONNX file of more than {_MAX_ONNX_FIELDS} parts.", FORMATS)
        tag, position = _varint(file, position)
        number, wire = tag >> 3, tag & 7
        if _ONNX_FIELDS.get(number) != wire:
            raise ModelInvalidError(
                f"The model is no file this service knows: neither ONNX nor safetensors (byte {position}).",
                FORMATS,
            )
        value, position = _varint(file, position)
        if wire == 2:
            position += value
        seen.add(number)
        if position > size:
            raise ModelInvalidError(
                f"The model is an ONNX file cut short: a part of it should end at byte {position}, "
                f"the file has {size}.",
                "Upload it again.",
            )
    if _ONNX_GRAPH not in seen:
        raise ModelInvalidError("The model is an ONNX file without a graph, or cut short before it.", FORMATS)


def _varint(file: BinaryIO, position: int) -> tuple[int, int]:
    file.seek(position)
    value = 0
    for index, byte in enumerate(file.read(10)):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ModelInvalidError(f"The model is not an ONNX file, or is cut short (byte {position}).", FORMATS)
