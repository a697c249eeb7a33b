"""What a quantization run is told to do; read by the API and by the core alike, so it imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Method = Literal["nearest", "aquant_no_border", "qdrop_refactored", "aquant"]
PresetName = Literal["smoke", "fast", "paper"]

FLOAT_BITS = 32
"""Bit width that stands for "not quantized"."""


def _check_bits(bits: int) -> int:
    if bits != FLOAT_BITS and not 2 <= bits <= 8:
        raise ValueError(f"must be 2 to 8, or {FLOAT_BITS} for float; got {bits}")
    return bits


Bits = Annotated[
    int,
    AfterValidator(_check_bits),
    Field(
        description="Bit width, 2 to 8, or 32 for float.",
        json_schema_extra={"enum": [2, 3, 4, 5, 6, 7, 8, 32]},
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BorderConfig(_Strict):
    """The rounding border's switches (section 4.2 and appendix B of the paper).

    ``form``: ``quadratic`` is Eq. 8; ``linear`` drops its square term (the paper's choice for MobileNetV2 and
    MNASNet). ``bound``: how the learned shift is kept within half a step (``steep``: sigmoid(2.5 v) - 1/2,
    ``stretched``: 2.5 (sigmoid(v) - 1/2) clipped, ``clip``: section 4.2's own). ``fusion``: ``channel_mean``
    is Eq. 9. ``alpha``: Eq. 9's weights, 1 or learned. ``granularity``: one border per im2col ``position``
    (the paper) or per input ``channel``. ``input_gradient``: whether the border's own dependence on its input
    carries gradient.
    """

    form: Literal["quadratic", "linear"] = "quadratic"
    bound: Literal["steep", "stretched", "clip"] = "steep"
    fusion: Literal["channel_mean", "none"] = "channel_mean"
    alpha: Literal["fixed", "learned"] = "fixed"
    granularity: Literal["position", "channel"] = "position"
    input_gradient: bool = True

    @model_validator(mode="after")
    def _refuse_meaningless(self) -> Self:
        if self.granularity == "channel" and self.fusion != "none":
            raise ValueError(
                'border.granularity "channel" has one border per channel and nothing to average: '
                'set border.fusion to "none"'
            )
        if self.alpha == "learned" and self.fusion != "channel_mean":
            raise ValueError(
                'border.alpha "learned" weighs the terms of the channel mean: set border.fusion to "channel_mean"'
            )
        return self


class LayerOverride(_Strict):
    """Bit widths of one layer, over those of the whole network."""

    weight_bits: Bits | None = None
    activation_bits: Bits | None = None


class QuantizationConfig(_Strict):
    """A quantization job's configuration; only the bit widths are required."""

    method: Method = "aquant"
    weight_bits: Bits
    activation_bits: Bits
    first_last_bits: Annotated[Bits, Field(description="Weights and inputs of the first and the last layer.")] = 8
    preset: PresetName = "fast"
    iterations: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Steps per block; null takes the preset's.")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    border: BorderConfig = BorderConfig()
    protocol: Literal["paper"] = "paper"
    architecture: Annotated[
        str | None, Field(max_length=64, description="Name of the network a state dict belongs to.")
    ] = None
    layers: Annotated[dict[str, LayerOverride], Field(max_length=4096)] = {}
