"""What the form of a submission begins with: the usual, or an earlier job's files and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

from aquant_core.config import QuantizationConfig
from aquant_core.report.commands import brief
from aquant_core.report.schema import SensitiveLayer, Target
from service.jobs.schemas import JobDocument, UploadName

SETTINGS = ("weight_bits", "activation_bits", "method", "preset", "architecture", "dry_run")
"""Keys of the config that have a field of their own."""

_USUAL = QuantizationConfig.model_validate({"weight_bits": 2, "activation_bits": 2})


@dataclass(frozen=True)
class Draft:
    """The form before anybody has changed it.

    Attributes:
        further: the rest of the configuration as JSON, or nothing.
        job: whose files are taken, unless others are sent.
    """

    further: str = ""
    job: JobDocument | None = None

    @property
    def config(self) -> QuantizationConfig:
        """What its fields say."""
        return _USUAL if self.job is None else self.job.config

    @property
    def filenames(self) -> dict[UploadName, str]:
        """The earlier job's files, by what they are called."""
        if self.job is None:
            return {}
        names: tuple[UploadName, ...] = get_args(UploadName)
        found = {name: self.job.files[name] for name in names if name in self.job.files}
        return {name: file.filename or f"sha256:{file.sha256[:12]}" for name, file in found.items()}


def again(job: JobDocument, raised: SensitiveLayer | None = None, target: Target | None = None) -> Draft:
    """An earlier job once more, with a layer at the bits that its report speaks of.

    What a report says of a layer it says of the network that it has. Where that was found for a ``target``, its widths
    are given, and not the target, which would have others searched for.
    """
    further = {name: value for name, value in brief(job.config).items() if name not in SETTINGS}
    if further.get("seed") == 0:
        del further["seed"]
    if raised is not None:
        weight_bits, activation_bits = raised.raised_bits
        if target is not None:
            further.pop("target", None)
            found = target.candidates[target.chosen].layers
            further["layers"] = {name: _override(*widths) for name, widths in found.items()}
        further["layers"] = {**further.get("layers", {}), raised.layer: _override(weight_bits, activation_bits)}
    said = json.dumps(further, indent=1) if further else ""
    return Draft(said, job)


def _override(weight_bits: int, activation_bits: int) -> dict[str, Any]:
    return {"weight_bits": weight_bits, "activation_bits": activation_bits}


def planned(config: QuantizationConfig) -> str:
    """The configuration of the run that a dry run has planned, as JSON."""
    return json.dumps(brief(config.model_copy(update={"dry_run": False})))
