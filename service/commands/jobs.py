"""`aquant submit`, `watch`, `list`, `show`, `cancel`, `delete`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from aquant_core.run_options import AsJson, Calibration, Evaluation, Model, configured
from service.commands.exit_codes import OF_JOBS, ExitCode
from service.commands.options import DEFAULT_URL, JobId, Key, Timeout, Url, open_client
from service.commands.results import unknown_version
from service.jobs.states import Device, JobState

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.schemas import JobDocument


@configured
def submit(
    model: Model,
    calibration: Calibration,
    configuration: dict[str, Any],
    evaluation: Evaluation = None,
    device: Annotated[Device | None, typer.Option(help="gpu or cpu; without it whichever is free first.")] = None,
    reuse: Annotated[bool, typer.Option("--reuse", help="Take a job that has done the same before.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this submission: given again, it is the same job.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Send a model to be quantized; prints the job's id."""
    from service.commands.progress import transfer_display

    with open_client(url, key) as client:
        with transfer_display() as transferred:
            job = client.submit(
                model,
                calibration,
                configuration,
                evaluation,
                device,
                reuse=reuse,
                idempotency_key=idempotency_key,
                transferred=transferred,
            )
        if not as_json:
            typer.echo(job.id)
        elif not watch:
            typer.echo(job.model_dump_json(indent=2))
        if watch:
            _follow(client, job.id, timeout, as_json)


def watch_job(
    job_id: JobId, timeout: Timeout = None, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None
) -> None:
    """Follow a job to its end, which is the exit code; --json prints its document at every change, one a line."""
    with open_client(url, key) as client:
        _follow(client, job_id, timeout, as_json)


def show(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Tell where a job stands."""
    with open_client(url, key) as client:
        job = client.get(job_id)
    typer.echo(job.model_dump_json(indent=2) if as_json else "\n".join(_facts(job)))


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    page: Annotated[str | None, typer.Option(help="The `next` of the page before (--json).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """List the newest jobs."""
    with open_client(url, key) as client:
        found = client.list(state=state, limit=limit, page=page)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    tasks = [_task(job) for job in found.jobs]
    width = max(map(len, tasks), default=0)
    for job, task in zip(found.jobs, tasks, strict=True):
        line = f"{job.id}  {job.created_at:%Y-%m-%d %H:%M:%S}  {job.state:<10} {task:<{width}}  {job.name}"
        typer.echo(line.rstrip())


def cancel(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Stop a job."""
    with open_client(url, key) as client:
        job = client.cancel(job_id)
    typer.echo(job.model_dump_json(indent=2) if as_json else job.state)


def delete(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Remove a job that is not running, with its files."""
    with open_client(url, key) as client:
        client.delete(job_id)
    typer.echo(json.dumps({"deleted": job_id}) if as_json else f"deleted {job_id}")


def _follow(client: Client, job_id: str, timeout: float | None, as_json: bool) -> None:
    """Show progress until the job ends; its end is the exit code."""
    from service.commands.progress import describe, job_display

    try:
        with job_display() as display:
            for job in client.watch(job_id, timeout):
                display.show(job)
                if as_json:
                    typer.echo(job.model_dump_json())
    except TimeoutError as error:
        typer.echo(f"{error} It goes on; `aquant watch {job_id}` follows it again.", err=True)
        raise typer.Exit(ExitCode.TIMED_OUT) from error
    except KeyboardInterrupt:
        typer.echo(f"Job {job_id} goes on; `aquant cancel {job_id}` stops it.", err=True)
        raise
    if not as_json:  # its document has told it
        typer.echo(describe(job), err=True)
        if job.state == JobState.SUCCEEDED:
            _tell_result(client, job_id)
    if job.error is not None:
        typer.echo(f"{job.error.detail} {job.error.remedy}", err=True)
    code = OF_JOBS[job.state]
    if code:
        raise typer.Exit(code)


def _tell_result(client: Client, job_id: str) -> None:
    """How accurate it is; that this cannot be told is not the job's failure."""
    from aquant_core.report.summary import ending
    from service.client import ServiceProblemError, ServiceUnreachableError

    try:
        lines = ending(client.report(job_id))
    except ValidationError:
        lines = [unknown_version(job_id)]
    except (ServiceProblemError, ServiceUnreachableError) as error:
        lines = [str(error)]
    typer.echo("\n".join(lines), err=True)


def _task(job: JobDocument) -> str:
    """What a job is to do, in a few words."""
    from aquant_core.report.naming import other_layers

    config = job.config
    bits = f"W{config.weight_bits}A{config.activation_bits}"
    if others := other_layers(config):
        bits += f" ({others})"
    if config.target is not None:
        bits = f"target {config.target.max_accuracy_drop:g} from {bits}"
    return f"{config.method} {bits} {config.preset}{' (dry run)' if config.dry_run else ''}"


def _facts(job: JobDocument) -> list[str]:
    from service.commands.progress import describe

    lines = [describe(job), f"config      {_task(job)}, seed {job.config.seed}"]
    lines.append(f"network     {job.name}")
    times = {"created": job.created_at, "started": job.started_at, "finished": job.finished_at}
    lines += [f"{name:<11} {at:%Y-%m-%d %H:%M:%S} UTC" for name, at in times.items() if at is not None]
    if job.device is not None:
        lines.append(f"device      {job.device}")
    if job.error is not None:
        lines.append(f"error       {job.error.code}: {job.error.detail} {job.error.remedy}")
    return lines + [f"{name:<11} {file.size:,} bytes  sha256 {file.sha256}" for name, file in job.files.items()]
