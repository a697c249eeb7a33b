"""The accuracy report as a schema, for readers in Python and, by its JSON schema in the API's, in any language.

Keys that reports before 0.3 do not have are null for those; numbers that were not finite are null, too.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from aquant_core.config import Method, QuantizationConfig

Interval = Annotated[list[float], Field(min_length=2, max_length=2, description="Low and high end, 95 %.")]
Number = float | None
"""Null where it was not finite."""


class Accuracy(BaseModel):
    """Of one network on labelled images, as fractions."""

    top1: float
    top5: float
    n: Annotated[int, Field(description="Images.")]
    interval: Annotated[Interval, Field(description="Of top1 (Wilson).")]


class Fidelity(BaseModel):
    """How like the float network's its outputs are; needs no labels."""

    agreement: Annotated[float, Field(description="Share of images with the float network's decision.")]
    interval: Annotated[Interval | None, Field(description="Of the agreement (Wilson).")] = None
    cosine: Annotated[Number, Field(description="Mean cosine of the two networks' logits.")]
    sqnr_db: Annotated[Number, Field(description="Signal-to-quantization-noise ratio of the logits.")]
    n: int


class AccuracyTable(BaseModel):
    """Of the float network, of all rounded to nearest, and of the method asked for."""

    float: Accuracy
    nearest: Accuracy
    quantized: Accuracy


class FidelityTable(BaseModel):
    """Of all rounded to nearest, and of the method asked for."""

    nearest: Fidelity
    quantized: Fidelity


class MethodRow(BaseModel):
    """One method of ``method`` and ``compare``."""

    method: Method
    accuracy: Accuracy | None
    fidelity: Fidelity
    shortcut: Annotated[str | None, Field(description="Whether shortcuts add float or low-bit values.")]
    block_errors: dict[str, Number]
    border_parameters: int
    seconds: Annotated[float, Field(description="Of the blocks' reconstruction.")]
    logits: Annotated[str, Field(description="sha256 of the logits on the evaluation images.")]


class Difference(BaseModel):
    """Top-1 of ``method`` less that of ``baseline`` on the same images."""

    method: str
    baseline: Annotated[str, Field(description="float, or a method.")]
    top1: float
    interval: Annotated[Interval, Field(description="Paired by image (Agresti and Min).")]


class Gap(BaseModel):
    """How much better the network does on calibration images than on those held out."""

    calibration: Fidelity
    held_out: Fidelity
    agreement: Annotated[float, Field(description="Agreement on calibration images less that on the others.")]
    interval: Annotated[Interval, Field(description="Of that difference (Newcombe).")]
    accuracy: Annotated[
        dict[str, Accuracy] | None,
        Field(description="On the calibration images of the float and the quantized network, if they are labelled."),
    ]


class Evaluation(BaseModel):
    """What was measured on."""

    images: int
    batch_size: int


class Scale(BaseModel):
    """What the values of a set of images are like."""

    mean: float
    std: float
    low: float
    high: float
    negative_share: float


class Scales(BaseModel):
    """Of the images learned from and of those measured on."""

    calibration: Scale
    evaluation: Scale
    differ: Annotated[
        bool, Field(description="Whether they were scaled differently: then no number here says what it should.")
    ]


class LossCurve(BaseModel):
    """Reconstruction loss by iteration, at most 120 points; of a longer run, means of neighbouring readings."""

    iterations: Annotated[list[int], Field(description="From 0.")]
    values: list[Number]


class Block(BaseModel):
    """One reconstructed block; errors are squared, summed over the channels, mean over everything else."""

    name: str
    layers: list[str]
    iterations: int
    error_before: Annotated[Number, Field(description="On the calibration images, everything to nearest.")]
    error_after: Annotated[Number, Field(description="On the calibration images, learned.")]
    error_held_out: Annotated[
        Number, Field(description="On the first `measured_images` evaluation images, learned.")
    ] = None
    loss: LossCurve
    seconds: float
    peak_bytes: int
    placement: Annotated[str, Field(description="Where its inputs and outputs were kept.")]


