"""Takes a network in, whatever form it came in, and gives the one graph form back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aquant_core.architectures import build_from_state_dict
from aquant_core.capture_onnx import capture_onnx
from aquant_core.capture_torch import capture_module
from aquant_core.errors import CaptureMismatchError, ModelFormatError, NonFiniteError
from aquant_core.graph import CapturedModel
from aquant_core.images import check_image_shape
from aquant_core.onnx_file import onnx_input_shape

_DEFAULT_SIZE = 224
_FLOAT32 = "float32 weights are needed: call model.float() first."


def capture(
    model: CapturedModel | nn.Module | str | Path,
    architecture: str | None = None,
    example: Tensor | None = None,
) -> CapturedModel:
    """Captures a network and checks that the graph reproduces it.

    Args:
        model: a torch module, or the path of an ONNX file, of a safetensors state dict, or of a ``.pth``
            state dict (read with ``weights_only=True``); the state dicts need ``architecture``.
        architecture: a name of ``aquant_core.architectures``.
        example: two or more images (N, C, H, W) of the size the network is used at. Without them random ones
            of the size the ONNX file declares, else 224 x 224.

    Raises:
        ModelFormatError, UnsupportedOperatorError, UnknownArchitectureError, WeightsMismatchError,
        NonFiniteError, CaptureMismatchError, ImageSetError: see ``aquant_core.errors``.
    """
    if isinstance(model, CapturedModel):
        return model
    if isinstance(model, nn.Module):
        return _checked_module(model, example)
    path = Path(model)
    if not path.is_file():
        raise ModelFormatError(f"{path} is not a file.", "Give the path of an ONNX file or of a state dict.")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        state = _read_pth(path)
    elif head[8:9] == b"{":
        state = _read_safetensors(path)
    else:
        if architecture is not None:
            raise ModelFormatError(
                f'The file is no state dict, and "architecture" names a network for one: {architecture!r}.',
                "Leave it out: ONNX holds its own network.",
            )
        declared = onnx_input_shape(path)
        if example is None:
            channels, height, width = declared
            example = _random_images(channels or 3, height or _DEFAULT_SIZE, width or _DEFAULT_SIZE)
        check_image_shape(declared, example, "calibration")
        return capture_onnx(path, example)
    if architecture is None:
        raise ModelFormatError(
            "The file is a state dict: weights without a network.",
            'Name the network they belong to in "architecture", or submit ONNX.',
        )
    return _checked_module(build_from_state_dict(architecture, state), example)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelFormatError(
            f"The safetensors file is damaged: {error}.", "Write it again with save_file."
        ) from error


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and others
        raise ModelFormatError(
            f"The file cannot be read as a state dict of plain tensors ({type(error).__name__}).",
            "Save model.state_dict() with torch.save, or better: with safetensors.torch.save_file.",
        ) from error
    if not isinstance(state, dict) or not state:
        raise ModelFormatError(f"The file holds a {type(state).__name__}.", "Save model.state_dict() alone.")
    return state


def _random_images(channels: int, height: int, width: int) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def _checked_module(model: nn.Module, example: Tensor | None) -> CapturedModel:
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise ModelFormatError(f"Weight {name!r} is {str(tensor.dtype).removeprefix('torch.')}.", _FLOAT32)
    if example is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        example = _random_images(first.in_channels if first else 3, _DEFAULT_SIZE, _DEFAULT_SIZE)
    captured = capture_module(model, example)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        expected = model(example.to(next(model.parameters()).device, copy=True)).cpu()  # it may write into it
    model.train(was_training)
    if not torch.isfinite(expected).all():
        raise NonFiniteError("The float network gives NaN or infinity.", "Check its weights and the images' scaling.")
    actual = captured(example)
    difference = float((actual - expected).abs().max())
    if not difference <= 1e-4 * max(float(expected.abs().max()), 1e-6):
        raise CaptureMismatchError(
            f"The captured graph differs from the module by {difference:.3g}.",
            "Its forward does something that tracing does not see; export it to ONNX and submit that.",
        )
    return captured
