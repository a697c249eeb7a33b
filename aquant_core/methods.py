"""The methods, as settings of one engine, and the presets, as what a run may cost."""

from __future__ import annotations

from dataclasses import dataclass

from aquant_core.config import Method, PresetName


@dataclass(frozen=True)
class MethodSettings:
    """What a method does with a block.

    Attributes:
        reconstruct: learn anything at all.
        border: learn an adaptive rounding border.
        rounding_schedule: introduce the activations' rounding error gradually (appendix Eq. 2).
        drop_input: probability that an element of the block's input is its float value (QDrop).
        drop_inside: the same for quantized values inside the block.
        regulariser_weight: lambda of appendix Eq. 4.
        first_beta, last_beta: the ends of its beta.
    """

    reconstruct: bool = True
    border: bool = False
    rounding_schedule: bool = False
    drop_input: float = 0.0
    drop_inside: float = 0.0
    regulariser_weight: float = 0.01
    first_beta: float = 20.0
    last_beta: float = 2.0


METHODS: dict[Method, MethodSettings] = {
    # Rounding to nearest, with the searched steps.
    "nearest": MethodSettings(reconstruct=False),
    # Appendix B: QDrop (Wei et al. 2022) with the quantizers moved to the layers' inputs.
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
    """

    iterations: int
    batch_size: int
    border_rate: float
    scale_rate: float
    rounding_rate: float


PRESETS: dict[PresetName, Preset] = {
    "smoke": Preset(20, 32, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2),
    "fast": Preset(300, 32, border_rate=3e-2, scale_rate=4e-4, rounding_rate=1e-2),
    # Section 5 and appendix C.
    "paper": Preset(20_000, 32, border_rate=1e-3, scale_rate=4e-5, rounding_rate=3e-3),
}
