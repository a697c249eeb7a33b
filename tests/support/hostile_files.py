"""Makes files that do harm or claim what is not so: containers, networks, state dicts, pictures."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import uploads
from onnx import TensorProto, helper, numpy_helper

TERA = 2**40


class Payload:
    """Unpickled, it makes the file, and ends the process that did so."""

    def __init__(self, marker: Path) -> None:
        self.program = (
            f"import os\ntry:\n open({str(marker)!r}, 'w').close()\n"
            f"except OSError:\n os.system('touch {marker}')\nraise SystemExit('the payload ran')"
        )

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (self.program,)


def pickled(marker: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Payload(marker), protocol)


# ---- Containers


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_of(header: str, body: bytes = b"", claimed: int | None = None, version: int = 1) -> bytes:
    length = len(header) if claimed is None else claimed
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + length.to_bytes(2 if version == 1 else 4, "little")
        + header.encode()
        + body
    )


def npy_of_objects(marker: Path) -> bytes:
    """An array of Python objects, as numpy writes it."""
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (64, 1, 8, 8), }"
    return npy_of(header, pickled(marker))


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def encrypted(data: bytes) -> bytes:
    """Its entries are said to be encrypted."""
    spoilt = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = spoilt.find(signature)
        while at >= 0:
            spoilt[at + offset] |= 1
            at = spoilt.find(signature, at + 4)
    return bytes(spoilt)


def overlapping(name: str, data: bytes, count: int = 200) -> bytes:
    """Many entries of the directory share one piece of the archive (Fifield's zip bomb, in its simplest form)."""
    whole = zipped({name: data}, zipfile.ZIP_DEFLATED)
    start, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    entry = whole[start:end]
    directory = b"".join(
        entry.replace(name.encode(), f"{index:0{len(name) - 4}d}{name[-4:]}".encode()) for index in range(count)
    )
    finish = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    return whole[:start] + directory + finish


def lying_directory(data: bytes, size: int) -> bytes:
    """The directory is said to take ``size`` bytes."""
    at = data.rindex(b"PK\x05\x06")
    return data[: at + 12] + struct.pack("<L", size) + data[at + 16 :]


def lying_directory_64(data: bytes, size: int) -> bytes:
    """The same in a zip64 record, which comes before the plain one."""
    at = data.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0)
    return data[:at] + record + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1) + data[at:]


