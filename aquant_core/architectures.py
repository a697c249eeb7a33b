"""The networks a state dict can be loaded into by name: torchvision's, and two of the paper's it lacks."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from aquant_core.errors import ModelFormatError, UnknownArchitectureError, WeightsMismatchError
from aquant_core.torchvision_import import import_torchvision

_PAPER_ONLY = ("mnasnet2_0", "regnet_x_600mf")


def architecture_names() -> list[str]:
    """Every name that ``build`` takes, sorted."""
    models = import_torchvision().models
    return sorted([*models.list_models(module=models), *_PAPER_ONLY])


def build(name: str, num_classes: int = 1000) -> nn.Module:
    """The named network with random weights, in evaluation mode.

    Raises:
        UnknownArchitectureError: no network has that name; the message offers the nearest ones.
    """
    models = import_torchvision().models
    if name not in architecture_names():
        near = difflib.get_close_matches(name, architecture_names(), n=3) or ["resnet18", "mobilenet_v2"]
        raise UnknownArchitectureError(
            f"Architecture {name!r} is not known.",
            f"Did you mean {', '.join(near)}? For a network of your own, submit ONNX.",
        )
    if name == "mnasnet2_0":
        model = models.MNASNet(alpha=2.0, num_classes=num_classes)
    elif name == "regnet_x_600mf":  # Radosavovic et al. 2020, appendix: RegNetX-600MF
        parameters = models.regnet.BlockParams.from_init_params(depth=16, w_0=48, w_a=36.97, w_m=2.24, group_width=24)
        norm = partial(nn.BatchNorm2d, eps=1e-5, momentum=0.1)
        model = models.RegNet(parameters, norm_layer=norm, num_classes=num_classes)
    else:
        extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=num_classes, **extra)
    built: nn.Module = model.eval()
    return built


def build_from_state_dict(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The named network with the given weights; the number of classes is the state dict's own.

    Raises:
        UnknownArchitectureError: see ``build``.
        WeightsMismatchError: weights are missing, left over, or of another shape.
    """
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ModelFormatError(
            "The file is not a state dict: it holds something other than tensors.",
            "Save model.state_dict(), not the model or a training checkpoint around it.",
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    model = build(name)
    last_bias = [key for key in model.state_dict() if key.endswith(".bias")][-1]  # the file's order may differ
    if last_bias in state and state[last_bias].shape != model.state_dict()[last_bias].shape:
        model = build(name, num_classes=state[last_bias].numel())
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(state) - optional)
    extra = sorted(set(state) - set(expected))
    reshaped = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or extra or reshaped:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", reshaped))
            if names
        ]
        raise WeightsMismatchError(
            f"The weights do not fit {name}: {'; '.join(parts)}.",
            "Give the architecture they were trained in, or submit ONNX.",
        )
    # MNASNet asks for the version of its layout, which files of plain tensors do not keep; the shapes fit this one.
    versioned = OrderedDict(state)
    versioned._metadata = expected._metadata  # type: ignore[attr-defined]
    with torch.no_grad():
        model.load_state_dict(versioned, strict=False)
    return model
