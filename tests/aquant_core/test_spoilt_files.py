"""Whatever a file holds, the core's readers end with one of its own errors, or take it.

``--hypothesis-profile=long`` tries many times as many. Here is no sandbox: a limit on memory stands in for it.
"""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import uploads
from hostile import corpus
from hostile_files import npy, png, tar_entry, tarred, zipped
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto
from safetensors.numpy import save
from spoiling import found_before, spoilt

from aquant_core.capture_model import capture
from aquant_core.config import Preprocess
from aquant_core.errors import AQuantError, UnknownArchitectureError, memory_is_full
from aquant_core.images import read_images

ROOM = 2 * 2**30
EXAMPLE = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PREPROCESS = Preprocess(size=8, crop=8, mean=(0.0,), std=(1.0,))

FILES = [(one.slot, one.data(Path("nowhere"))) for one in corpus() if one.inside]
SMALL = [(slot, data) for slot, data in FILES if len(data) < 20_000]
PICTURE = png(8, 8)


def state_dict() -> bytes:
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2)}, buffer)
    return buffer.getvalue()


MODELS = [
    uploads.onnx_model(),
    uploads.onnx_model(),
    state_dict(),
    save({"fc.weight": np.ones((2, 2), np.float32)}),
    *(data for slot, data in SMALL if slot == "model"),
]
IMAGES = [
    uploads.images(),
    npy(np.zeros((2, 1, 8, 8), np.float16)),
    zipped({"a/1.png": PICTURE, "b/2.png": PICTURE}),
    zipped({"a/1.png": PICTURE}, zipfile.ZIP_DEFLATED),
    tarred(tar_entry("a/1.png", size=len(PICTURE)), body=PICTURE),
    save({"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": np.zeros(2, np.int64)}),
    *(data for slot, data in SMALL if slot == "calibration"),
]


@pytest.fixture(scope="module", autouse=True)
def limited() -> Iterator[None]:
    """What claims to be large fails at once, as in the sandbox."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def has_words(error: AQuantError) -> None:
    assert error.detail
    assert error.remedy
    str(error).encode()


def answered(reader: str, path: Path) -> None:
    """It is taken, or refused in words, or too large."""
    try:
        if reader == "networks":
            capture(path, "nothing", EXAMPLE)
        else:
            assert read_images(path, preprocess=PREPROCESS).images.isfinite().all()
    except UnknownArchitectureError:
        pass  # a state dict could be read
    except AQuantError as error:
        has_words(error)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):  # to which the worker has an answer
            raise


@pytest.mark.parametrize(
    "path", [path for name in ("networks", "pictures") for path in found_before(name)], ids=lambda path: path.name
)
def test_what_once_broke_a_reader(path: Path) -> None:
    answered(path.parent.name, path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoilt") / "file"


@settings(deadline=None)
@given(data=spoilt(MODELS))
def test_networks(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    answered("networks", path)


OPERATORS = [
    "Conv", "Gemm", "MatMul", "BatchNormalization", "MaxPool", "AveragePool", "Reshape", "Split", "Concat", "Slice",
    "Pad", "ReduceMean", "Clip", "Squeeze", "Unsqueeze", "Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "LeakyRelu",
    "Elu", "Gelu", "Softmax", "GlobalAveragePool", "Flatten", "Transpose", "HardSigmoid", "Cast", "Dropout", "Identity",
    "Shape", "Constant", "ConstantOfShape", "Gather", "Range", "Expand", "Tile", "Where", "Hardmax",
]  # fmt: skip
ATTRIBUTES = [
    "group", "pads", "strides", "dilations", "kernel_shape", "axis", "axes", "perm", "keepdims", "alpha", "beta",
    "transA", "transB", "to", "auto_pad", "mode", "ceil_mode", "epsilon", "split", "start", "end", "value",
    "min", "max",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 2, 7, 64, 2**20, 2**31, 2**63 - 1, -(2**63)]),
    st.lists(st.sampled_from([0, 1, -1, 2, 3, 8, 2**20, 2**62]), max_size=8),
    st.floats(width=32),
    st.sampled_from(["SAME_UPPER", "VALID", "reflect", "none", "\N{SNOWMAN}"]),
)


@st.composite
def rewritten(draw: st.DrawFn) -> bytes:
    """The sound network, some of its parts exchanged for others that are well-formed by themselves."""
    model = onnx.load_from_string(uploads.onnx_model())
    graph = model.graph
    for _ in range(draw(st.integers(1, 4))):
        names = [value for node in graph.node for value in (*node.input, *node.output)] + ["x", "nowhere", ""]
        node = draw(st.sampled_from(graph.node))
        match draw(st.sampled_from(("operator", "attribute", "input", "output", "dims", "type", "insert", "constant"))):
            case "operator":
                node.op_type = draw(st.sampled_from(OPERATORS))
            case "attribute":
                name, value = draw(st.sampled_from(ATTRIBUTES)), draw(VALUES)
                node.attribute.append(onnx.helper.make_attribute(name, value, attr_type=kind_of(value)))
            case "input" if node.input:
                node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
            case "output":
                node.output[0] = draw(st.sampled_from(names))
            case "dims":
                weight = draw(st.sampled_from(graph.initializer))
                del weight.dims[:]
                weight.dims.extend(draw(st.lists(st.sampled_from([0, 1, 3, 4, 9, 36, -1, 2**40]), max_size=5)))
            case "type":
                draw(st.sampled_from(graph.initializer)).data_type = draw(st.integers(0, 24))
            case "insert":
                inputs = draw(st.lists(st.sampled_from(names), max_size=4))
                added = onnx.helper.make_node(draw(st.sampled_from(OPERATORS)), inputs, [draw(st.sampled_from(names))])
                graph.node.insert(draw(st.integers(0, len(graph.node))), added)
            case "constant":
                array = np.array(draw(st.lists(st.sampled_from([0, 1, -1, 2, 8, 64, 2**20, 2**40]), max_size=8)))
                graph.initializer.append(
                    onnx.numpy_helper.from_array(array.astype(np.int64), draw(st.sampled_from(names)))
                )
    return bytes(model.SerializeToString())


def kind_of(value: object) -> int:
    """An empty list does not tell its type."""
    kinds = {
        int: AttributeProto.INT,
        float: AttributeProto.FLOAT,
        str: AttributeProto.STRING,
        list: AttributeProto.INTS,
    }
    return kinds[type(value)]


@settings(deadline=None)
@given(data=rewritten())
def test_networks_that_contradict_themselves(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    answered("networks", path)


@settings(deadline=None)
@given(data=spoilt(IMAGES))
def test_images(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    answered("pictures", path)
