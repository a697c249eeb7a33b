"""The report of a dry run as a schema: what a run would do and take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from aquant_core.config import Method, QuantizationConfig
from aquant_core.report.schema import Evaluation, Names, Scales, Size

Standing = Literal["within", "on_disk", "beyond_budget", "beyond_limit"]

PLAN_FORMAT: Literal["aquant-plan/1"] = "aquant-plan/1"


class PlannedBlock(BaseModel):
    """What is reconstructed at a time; without seconds where the method learns nothing."""

    name: str
    layers: list[str]
    learned: Annotated[bool, Field(description="Whether it is reconstructed; progress counts no others.")]
    seconds: Annotated[float | None, Field(description="For all methods together.")] = None
    peak_bytes: int | None = None
    placement: Annotated[
        str | None, Field(description="Where its inputs and outputs are kept: device, memory or disk.")
    ] = None


class PlannedLayer(BaseModel):
    """One convolution or linear layer."""

    name: str
    op: str
    weight_shape: list[int]
    weight_bits: int
    activation_bits: int
    input_from: Annotated[str | None, Field(description="The value in `values` that it reads quantized.")]
    border_parameters: int


class PlannedValue(BaseModel):
    """A value that is quantized where it is made."""

    name: str
    bits: int


class Plan(BaseModel):
    """What a job with `dry_run` reports."""

    format: Literal["aquant-plan/1"]
    dry_run: Literal[True]
    sources: Names | None = None
    blocks: list[PlannedBlock]
    layers: list[PlannedLayer]
    values: list[PlannedValue]
    other_bits: Annotated[
        list[str], Field(description="Layers that are not at the bits asked for, but at the protocol's 8 for instance.")
    ]
    size: Annotated[Size, Field(description="As the checkpoint's will be.")]
    forecast: Annotated[dict[str, Any] | None, Field(description="As in a job's progress; null if nothing is learned.")]
    budget_bytes: Annotated[
        int | None,
        Field(
            description="Memory that a run fills, where the plan was made, before block inputs go elsewhere: the "
            "device's, on a CPU the process's."
        ),
    ] = None
    limit_bytes: Annotated[
        int | None,
        Field(
            description="Memory above which a run is stopped; null if none is set, or on a GPU, whose forecast is of "
            "other memory."
        ),
    ] = None
    evaluation: Evaluation
    scales: Scales | None = None
    device: str
    method: Method
    protocol: dict[str, Any]
    preset: dict[str, Any]
    settings: dict[str, Any]
    config: QuantizationConfig
    seed: int
    versions: dict[str, str]
    digests: dict[str, str]
    warnings: list[str]
    seconds: Annotated[float, Field(description="That the plan took.")]

    @property
    def standing(self) -> Standing | None:
        """How the forecast stands to limit and budget; None where nothing is learned, or an older plan has neither.

        Beyond the limit a run is stopped. Beyond the budget it is not: it takes that much wherever the blocks' inputs
        are kept, and is tried. Within it, they may be on disk to keep it so.
        """
        if self.forecast is None:
            return None
        peak = self.forecast["peak_bytes"]
        if self.limit_bytes is not None and peak > self.limit_bytes:
            return "beyond_limit"
        if self.budget_bytes is None:
            return None
        if peak > self.budget_bytes:
            return "beyond_budget"
        return "on_disk" if self.on_disk else "within"

    @property
    def cautions(self) -> list[str]:
        """The warnings, and what is to be known of memory before a run is started."""
        cautions = list(self.warnings)
        if self.standing == "beyond_limit":
            cautions.append(
                "The forecast is beyond the memory above which a run is stopped here: it is likely to be stopped."
            )
        elif self.standing == "beyond_budget":
            cautions.append(
                "Wherever blocks' inputs are kept, the run takes more memory than it is to fill here: it is tried all "
                "the same, and fails if there is no more."
            )
        if self.on_disk:
            cautions.append(
                f"What {self.on_disk} blocks are learned from goes to disk, for want of memory, which is slow."
            )
        return cautions

    @property
    def on_disk(self) -> int:
        """How many blocks have their inputs and outputs on disk."""
        return sum(block.placement == "disk" for block in self.blocks)
