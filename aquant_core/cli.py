"""The core's commands, which need no service: ``aquant quantize``, ``aquant eval`` and ``aquant export``.

``service.cli`` finds them by the entry points in pyproject.toml, and says what is to be installed where importing this
module fails. It imports nothing heavy itself, since every command of ``aquant`` imports it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aquant_core.config import QuantizationConfig
from aquant_core.errors import AQuantError, DeviceError, memory_is_full
from aquant_core.progress import Progress
from aquant_core.run_options import AsJson, Calibration, Evaluation, Model, configured

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.status import Status

for _name in ("numpy", "onnx", "onnxruntime", "safetensors", "torch"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(f"the core's commands need {_name}", name=_name)

_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]


@configured
def quantize(
    model: Model,
    calibration: Calibration,
    configuration: dict[str, Any],
    evaluation: Evaluation = None,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Checkpoint to write.")] = Path(
        "quantized.safetensors"
    ),
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Report to write: a page if its name ends in .html, else JSON."),
    ] = None,
    resume_from: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder in which finished blocks are kept.")
    ] = None,
    device: _Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Quantize a network on this machine, without a service."""
    config = QuantizationConfig.model_validate(configuration)
    for option, path in (("--output", output), ("--report", report)):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.absolute().parent}", param_hint=option)
    chosen = _device(device)

    from aquant_core.pipeline import quantize as run
    from aquant_core.planning import plan
    from aquant_core.report.page import render
    from aquant_core.report.summary import ending, summary
    from aquant_core.resources import Resources

    def write(document: dict[str, Any]) -> None:
        if report is not None:
            page = report.suffix.lower() in (".html", ".htm")
            report.write_text(render(document) if page else json.dumps(document, indent=2) + "\n", encoding="utf-8")

    if config.dry_run:
        with _errors_told(), _progress_told() as told:
            document = plan(model, calibration, config, evaluation, told, resources=Resources(chosen))
        write(document)
        typer.echo(json.dumps(document, indent=2) if as_json else "\n".join(summary(document)))
        return
    with _errors_told(), _progress_told() as told:
        result = run(
            model,
            calibration,
            config,
            evaluation,
            told,
            resources=Resources(chosen),
            resume_from=resume_from,
        )
        result.save(output)
    write(result.report)
    if as_json:
        found = {name: result.report[name] for name in ("accuracy", "fidelity", "size", "target", "warnings")}
        typer.echo(json.dumps({"path": str(output), "bytes": output.stat().st_size, **found}, indent=2))
        return
    for warning in result.report["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    for line in ending(result.report):
        typer.echo(line)
    typer.echo(f"{output}  {output.stat().st_size:,} bytes (float32: {result.report['size']['float_bytes']:,})")


def evaluate(
    network: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A checkpoint, or ONNX.")],
    images: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Images: .npz, .npy or .safetensors.")],
    against: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Another checkpoint or ONNX: how often both decide alike."),
    ] = None,
    integers: Annotated[bool, typer.Option("--integers", help="Run checkpoints on integers (IntegerModel).")] = False,
    device: _Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure a network: accuracy where the images have labels, agreement with another network."""
    chosen = _device(device)

    from aquant_core.evaluation import accuracy, fidelity
    from aquant_core.images import read_images
    from aquant_core.networks import open_network

    measured: dict[str, Any] = {"network": str(network)}
    with _errors_told():
        read = read_images(images, "evaluation")
        if read.labels is None and against is None:
            raise typer.BadParameter(f"{images} has no labels: give --against another network", param_hint="--images")
        logits = open_network(network, chosen, integers).logits_of(read)
        if read.labels is not None:
            measured["accuracy"] = accuracy(logits, read.labels)
        if against is not None:
            other = open_network(against, chosen, integers).logits_of(read)
            if other.shape != logits.shape:
                classes = f"{logits.shape[1]} and {other.shape[1]}"
                raise typer.BadParameter(f"the networks have {classes} classes", param_hint="--against")
            measured["fidelity"] = {"against": str(against), **fidelity(logits, other)}
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
        return
    for name, share in (("accuracy", "top1"), ("fidelity", "agreement")):
        if name in measured:
            part = measured[name]
            low, high = (_percent(bound) for bound in part["interval"])
            typer.echo(f"{share:<10} {_percent(part[share])}  (95 %: {low} to {high}; {part['n']:,} images)")


def export(
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Quantized checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="ONNX file to write.")] = Path(
        "quantized.onnx"
    ),
    compare: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Images to compare it on with the checkpoint, code by code."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as ONNX with standard operators."""
    import onnx

    import aquant_core
    from aquant_core import onnx_agreement
    from aquant_core.images import check_image_shape
    from aquant_core.model import QuantizedModel

    with _errors_told(), _progress_told(quiet=as_json) as told:
        told.tell("reading")
        model = aquant_core.load(checkpoint)
        assert isinstance(model, QuantizedModel)
        images = None if compare is None else aquant_core.read_images(compare, "evaluation").images
        if images is not None:
            check_image_shape(model.graph.input_shape, images, "evaluation")
        aquant_core.write_onnx(model, output, partial(told.tell, "writing", "node"))
        size = output.stat().st_size
        found = None
        if images is not None:
            tell = partial(told.tell, "comparing with onnxruntime", "image")
            found = onnx_agreement.compare(model, onnx.load(output), images, tell)
    if as_json:
        agreement = None if found is None else {**asdict(found), "share_differing": found.share_differing}
        typer.echo(json.dumps({"path": str(output), "bytes": size, "agreement": agreement}, indent=2))
        return
    typer.echo(f"{output}  {size:,} bytes")
    if found is None:
        return
    typer.echo(
        f"{found.images:,} images in onnxruntime: {sum(found.differing_given_input.values()):,} of "
        f"{sum(found.codes.values()):,} codes differ given the same input, a share of {found.share_differing:.2g} in "
        f"the whole run; {found.same_top1:,} predictions are the same"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _device(name: str) -> torch.device:
    from aquant_core.resources import Resources

    try:
        return Resources(name).device
    except DeviceError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """Errors meant for the user, without a traceback."""
    try:
        yield
    except AQuantError as error:
        typer.echo(f"{error.detail} {error.remedy}", err=True)
        raise typer.Exit(1) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if memory_is_full(error):
            typer.echo("The memory of this machine does not do. Give fewer images or a smaller network.", err=True)
        elif isinstance(error, OSError):
            typer.echo(f"{error.filename or 'A file'}: {error.strerror or error}", err=True)
        else:
            raise
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _progress_told(quiet: bool = False) -> Iterator[_Told]:
    """Progress on stderr: one line that changes on a terminal, a line for each step elsewhere, as a log has it."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
        yield _Told(console, status)


class _Told:
    """Tells how far a command is."""

    def __init__(self, console: Console, status: Status | None) -> None:
        self._console, self._status = console, status
        self._step: tuple[str, str | None, int] | None = None

    def __call__(self, progress: Progress) -> None:
        """How far a run is."""
        words = [progress.stage, progress.method or ""]
        if progress.block:
            words.append(f"block {progress.block} of {progress.blocks}")
        if progress.eta_seconds is not None:
            words.append(f"{progress.eta_seconds:.0f} s left")
        self._show((progress.stage, progress.method, progress.block), " ".join(filter(None, words)))

    def tell(self, stage: str, things: str | None = None, done: int = 0, count: int = 0) -> None:
        """How far a stage is: so many of its things are done; a log has the stage alone."""
        counted = things is not None and self._status is not None
        self._show((stage, None, 0), f"{stage} {things} {done + 1} of {count}" if counted else stage)

    def _show(self, step: tuple[str, str | None, int], line: str) -> None:
        if self._status is not None:
            self._status.update(line)
        elif step != self._step:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._step = step
