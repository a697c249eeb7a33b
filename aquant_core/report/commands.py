"""The commands that repeat a run."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from aquant_core.config import QuantizationConfig

_URL = '"${AQUANT_URL:-http://127.0.0.1:8000}/jobs"'
"""For a shell: the service that ``aquant`` asks, which a report cannot know."""


@dataclass(frozen=True)
class Sources:
    """Files of a run: paths, or capitals in place of what was not read from a file."""

    model: str = "MODEL"
    calibration: str = "CALIBRATION"
    evaluation: str | None = "EVALUATION"


def repeat(config: QuantizationConfig, sources: Sources) -> dict[str, str]:
    """The run as a command on this machine, and as a request to a service."""
    given = json.dumps(brief(config))
    command = ["aquant", "quantize", sources.model, "--calibration", sources.calibration]
    form = {"config": given, "model": f"@{sources.model}", "calibration": f"@{sources.calibration}"}
    if sources.evaluation is not None:
        command += ["--evaluation", sources.evaluation]
        form["evaluation"] = f"@{sources.evaluation}"
    fields = [part for name, value in form.items() for part in ("-F", f"{name}={value}")]
    return {
        "command": shlex.join([*command, "--config", given]),
        "curl": f"{shlex.join(['curl', *fields])} {_URL}",
    }


def brief(config: QuantizationConfig) -> dict[str, Any]:
    """The configuration without what it would be anyway, and still the same."""
    said = config.model_dump(mode="json", exclude_defaults=True)
    said = {"method": config.method, "preset": config.preset, "seed": config.seed} | said
    border = {name: value for name, value in said.pop("border", {}).items() if name != "fusion"}
    # Where nothing is said of fusion, it depends on the preset and on other settings of the border.
    for given in (border, border | {"fusion": config.border.fusion}):
        brought = said | ({"border": given} if given else {})
        if QuantizationConfig.model_validate(brought) == config:
            break
    return brought
