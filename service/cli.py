"""The command line: `aquant up` runs the service, the other commands talk to one."""

from __future__ import annotations

import json
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aquant_core.config import read_configuration
from service.administration import keys, owners
from service.jobs.states import Device

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.schemas import JobDocument

COMMAND_GROUP = "aquant.commands"
"""Entry points of this group are commands of other packages: a function, named as the command is."""

app = typer.Typer(
    name="aquant",
    help="Post-training quantization of CNNs to 2-8 bits with an adaptive rounding border.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option("--url", envvar="AQUANT_URL", help="Address of the service.")]
DEFAULT_URL = "http://127.0.0.1:8000"
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="AQUANT_API_KEY", help="API key; the variable keeps it out of the list of processes."),
]
JobId = Annotated[str, typer.Argument(help="The job's id.")]


app.add_typer(keys)
app.add_typer(owners)


@app.command()
def up(
    host: Annotated[
        str | None, typer.Option(help="Address of the API (default 127.0.0.1); any other needs API keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of everything kept (default ./data).")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="How many; else one for each GPU, or one.")] = None,
) -> None:
    """Start broker, API and workers on this machine; Ctrl-C stops them all."""
    from service.local import MissingExtraError, OpenToStrangersError, StackError, local_stack
    from service.settings import Settings

    given = {"host": host, "port": port, "data_dir": data_dir, "workers": workers}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    for end in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with Ctrl-C ignored
        signal.signal(end, _interrupt)
    try:
        with local_stack(
            settings, lambda part: typer.echo(f"{part.name:<9} {part.address}  (log: {part.log})")
        ) as stack:
            typer.echo(f"ready     {stack.url}  (Ctrl-C stops it; API: {stack.url}/docs)")
            stack.watch()
    except KeyboardInterrupt:
        typer.echo("stopped")
    except (MissingExtraError, OpenToStrangersError, StackError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date, and make the S3 bucket if it is missing."""
    try:
        from service.artifacts import ArtifactsDownError, open_artifacts
        from service.jobs import database
        from service.s3 import UnsupportedStoreError
    except ImportError as error:
        typer.echo(f"`aquant migrate` needs {error.name}: pip install 'aquant-service[server]'.", err=True)
        raise typer.Exit(1) from error
    from service.settings import Settings

    settings = Settings()
    try:
        database.migrate(settings)
        open_artifacts(settings.artifacts).create()
    except (
        database.DatabaseUnusableError,
        database.UnsupportedDatabaseError,
        ArtifactsDownError,
        UnsupportedStoreError,
    ) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo("The database's schema is up to date, and the artifact store is there.")


@app.command()
def submit(
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="ONNX, or a state dict.")],
    calibration: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Images: .npz, .npy, .safetensors; or zip, tar.")
    ],
    weight_bits: Annotated[int | None, typer.Option(help="2 to 8, or 32 for float.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="2 to 8, or 32 for float.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled images to measure accuracy on.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="aquant (default), or one of the README's others.")] = None,
    preset: Annotated[str | None, typer.Option(help="smoke, fast or paper.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Network that a state dict belongs to.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON, or the path of a JSON file; other options go over it.")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="gpu or cpu; without it whichever is free first.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Send a model to be quantized; prints the job's id."""
    options = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "method": method,
        "preset": preset,
        "architecture": architecture,
        "seed": seed,
    }
    try:
        configuration = read_configuration(config, options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
    with _client(url, key) as client:
        job = client.submit(model, calibration, configuration, evaluation, device)
        typer.echo(job.id)
        if watch:
            _follow(client, job.id)


@app.command("watch")
def watch_job(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Follow a job to its end."""
    with _client(url, key) as client:
        _follow(client, job_id)


@app.command()
def show(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Print a job's document."""
    with _client(url, key) as client:
        typer.echo(client.get(job_id).model_dump_json(indent=2))


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """List the newest jobs."""
    with _client(url, key) as client:
        for job in client.list(limit=limit).jobs:
            config = job.config
            bits = f"W{config.weight_bits}A{config.activation_bits}"
            typer.echo(f"{job.id}  {job.created_at:%Y-%m-%d %H:%M:%S}  {job.state:<10} {config.method} {bits}")


@app.command()
def report(
    job_id: JobId,
    html: Annotated[bool, typer.Option("--html", help="A page to be looked at, instead of JSON.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Print the report of a job that succeeded."""
    with _client(url, key) as client:
        typer.echo(client.report_page(job_id) if html else json.dumps(client.report(job_id), indent=2))


@app.command()
def download(
    job_id: JobId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", dir_okay=False, help="File to write (default quantized.safetensors or .onnx)."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="The network as ONNX, not the checkpoint.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Fetch the checkpoint of a job that succeeded, or its ONNX."""
    output = output or Path("quantized.onnx" if onnx else "quantized.safetensors")
    with _client(url, key) as client:
        try:
            digest = client.download(job_id, output, "onnx" if onnx else "checkpoint")
            typer.echo(f"{output}  sha256 {digest}")
        except OSError as error:
            raise typer.BadParameter(f"{output} cannot be written: {error.strerror}", param_hint="--output") from error


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Stop a job."""
    with _client(url, key) as client:
        typer.echo(client.cancel(job_id).state)


def main() -> None:
    """Run the command line; errors meant for the user are printed without a traceback."""
    from pydantic import ValidationError

    from service.client import DigestMismatchError, KeyMalformedError, ServiceProblemError, ServiceUnreachableError

    for entry in entry_points(group=COMMAND_GROUP):
        try:
            app.command(entry.name)(entry.load())
        except ImportError as error:
            _add_missing(entry.name, error.name or str(error))
    try:
        app()
    except (DigestMismatchError, KeyMalformedError, ServiceProblemError, ServiceUnreachableError) as error:
        typer.echo(str(error), err=True)
        sys.exit(1)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        typer.echo(f"The configuration is not valid: {'; '.join(faults)}.", err=True)
        sys.exit(2)


def _add_missing(name: str, module: str) -> None:
    """Keep a command whose dependencies are absent in the list, to say what it needs."""

    def missing() -> None:
        typer.echo(f"`aquant {name}` needs {module}: pip install 'aquant-service[core]'.", err=True)
        raise typer.Exit(1)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(name, help="(not installed: pip install 'aquant-service[core]')", context_settings=settings)(missing)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _client(url: str, key: str | None) -> Client:
    from service.client import Client

    return Client(url, key=key)


def _follow(client: Client, job_id: str) -> None:
    """Show progress until the job ends; exits 1 unless it succeeded."""
    from rich.console import Console

    console = Console(stderr=True)
    told = None
    with console.status("queued") as status:
        for job in client.watch(job_id):
            status.update(_line(job))
            step = (job.state, job.stage, job.progress.block)
            if not console.is_terminal and step != told:  # a line for each stage and block, as a log has it
                console.print(_line(job), soft_wrap=True)
                told = step
    console.print(_line(job), soft_wrap=True)
    if job.error is not None:
        typer.echo(f"{job.error.detail} {job.error.remedy}", err=True)
    if job.state != "succeeded":
        raise typer.Exit(1)


def _line(job: JobDocument) -> str:
    """A job in one line."""
    words = [job.id, str(job.state)]
    if job.queue_position:
        words.append(f"({job.queue_position} ahead)")
    if job.state == "running":
        words.append(job.stage or "")
        progress = job.progress
        if progress.block:
            words.append(f"block {progress.block} of {progress.blocks}, {progress.iteration}/{progress.iterations}")
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4g}")
        if progress.eta_seconds is not None:
            words.append(f"{progress.eta_seconds:.0f} s left")
    return " ".join(words)


if __name__ == "__main__":
    main()
