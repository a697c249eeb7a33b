"""What a quantization run is told to do; read by the API and by the core alike, so it imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Method = Literal[
    "nearest", "a_rounding", "adaround", "brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"
]
PresetName = Literal["smoke", "fast", "paper"]
ProtocolName = Literal["paper", "qdrop", "brecq", "all-low-bit"]

FLOAT_BITS = 32
"""Bit width that stands for "not quantized"."""
SEARCHED_FROM = 2
"""The least bits that a layer gets where a target is given and nothing is said of widths."""


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
    carries gradient. ``bits``: in which each of its parameters is stored, and to which it is rounded when its block
    is finished: 16 (the paper, section 5.3) or 8.
    """

    form: Literal["quadratic", "linear"] = "quadratic"
    bound: Literal["steep", "stretched", "clip"] = "steep"
    fusion: Annotated[
        Literal["channel_mean", "none"],
        Field(
            description="Where a job says nothing: channel_mean for preset paper or a learned alpha, else none.",
            json_schema_extra=lambda schema: schema.pop("default"),
        ),
    ] = "channel_mean"
    alpha: Literal["fixed", "learned"] = "fixed"
    granularity: Literal["position", "channel"] = "position"
    input_gradient: bool = True
    bits: Annotated[
        Literal[16, 8], Field(description="In which each of its parameters is stored: fp16, or 8 bits with a step.")
    ] = 16

    @model_validator(mode="after")
    def _refuse_meaningless(self) -> Self:
        if self.granularity == "channel" and self.alpha == "learned":
            raise ValueError(
                'border.alpha "learned" weighs the positions of a window, which border.granularity "channel" has not: '
                'set border.alpha to "fixed", or border.granularity to "position"'
            )
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


class Protocol(_Strict):
    """What is kept at more bits than the rest, which published tables mix silently.

    ``high`` stands for ``first_last_bits``, ``low`` for the network's own widths.

    Attributes:
        first_last_weights: weights of the first and the last layer.
        model_input: the images, wherever a layer reads them.
        last_layer_input: what the last layer reads.
        second_layer_input: what is read of the first layer's output.
        shortcut: the value that an identity shortcut adds. Methods that quantize outputs quantize it anyway.
    """

    first_last_weights: Literal["high", "low"]
    model_input: Literal["high", "low", "float"]
    last_layer_input: Literal["high", "low"]
    second_layer_input: Literal["high", "low"]
    shortcut: Literal["float", "low"]


def _protocol(*switches: str) -> Protocol:
    return Protocol.model_validate(dict(zip(Protocol.model_fields, switches, strict=True)))


PROTOCOLS: dict[ProtocolName, Protocol] = {
    # Section 5.3's parameter counts include the first and the last layer, so both have a border, at 8 bits.
    "paper": _protocol("high", "high", "high", "low", "float"),
    # QDrop (Wei et al. 2022), its published code: images stay float; outputs are quantized, shortcuts with them.
    "qdrop": _protocol("high", "float", "high", "low", "low"),
    # BRECQ (Li et al. 2021), its published code for ResNets: the first layer's output has 8 bits, the last layer's
    # input has not.
    "brecq": _protocol("high", "float", "low", "high", "low"),
    "all-low-bit": _protocol("low", "low", "low", "low", "low"),
}
"""Where the published tables keep more bits: weights of first and last layer, images, last and second layer's input,
shortcut."""


class ProtocolSwitches(_Strict):
    """What is to be otherwise than in the named protocol; null leaves it as it is (see ``Protocol``)."""

    first_last_weights: Literal["high", "low"] | None = None
    model_input: Literal["high", "low", "float"] | None = None
    last_layer_input: Literal["high", "low"] | None = None
    second_layer_input: Literal["high", "low"] | None = None
    shortcut: Literal["float", "low"] | None = None


Pixels = Annotated[int, Field(ge=1, le=4096)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_tuple(value: object) -> object:
    """JSON has no tuples: where a list stands for one, strict validation takes it, too."""
    return tuple(value) if isinstance(value, list) else value


_FromList = BeforeValidator(_as_tuple)


class Preprocess(_Strict):
    """How image files become what the network takes, as torchvision does it; the defaults are ImageNet's usual ones.

    An image is resized, cropped, scaled to [0, 1], and normalized: (x - mean) / std. Three means make it RGB, one makes
    it grey.
    """

    size: Annotated[
        Pixels | tuple[Pixels, Pixels], _FromList, Field(description="Of the shorter side, or [height, width].")
    ] = 256
    crop: Annotated[
        Pixels | tuple[Pixels, Pixels] | None,
        _FromList,
        Field(description="From the centre; null keeps the whole image."),
    ] = 224
    mean: Annotated[tuple[_Number, ...], _FromList, Field(min_length=1, max_length=3)] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[_Deviation, ...], _FromList, Field(min_length=1, max_length=3)] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _agree_on_channels(self) -> Self:
        counts = len(self.mean), len(self.std)
        if counts not in ((1, 1), (3, 3)):
            raise ValueError(
                f"mean and std have {counts[0]} and {counts[1]} values; give both 3 (RGB) or both 1 (grey)"
            )
        return self


