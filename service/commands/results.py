"""`aquant report`, `download`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from aquant_core.run_options import AsJson
from service.commands.exit_codes import ExitCode
from service.commands.options import DEFAULT_URL, JobId, Key, Url, open_client


def report(
    job_id: JobId,
    html: Annotated[bool, typer.Option("--html", help="The whole report as a page for a browser.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Print the report of a job that succeeded, in short; whole with --html or --json."""
    from aquant_core.report.summary import summary

    if html and as_json:
        raise typer.BadParameter("it is either a page or JSON", param_hint="--html")
    with open_client(url, key) as client:
        if html:
            typer.echo(client.report_page(job_id))
            return
        document = client.report(job_id)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    try:
        lines = summary(document)
    except ValidationError as error:
        typer.echo(unknown_version(job_id), err=True)
        raise typer.Exit(ExitCode.FAILED) from error
    typer.echo("\n".join(lines))


def unknown_version(job_id: str) -> str:
    """What to do about a report that this version cannot read, as one of a later service."""
    return f"The report is of a version that this one does not know; `aquant report {job_id} --json` prints it."


def download(
    job_id: JobId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", dir_okay=False, help="File to write (default aquant-ID.safetensors or .onnx)."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="The network as ONNX, not the checkpoint.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Fetch the checkpoint of a job that succeeded, or its ONNX; goes on where an earlier try was cut off."""
    from service.commands.progress import transfer_display

    output = output or Path(f"aquant-{job_id}.{'onnx' if onnx else 'safetensors'}")
    with open_client(url, key) as client, transfer_display() as transferred:
        try:
            digest = client.download(job_id, output, "onnx" if onnx else "checkpoint", transferred)
        except OSError as error:
            raise typer.BadParameter(f"{output} cannot be written: {error.strerror}", param_hint="--output") from error
    written = {"path": str(output), "bytes": output.stat().st_size, "sha256": digest}
    typer.echo(json.dumps(written) if as_json else f"{output}  sha256 {digest}")
