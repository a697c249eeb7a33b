"""The least that the service takes as an upload: a network of two layers and images for it."""

from __future__ import annotations

import io

import numpy as np
import onnx


def onnx_model() -> bytes:
    """A convolution and a linear layer on 1 x 8 x 8 images."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "fc.weight": rng.normal(size=(10, 4)).astype(np.float32),
    }
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def images() -> bytes:
    """64 labelled images of 1 x 8 x 8 as .npz."""
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, images=rng.integers(0, 256, (64, 1, 8, 8)).astype(np.uint8), labels=rng.integers(0, 10, 64)
    )
    return buffer.getvalue()
