"""Commands that need no service; ``aquant`` finds them by their entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aquant_core.errors import AQuantError
from aquant_core.progress import Progress


def quantize(
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="ONNX, or a state dict.")],
    calibration: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Images: .npz, .npy or .safetensors.")],
    config: Annotated[str, typer.Option(help="JSON, or the path of a JSON file: bits, method, preset ...")],
    evaluation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled images to measure accuracy on.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Checkpoint to write.")] = Path(
        "quantized.safetensors"
    ),
    report: Annotated[
        Path, typer.Option(dir_okay=False, help="Report to write: a page if its name ends in .html, else JSON.")
    ] = Path("report.html"),
) -> None:
    """Quantize a network on this machine, without a service."""
    for path in (output, report):
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is not a folder")
    values = _configuration(config)
    try:
        from aquant_core import pipeline
        from aquant_core.report.page import render
    except ImportError as error:
        typer.echo(f"`aquant quantize` needs {error.name}: pip install 'aquant-service[core]'.", err=True)
        raise typer.Exit(1) from error
    try:
        result = pipeline.quantize(model, calibration, values, evaluation, _Told())
    except AQuantError as error:
        typer.echo(f"{error.detail} {error.remedy}", err=True)
        raise typer.Exit(1) from error
    result.save(output)
    page = report.suffix.lower() in (".html", ".htm")
    report.write_text(render(result.report) if page else json.dumps(result.report, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{output}\n{report}")


def _configuration(given: str) -> dict[str, Any]:
    try:
        values = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{given!r} is neither JSON nor a file of it: {error}", param_hint="--config"
        ) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{given} holds a {type(values).__name__}, not an object", param_hint="--config")
    return values


class _Told:
    """A line for each stage and block."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        words = [word for word in (progress.stage, progress.method) if word]
        if progress.block:
            words.append(f"block {progress.block} of {progress.blocks}")
        line = " ".join(words)
        if line != self._last:
            typer.echo(line, err=True)
            self._last = line