class LayerSqnr(BaseModel):
    """Signal-to-quantization-noise ratio in dB, 200 for none; null where nothing is quantized."""

    weight: Number
    input: Annotated[Number, Field(description="Of x_hat against the x that the quantized network gave it.")]
    output: Annotated[Number, Field(description="Against the float network: errors of all layers before included.")]


class DeadChannels(BaseModel):
    """Input channels that are 0 in every image measured."""

    float: Annotated[int, Field(description="In the float network.")]
    quantized: Annotated[int, Field(description="In the quantized network, behind the quantizer.")]


class Shift(BaseModel):
    """B - 1/2 over real activations."""

    mean: Number
    std: Number


class ShiftCurve(BaseModel):
    """B - 1/2 in equal bins of the activation from ``low`` to ``high``; null where no activation fell into one."""

    mean: list[Number]
    std: list[Number]


class Histogram(BaseModel):
    """Counts of a layer's inputs in equal bins; zeros are counted apart."""

    low: float
    high: float
    counts: list[int]
    below: int
    above: int
    zeros: int


class Distribution(BaseModel):
    """What a quantizer is given; everything in units of the activation."""

    low: Annotated[float, Field(description="Value of the lowest code.")]
    high: Annotated[float, Field(description="Value of the highest code.")]
    edges: Annotated[list[float], Field(description="Where one code ends and the next begins; empty above 4 bits.")]
    histogram: Histogram
    shift: Annotated[ShiftCurve | None, Field(description="Null without a border.")]


class Quantized(BaseModel):
    """What was measured where an activation is quantized; null where none is."""

    step: Number
    zero_point: int
    clipped_share: Annotated[
        float | None, Field(description="Share of the evaluation images' activations beyond the codes.")
    ] = None
    clipped_share_calibration: Annotated[
        float | None, Field(description="The same of the calibration images' activations.")
    ] = None
    dead_channels: DeadChannels | None = None
    border_shift: Annotated[Shift | None, Field(description="Null without a border.")] = None
    distribution: Annotated[
        Distribution | None, Field(description="Of the 64 quantizers with the lowest SQNR at most.")
    ] = None


class Layer(Quantized):
    """One convolution or linear layer."""

    name: str
    op: str
    weight_shape: list[int]
    weight_bits: int
    activation_bits: int
    input_from: Annotated[str | None, Field(description="Name in `values`, where its input is quantized there.")]
    border_parameters: int
    sqnr_db: LayerSqnr | None = None
    macs: Annotated[int | None, Field(description="Multiplications with a weight, of one image.")] = None
    bit_operations: Annotated[int | None, Field(description="macs times the two widths.")] = None
    border_evaluations: Annotated[int | None, Field(description="Of one image.")] = None


class Value(Quantized):
    """A value that is quantized where it is made."""

    name: str
    bits: int
    sqnr_db: Number = None


class Size(BaseModel):
    """Bytes of the network, and what of them is borders."""

    float_bytes: int
    quantized_bytes: Annotated[int, Field(description="Of all tensors of the checkpoint.")]
    border_bytes: int
    border_parameters: int
    border_share: Annotated[float, Field(description="Border parameters by the network's own.")]
    checkpoint_bytes: Annotated[int | None, Field(description="Of the file; null before it is written.")] = None


class Operations(BaseModel):
    """Of one image, in convolutions and linear layers."""

    macs: int
    bit_operations: Annotated[int, Field(description="Sum of macs times weight bits times activation bits.")]
    float_bit_operations: Annotated[int, Field(description="The same at 32 bits.")]
    border_evaluations: int


class Repeat(BaseModel):
    """Commands that do the run again; words in capitals stand for files."""

    command: str
    curl: str