def linked_zip(target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("link.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, target)
    return buffer.getvalue()


def tarred(*entries: tarfile.TarInfo, body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    for entry in entries:
        buffer.write(entry.tobuf(tarfile.GNU_FORMAT))
        buffer.write(body.ljust(-(-len(body) // 512) * 512, b"\0"))
    return buffer.getvalue() + bytes(10240)


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, target
    return entry


def png(width: int, height: int) -> bytes:
    """White, in one bit a pixel: few bytes however many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    packer, row, packed = zlib.compressobj(9), b"\0" + b"\xff" * -(-width // 8), []
    packed.extend(packer.compress(row) for _ in range(height))
    pixels = b"".join(packed) + packer.flush()
    header = struct.pack(">2L5B", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def safetensors_of(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# ---- Networks


def network(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    kind: int = TensorProto.FLOAT,
    inputs: tuple[str, ...] = ("x",),
) -> onnx.ModelProto:
    """A network on 1 x 8 x 8 images whose output is called ``y``."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, ["n", 1, 8, 8]) for name in inputs],
        [helper.make_tensor_value_info("y", kind, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def serialized(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


def classified(*before: onnx.NodeProto, source: str, **weights: np.ndarray) -> bytes:
    """Some nodes, then a linear layer on what they make of ``x``."""
    matrix = {"fc.weight": np.full((64, 10), 0.1, np.float32)}
    nodes = [helper.make_node("Flatten", [source], ["flat"]), helper.make_node("MatMul", ["flat", "fc.weight"], ["y"])]
    return serialized(network([*before, *nodes], matrix | weights))


def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    """The sound network with one thing changed."""
    model = onnx.load_from_string(uploads.onnx_model())
    change(model)
    return serialized(model)


def flipped(data: bytes, *positions: float) -> bytes:
    """A bit is turned at each of these places, given as shares of the length."""
    spoilt = bytearray(data)
    for position in positions:
        spoilt[int(position * len(spoilt))] ^= 0x10
    return bytes(spoilt)


def first_weight(**changes: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for name, value in changes.items():
            weight = model.graph.initializer[0]
            if name == "dims":
                del weight.dims[:]
                weight.dims.extend(value)
            else:
                setattr(weight, name, value)

    return change


def first_values(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        array = numpy_helper.to_array(weight).copy()
        array.flat[3] = value
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    return change


def outside(model: onnx.ModelProto) -> None:
    """The weight lies in a file of the machine that reads it."""
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../../../etc/passwd"), ("offset", "0"), ("length", "144")):
        weight.external_data.add(key=key, value=value)


def outside_in_a_constant(model: onnx.ModelProto) -> None:
    outside(model)
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))


def outside_in_a_branch(model: onnx.ModelProto) -> None:
    outside(model)
    inner = helper.make_graph([], "inner", [], [], [model.graph.initializer[0]])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "conv.weight"))
    model.graph.node.add(op_type="If", output=["z"]).attribute.append(helper.make_attribute("then_branch", inner))


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-2].output[0]


def many_nodes(count: int) -> bytes:
    chain = [helper.make_node("Relu", ["x" if not i else f"v{i}"], [f"v{i + 1}"]) for i in range(count)]
    return classified(*chain, source=f"v{count}")


def nested_branches(depth: int) -> bytes:
    """If within If, in both branches."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "leaf",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
        branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    outermost = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    return classified(outermost, source="z", c=np.array(True))


def nested_messages(depth: int) -> bytes:
    """ModelProto.graph.node.attribute.g.node.attribute. ... without end."""
    message = b""
    for _ in range(depth):
        for number in (6, 5, 1):  # attribute's g, node's attribute, graph's node
            message = field_of(number, message)
    return field_of(8, b"\x10\x12") + field_of(7, message)


def field_of(number: int, data: bytes) -> bytes:
    length, prefix = len(data), bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((number << 3 | 2,)) + bytes(prefix) + bytes((length,)) + data


def folded(operator: str, **values: np.ndarray) -> bytes:
    """An operator over constants, whose result is added to the images."""
    nodes = [helper.make_node(operator, list(values), ["huge"]), helper.make_node("Add", ["x", "huge"], ["sum"])]
    return classified(*nodes, source="sum", **values)


# ---- PyTorch's files


def torch_archive(data: bytes, name: str = "archive", **more: bytes) -> bytes:
    files = {f"{name}/data.pkl": data, f"{name}/byteorder": b"little", f"{name}/version": b"3\n"}
    return zipped(files | {f"{name}/{entry}": content for entry, content in more.items()})


def state_dict(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def huge_storage() -> bytes:
    """A state dict whose one tensor claims a tebibyte that the archive has not."""
    sound = state_dict({"fc.weight": torch.zeros(300, 300)})
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    pickle_name = next(name for name in files if name.endswith("data.pkl"))
    claimed = files[pickle_name].replace(struct.pack("<cI", b"J", 90_000), struct.pack("<cI", b"J", 2**31 - 1))
    assert claimed != files[pickle_name]
    files[pickle_name] = claimed
    return zipped(files)


def pickled_module() -> bytes:
    return state_dict(torch.nn.Sequential(torch.nn.ReLU()))


# ---- Images


def npz(**arrays: np.ndarray) -> bytes:
    return zipped({f"{name}.npy": npy(array) for name, array in arrays.items()}, zipfile.ZIP_DEFLATED)
