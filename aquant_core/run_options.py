"""What a run is told on a command line: arguments of ``aquant quantize``, and of ``aquant submit`` for a service.

Imports nothing heavy: both are known to every call of ``aquant``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="ONNX, or a state dict.")]
Calibration = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="Images: .npz, .npy, .safetensors; or zip, tar.")
]
Evaluation = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled images to measure accuracy on.")
]
LayerBits = Annotated[int | None, typer.Option(help="2 to 8, or 32 for float.")]
MethodName = Annotated[str | None, typer.Option(help="aquant (default), or one of the README's others.")]
PresetOption = Annotated[str | None, typer.Option(help="smoke, fast or paper.")]
Architecture = Annotated[str | None, typer.Option(help="Network that a state dict belongs to.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
ConfigSource = Annotated[str | None, typer.Option(help="JSON, or the path of a JSON file; other options go over it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