class SensitiveLayer(BaseModel):
    """What raising a layer's bits would gain."""

    layer: str
    bits: Annotated[list[int], Field(description="Of weights and activations, as they are.")]
    raised_bits: list[int]
    error_share: Annotated[float | None, Field(description="Of the network's squared error, what would go away.")] = (
        None
    )
    gain: Annotated[float, Field(description="Of the metric, as a fraction.")]
    interval: Interval
    cost_bytes: int


class Sensitivity(BaseModel):
    """Which layers hurt most, the worst first."""

    metric: Annotated[str, Field(description="top1 or agreement.")]
    n: Annotated[int, Field(description="Images.")]
    layers: list[SensitiveLayer]


class Candidate(BaseModel):
    """One choice of widths that was tried; drops are percentage points of the target's metric."""

    layers: Annotated[dict[str, list[int]], Field(description="Bits of weights and activations by layer.")]
    mean_weight_bits: float
    bytes: int
    accuracy: Annotated[float, Field(description="Of the target's metric, as a fraction.")]
    drop: float
    interval: Annotated[Interval, Field(description="Of the drop.")]
    held: bool


class Target(BaseModel):
    """What became of a target: the smallest network tried that holds it, or the best."""

    max_accuracy_drop: Annotated[float, Field(description="Wanted, in percentage points.")]
    metric: Annotated[str, Field(description="top1, or agreement without labels.")]
    n: int
    held: bool
    drop: float
    interval: Annotated[Interval, Field(description="Of the drop.")]
    candidates: list[Candidate]
    chosen: Annotated[int, Field(description="Place in `candidates`.")]


class Names(BaseModel):
    """What the files of a run were called, without their folders; null for what was not read from a file."""

    model: str | None = None
    calibration: str | None = None
    evaluation: str | None = None


class Report(BaseModel):
    """What a quantization cost and how it was done."""

    format: Annotated[str | None, Field(description="aquant-report/2; null in older reports.")] = None
    sources: Names | None = None
    accuracy: Annotated[AccuracyTable | None, Field(description="Null without labels.")]
    fidelity: FidelityTable
    comparison: list[MethodRow] = []
    differences: list[Difference] = []
    gap: Gap | None = None
    sensitivity: Annotated[Sensitivity | None, Field(description="Null where it was switched off.")] = None
    target: Annotated[Target | None, Field(description="Null unless there was one.")] = None
    evaluation: Evaluation
    scales: Scales | None = None
    measured_images: Annotated[
        int | None, Field(description="Evaluation images over which layers and `error_held_out` were measured.")
    ] = None
    blocks: list[Block]
    forecast: dict[str, Any] | None = None
    device: str | None = None
    layers: list[Layer]
    values: list[Value] = []
    size: Size
    operations: Operations | None = None
    method: Method
    protocol: dict[str, Any]
    preset: dict[str, Any]
    settings: dict[str, Any] = {}
    config: QuantizationConfig
    seed: int
    versions: dict[str, str]
    digests: dict[str, str]
    peak_bytes: Annotated[
        int | None, Field(description="Most memory while a block was learned; on a CPU the whole process's.")
    ] = None
    repeat: Repeat | None = None
    warnings: list[str] = []
    seconds: float
    stages: Annotated[dict[str, float] | None, Field(description="Seconds of each stage.")] = None

    def measured(self) -> list[tuple[str, Accuracy | None, Fidelity | None]]:
        """Float, to nearest, the methods compared with the chosen one, and it: what each is worth."""
        table = self.accuracy
        rows: list[tuple[str, Accuracy | None, Fidelity | None]]
        rows = [("float", None if table is None else table.float, None)]
        others = [row for row in self.comparison if row.method != self.method]
        if "nearest" not in (self.method, *(row.method for row in others)):
            rows.append(("nearest", None if table is None else table.nearest, self.fidelity.nearest))
        rows += [(row.method, row.accuracy, row.fidelity) for row in others]
        rows.append((self.method, None if table is None else table.quantized, self.fidelity.quantized))
        return rows
