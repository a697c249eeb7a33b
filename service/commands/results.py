"""`aquant report`, `download`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aquant_core.run_options import AsJson
from service.commands.options import DEFAULT_URL, JobId, Key, Url, open_client


def report(
    job_id: JobId,
    html: Annotated[bool, typer.Option("--html", help="A page to be looked at, instead of JSON.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Print the report of a job that succeeded."""
    with open_client(url, key) as client:
        typer.echo(client.report_page(job_id) if html else json.dumps(client.report(job_id), indent=2))


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