class Target(_Strict):
    """What the result is to hold; the bit widths of the layers are searched for it.

    ``max_accuracy_drop``: percentage points of top-1 against the float network, on the evaluation images; without
    labels, percent of images decided otherwise than by the float network.
    """

    max_accuracy_drop: Annotated[
        float,
        Field(ge=0, le=100, description="Percentage points of top-1 that may be lost against the float network."),
    ]


def _bits_or_target(schema: dict[str, Any]) -> None:
    """The JSON schema says that a target stands in for the bit widths."""
    bits = ["weight_bits", "activation_bits"]
    schema["required"] = [name for name in schema["required"] if name not in bits]
    schema["anyOf"] = [{"required": bits}, {"required": ["target"]}]


class QuantizationConfig(_Strict, json_schema_extra=_bits_or_target):
    """A quantization job's configuration; only the bit widths are required, or a target.

    With a target ``weight_bits`` and ``activation_bits`` (2 where nothing is said) are the least that a layer gets, and
    ``layers`` are kept as they are.
    """

    method: Method = "aquant"
    weight_bits: Bits
    activation_bits: Bits
    first_last_bits: Annotated[
        Bits, Field(description="What the protocol keeps at more bits: weights and inputs of first and last layer.")
    ] = 8
    preset: PresetName = "fast"
    iterations: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Steps per block; null takes the preset's.")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    border: Annotated[BorderConfig, Field(default_factory=BorderConfig)]
    protocol: Annotated[
        ProtocolName, Field(description="What is kept at `first_last_bits`, and whether shortcuts are quantized.")
    ] = "paper"
    protocol_switches: ProtocolSwitches = ProtocolSwitches()
    architecture: Annotated[
        str | None, Field(max_length=64, description="Name of the network a state dict belongs to.")
    ] = None
    preprocess: Annotated[
        Preprocess | None, Field(description="How image files are prepared; arrays are taken as they are.")
    ] = None
    layers: Annotated[dict[str, LayerOverride], Field(max_length=4096)] = {}
    compare: Annotated[
        list[Method], Field(max_length=8, description="Methods to run beside `method`, for one table in the report.")
    ] = []
    dry_run: Annotated[
        bool, Field(description="End after the forecast: blocks, layers, bits, size, time and memory; no checkpoint.")
    ] = False
    target: Annotated[
        Target | None,
        Field(
            description="Search the layers' bit widths, from the two above upwards, for the smallest network that holds"
        ),
    ] = None
    sensitivity: Annotated[
        bool,
        Field(description="Measure what more bits for a layer would gain; takes about a quarter of the run's time."),
    ] = True

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_lowest(cls, data: Any) -> Any:
        """With a target the widths may be left unsaid."""
        if not isinstance(data, dict) or data.get("target") is None:
            return data
        return {"weight_bits": SEARCHED_FROM, "activation_bits": SEARCHED_FROM} | data

    @model_validator(mode="before")
    @classmethod
    def _choose_fusion(cls, data: Any) -> Any:
        """Where nothing is said of fusion, the paper's recipe has it and the short ones do without."""
        if not isinstance(data, dict):
            return data
        border = data.get("border", {})
        if isinstance(border, BorderConfig):
            border = border.model_dump(exclude_unset=True)
        if not isinstance(border, dict) or "fusion" in border:
            return data
        by_channel = border.get("granularity") == "channel"
        fused = not by_channel and (border.get("alpha") == "learned" or data.get("preset") == "paper")
        return data | {"border": border | {"fusion": "channel_mean" if fused else "none"}}

    @model_validator(mode="after")
    def _refuse_running_twice(self) -> Self:
        methods = [self.method, *self.compare]
        twice = next((name for name in methods if methods.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'compare: "{twice}" would run twice; name each method once, and not "method" itself')
        return self

    @model_validator(mode="after")
    def _refuse_meaningless_target(self) -> Self:
        if self.target is None:
            return self
        if self.compare:
            raise ValueError(
                'compare: methods are compared at given widths, which "target" is to find: leave one of the two out'
            )
        if self.weight_bits == FLOAT_BITS:
            raise ValueError(
                f'target: with "weight_bits" {FLOAT_BITS} no width would make the network smaller: '
                "set it to the least that a layer may have, 2 to 8, or leave it out"
            )
        return self

    @property
    def resolved_protocol(self) -> Protocol:
        """The named protocol with the switches that the configuration sets otherwise."""
        switches = self.protocol_switches.model_dump(exclude_none=True)
        return PROTOCOLS[self.protocol].model_copy(update=switches)
