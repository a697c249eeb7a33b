"""A network's file as a function from images to logits: a checkpoint, or ONNX in onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from torch import Tensor

from aquant_core.checkpoint_torch import load
from aquant_core.errors import ModelFormatError
from aquant_core.evaluation import logits_of
from aquant_core.images import ImageSet, check_image_shape, check_labels
from aquant_core.model import QuantizedModel
from aquant_core.runtime import IntegerModel

_FAILURES = tuple(
    getattr(onnxruntime_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)


@dataclass(frozen=True)
class Network:
    """What is there to be run.

    Attributes:
        run: (N, C, H, W) images to (N, classes) logits.
        input_shape: (C, H, W), None where it takes any size.
        device: where the images are wanted.
    """

    run: Callable[[Tensor], Tensor]
    input_shape: Sequence[int | None]
    device: torch.device

    def logits_of(self, images: ImageSet) -> Tensor:
        """(N, classes), on the CPU; the labels, if there are any, are among the classes.

        Raises:
            ImageSetError: images of another shape, or labels beyond the network's classes.
            ModelFormatError: onnxruntime cannot run it.
        """
        check_image_shape(self.input_shape, images.images, "evaluation")
        logits = logits_of(self.run, images.images, self.device)
        check_labels(logits.shape[1], images, "evaluation")
        return logits


def open_network(path: Path, device: torch.device, integers: bool = False) -> Network:
    """The network of a file; the content decides what it is, not the name.

    Args:
        path: a checkpoint, or an ONNX network, which runs on the CPU whatever ``device`` is.
        device: where a checkpoint runs.
        integers: whether a checkpoint runs as an ``IntegerModel``.

    Raises:
        CheckpointError: a checkpoint that cannot be used.
        ModelFormatError: neither a checkpoint nor an ONNX network that onnxruntime runs.
    """
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if not is_safetensors:
        return _open_onnx(path)
    model = load(path, device)
    assert isinstance(model, QuantizedModel)
    return Network(IntegerModel(model) if integers else model, model.graph.input_shape, device)


def _open_onnx(path: Path) -> Network:
    remedy = "Give a checkpoint, or an ONNX file with one input and one output that onnxruntime runs on the CPU."
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except _FAILURES as error:
        raise ModelFormatError(f"{path} is neither a checkpoint nor runs in onnxruntime: {error}.", remedy) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4:
        shapes = [value.shape for value in inputs]
        raise ModelFormatError(f"{path} has inputs of shape {shapes} and {len(outputs)} outputs.", remedy)

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {inputs[0].name: images.numpy()})[0])
        except _FAILURES as error:
            raise ModelFormatError(f"{path} cannot be run: {error}.", remedy) from error

    batch, *shape = (size if isinstance(size, int) else None for size in inputs[0].shape)
    if batch is not None:
        raise ModelFormatError(
            f"{path} takes {batch} images at a time, no more and no less.", "Export it with a free batch size."
        )
    return Network(run, shape, torch.device("cpu"))
