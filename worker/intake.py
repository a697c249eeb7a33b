"""Child process (`python -m worker.intake REQUEST`): makes uploads a captured model and checked image sets.

It runs in the sandbox and is the only place where uploads are parsed. What it says goes to standard output as
one JSON object a line: ``{"confined": [...]}`` before it reads a byte of them, ``{"stage": ...}`` as it goes along,
and at the end ``{"warnings": [...]}`` or ``{"problem": {...}}``, with ``"lost": true`` where another attempt may do
better.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aquant_core.config import QuantizationConfig
from aquant_core.errors import AQuantError, memory_is_full
from service.jobs.schemas import Problem
from worker.confinement import confine
from worker.sandbox import Limits
from worker.workplace import DISK_FULL, disk_is_full

CAPTURED = "captured.safetensors"
CALIBRATION = "calibration.images.safetensors"
EVALUATION = "evaluation.images.safetensors"
MESSAGES = ("confined", "stage", "warnings", "problem", "lost")
"""The keys of what it says."""


class Request(BaseModel):
    """What the child is to read, and the limits it sets itself."""

    parent: int
    limits: Limits
    model: Path
    calibration: Path
    evaluation: Path | None
    config: QuantizationConfig


def take_in(request: Request, folder: Path) -> list[str]:
    """Read, check and convert; the warnings.

    Raises:
        AQuantError: what is wrong with the upload.
    """
    from aquant_core.capture_model import capture
    from aquant_core.images import check_images, read_images

    preprocess = request.config.preprocess
    calibration = read_images(request.calibration, "calibration", preprocess)
    evaluation = None if request.evaluation is None else read_images(request.evaluation, "evaluation", preprocess)
    _say(stage="capture")
    captured = capture(request.model, request.config.architecture, calibration.images[:2])
    warnings = check_images(captured, calibration, request.config, evaluation)
    captured.save(folder / CAPTURED)
    calibration.save(folder / CALIBRATION)
    if evaluation is not None:
        evaluation.save(folder / EVALUATION)
    return warnings


def main(path: str) -> int:
    """Do one request; 0 if the upload is sound, 1 if not."""
    request = Request.model_validate_json(Path(path).read_bytes())
    folder = Path(path).parent
    _say(confined=confine(request.limits, request.parent, folder))
    try:
        _say(warnings=take_in(request, folder))
    except AQuantError as error:
        problem = Problem.of_job(error.code, error.detail, error.remedy)
    except Exception as error:  # a file made to break its reader ends here
        traceback.print_exc()
        if disk_is_full(error):
            _say(lost=True, problem=DISK_FULL.model_dump())
            return 1
        if memory_is_full(error):
            problem = Problem.of_job(
                "upload_too_large_for_memory",
                f"Reading the upload takes more than the {request.limits.memory_bytes} bytes it is given.",
                "Send a smaller model or fewer images, or have the operator raise AQUANT_INTAKE_MEMORY_BYTES.",
            )
        else:
            text = str(error).splitlines()[0][:300] if str(error) else "no further word"
            why = "it is nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {text}"
            problem = Problem.of_job(
                "upload_unreadable",
                f"The upload could not be read: {why}.",
                "Check that the model runs where it was exported, and send it again.",
            )
    else:
        return 0
    _say(problem=problem.model_dump())
    return 1


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
