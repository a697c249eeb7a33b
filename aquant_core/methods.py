"""The methods, as settings of one engine, and the presets, as what a run may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aquant_core.config import Method, PresetName

Placement = Literal["input", "output"]


@dataclass(frozen=True)
class MethodSettings:
    """What a method does with a network.

    Attributes:
        learn_weights: learn the weights' rounding.
        learn_scale: learn the activations' step.
        border: learn an adaptive rounding border.
        a_rounding: at inference, flip roundings until each window's error sums are small (section 3).
        placement: quantize activations at the input of layers, or where they are made (appendix B, figure 1).
        unit: reconstruct block by block, or layer by layer.
        rounding_schedule: introduce the activations' rounding error gradually (appendix Eq. 2).
        drop_input: probability that an element of the block's input is its float value (QDrop).
        drop_inside: the same for quantized values inside the block.
        regulariser_weight: lambda of appendix Eq. 4.
        first_beta, last_beta: the ends of its beta.
    """

    learn_weights: bool = True
    learn_scale: bool = True
    border: bool = False
    a_rounding: bool = False
    placement: Placement = "input"
    unit: Literal["block", "layer"] = "block"
    rounding_schedule: bool = False
    drop_input: float = 0.0
    drop_inside: float = 0.0
    regulariser_weight: float = 0.01
    first_beta: float = 20.0
    last_beta: float = 2.0

    @property
    def reconstruct(self) -> bool:
        """Whether anything is learned at all."""
        return self.learn_weights or self.learn_scale or self.border


METHODS: dict[Method, MethodSettings] = {
    # Rounding to nearest, with the searched steps.
    "nearest": MethodSettings(learn_weights=False, learn_scale=False),
    # Section 3 and appendix A: what motivates the border; weights float or to nearest.
    "a_rounding": MethodSettings(learn_weights=False, learn_scale=False, a_rounding=True),
    # Nagel et al. 2020, with the searched activation step; lambda, beta and warm-up are their code's, kept since.
    "adaround": MethodSettings(learn_scale=False, placement="output", unit="layer"),
    # Li et al. 2021. Its second stage, which learns the step alone, is joined with the first, as in QDrop's code.
    "brecq": MethodSettings(placement="output"),
    # Wei et al. 2022: half of the block's input and half of what is quantized inside keeps its float value.
    "qdrop": MethodSettings(placement="output", drop_input=0.5, drop_inside=0.5),
    # Appendix B, "Refactor the Position of Activation Quantization Node": QDrop at the layers' inputs.
    "qdrop_refactored": MethodSettings(drop_input=0.5, drop_inside=0.5),
    # AQuant with B = 1/2: what isolates the border.
    "aquant_no_border": MethodSettings(rounding_schedule=True, drop_input=0.5),
    # The paper; lambda and beta from appendix C, "Convergence of the Weight Rounding Scheme".
    "aquant": MethodSettings(
        border=True, rounding_schedule=True, drop_input=0.5, regulariser_weight=0.05, first_beta=16.0
    ),
}


@dataclass(frozen=True)
class Preset:
    """How long a block is reconstructed, and at which learning rates (Adam).

    Attributes:
        iterations: steps per block.
        batch_size: images per step.
        border_rate, scale_rate, rounding_rate: learning rates of the border, of the activation step (cosine to 0),
            and of the weights' rounding variables.
        border_decays: whether the border's rate falls to 0 as the step's does, or stays (the paper).
        changes: what it sets otherwise than ``METHODS``, by method.
    """

    iterations: int
    batch_size: int
    border_rate: float
    scale_rate: float
    rounding_rate: float
    border_decays: bool = False
    changes: Mapping[Method, Mapping[str, Any]] = field(default_factory=dict)


# The paper's dropping and stronger regulariser are for its 20,000 iterations; what they do to 300: docs/results.md.
_SHORT: Mapping[Method, Mapping[str, Any]] = {
    "aquant": {"drop_input": 0.0, "regulariser_weight": 0.01, "first_beta": 20.0},
    "aquant_no_border": {"drop_input": 0.0},
}

PRESETS: dict[PresetName, Preset] = {
    "smoke": Preset(20, 32, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2),
    "fast": Preset(300, 32, border_rate=2e-2, scale_rate=4e-4, rounding_rate=1e-2, border_decays=True, changes=_SHORT),
    # Section 5 and appendix C.
    "paper": Preset(20_000, 32, border_rate=1e-3, scale_rate=4e-5, rounding_rate=3e-3),
}


def settings_of(method: Method, preset: Preset) -> MethodSettings:
    """The method as the preset runs it."""
    return replace(METHODS[method], **preset.changes.get(method, {}))
